use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::super::tests::{cut, expected, scan, scan_cut_everywhere};
use super::super::{MODEL_LIMIT_BYTES, MODEL_SHOWN_CHARS, ModelScanner, ScanError};
use super::invalid;

fn form(boundary: &str) -> ModelScanner {
    let content_type = format!("multipart/form-data; boundary=\"{boundary}\"");
    ModelScanner::for_content_type(Some(content_type.as_bytes())).expect("the test's boundary must be valid")
}

/// Scans a form with the boundary `B`, in which `\n` stands for CR LF.
fn check(body: &str, expected: Result<&str, ScanError>) {
    check_bytes(body.replace('\n', "\r\n").as_bytes(), expected);
}

fn check_bytes(body: &[u8], expected: Result<&str, ScanError>) {
    let found = scan_cut_everywhere(|| form("B"), body);
    assert_eq!(found, expected.map(str::to_owned), "{}", body.escape_ascii());
}

/// A form of one part with this header block.
fn check_headers(headers: &str, expected: Result<&str, ScanError>) {
    check(&format!("--B\n{headers}\n\nm\n--B--"), expected);
}

#[test]
fn finds_the_field() {
    check("--B\nContent-Disposition: form-data; name=\"model\"\n\nwhisper\n--B--\n", Ok("whisper"));
    // Behind a file, with text around the form.
    check(
        "preamble\n--B\nContent-Disposition: form-data; name=\"file\"; filename=\"model.wav\"\n\
             Content-Type: audio/wav\n\nRIFF\n-- -B\n--\n\n--B\nContent-Disposition: form-data; name=\"model\"\n\n\
             org/whisper\n--B--\nContent-Disposition: form-data; name=\"model\"\n\nother\n--B\n",
        Ok("org/whisper"),
    );
    // Nothing is trimmed or decoded.
    check("--B\nContent-Disposition: form-data; name=model\n\n a%20\n\n\n--B--", Ok(" a%20\r\n\r\n"));
    check("--B\nContent-Disposition: form-data; name=model\n\n-\u{e9}-\n--B--", Ok("-\u{e9}-"));
}

#[test]
fn finds_no_other_field() {
    check("--B--", Err(ScanError::ModelMissing));
    for name in ["\"models\"", "\"Model\"", "\"x\"; title=\"model\"", "\"\"", "%6Dodel", "\"x; name=model\""] {
        check_headers(&format!("Content-Disposition: form-data; name={name}"), Err(ScanError::ModelMissing));
    }
    // However odd the header is, no reader takes it for that of `model`.
    for disposition in [
        "form-data; name=\"file\"; filename=\"say \"hi\".wav\"",
        "form-data; name=\"file\"; filename=\"5\"disk.img\"",
        "form-data; name=\"file\"; filename=\"a\"; b\".wav\"; filename*=UTF-8''a.wav",
        "form-data; name=\"file\"; filename=\"C:\\\"",
        "form-data; filename=\"C:\\dir\\\"; name=\"file\"",
        "form-data; name=\"file\"; filename=\"model\"s.wav\"",
        "form-data; name=\"file\"; filename=model\"",
        "form-data; name=\"file",
        "form-data; name=\"file\"x",
        "form-data; name=a\"; x=\"",
        "form-data; name=a\"b",
        "form-data; name =file",
        "form-data; name= file",
        "form-data;; name=file",
        "form-data; name",
        "form-data",
        "form-data; name=\"fi\\le\"",
        "form-data; name=\"the \\\"model\\\" field\"",
        "form-data; name=\"my\\\\model\"",
        "form-data; name=\"a\"; name=\"b\"",
        "form-data; name=\"fa\"; name*=UTF-8''f%C3%A4",
        "form-data; name*=UTF-8'en'f%C3%A4",
        "attachment; name=\"file\"; filename=\"a.wav\"",
        "attachment; filename=\"a.wav\"",
        "inline",
    ] {
        check_headers(&format!("Content-Disposition: {disposition}"), Err(ScanError::ModelMissing));
    }
    check_headers("Content-Type: text/plain", Err(ScanError::ModelMissing));
    check_headers(
        "Content-Disposition: form-data; name=a\nContent-Disposition: form-data; name=b",
        Err(ScanError::ModelMissing),
    );
    check_headers(
        "Content-Type: text/plain; charset=utf-16\nContent-Disposition: form-data; name=a",
        Err(ScanError::ModelMissing),
    );
    check_headers(
        "Content-Disposition: form-data; name=x\nX-Name: form-data; name=\"model\"",
        Err(ScanError::ModelMissing),
    );
}

#[test]
fn reads_headers_as_they_are_written() {
    for header in [
        "Content-Disposition: form-data; name=\"model\"",
        "content-disposition:form-data;name=model",
        "CONTENT-DISPOSITION: \t Form-Data ; NAME=\"model\" ; ",
        "Content-Disposition: form-data; filename=\"a\\\"; name=\\\"b\"; name=\"model\"",
        "Content-Disposition: form-data; filename=a b.wav; name=\"model\"; filename*=UTF-8''model",
        "Content-Type: text/plain; charset=utf-8\nContent-Disposition: form-data; name=\"model\"\nContent-Length: 1",
        "Content-Transfer-Encoding: 8bit\nContent-Disposition: form-data; name=\"model\"",
        "Content-Disposition: attachment; name=\"model\"",
        "Content-Type: text/plain; charset=ISO-8859-1\nContent-Disposition: form-data; name=\"model\"",
        "Content-Disposition: form-data; name=model\nContent-Type: text/\"; charset",
        // A file named `model` is the field as well: servers would take it for it.
        "Content-Disposition: form-data; name=\"model\"; filename=\"m.txt\"\nContent-Type: text/plain",
    ] {
        check_headers(header, Ok("m"));
    }
}

#[test]
fn refuses_what_servers_read_differently() {
    let malformed = "the parameters of a header are malformed";
    let repeated = "a parameter of a header is there twice, or encoded";
    for (headers, why) in [
        ("Content-Disposition: form-data; name=\"a\"; name=\"model\"", repeated),
        ("Content-Disposition: form-data; name=\"a\"; Name*=UTF-8''model", repeated),
        ("Content-Disposition: form-data; name*=UTF-8''model", repeated),
        ("Content-Disposition: form-data; name*0=mo; name*1=del", repeated),
        ("Content-Disposition: form-data; name=\"mo\\del\"", "the name of a part is escaped"),
        ("Content-Disposition: form-data; name=\"model", malformed),
        ("Content-Disposition: form-data; name=\"model\"x", malformed),
        ("Content-Disposition: form-data; name=\"model\"; filename=\"say \"hi\".txt\"", malformed),
        ("Content-Disposition: form-data; filename=\"C:\\\"; name=\"model\"", malformed),
        ("Content-Disposition: form-data; name=\"file\"; filename=\"a\"; name=\"model\".wav\"", repeated),
        ("Content-Disposition: form-data; name=mo\"del", malformed),
        ("Content-Disposition: form-data; na\"me\"=model", malformed),
        ("Content-Disposition: form-data name=model", "a Content-Disposition is malformed"),
        ("Content-Disposition: ; name=model", "a Content-Disposition is malformed"),
        ("Content-Disposition: form-data; name=<model>", "the name of a part is escaped"),
        ("Content-Disposition: form-data; name=\"\\model\"", "the name of a part is escaped"),
        ("Content-Disposition: form-data; name=\"a\\\"; name=\\\"model\"", "the name of a part is escaped"),
        (
            "Content-Disposition: form-data; filename=\"a\\\"; name=\\\"model\"; name=b",
            "the parameters of a header are escaped",
        ),
        ("Content-Disposition: form-data; filename=\"; name=model\"", "a part has no name"),
        ("Content-Disposition: form-data; name=a; name*=UTF-16LE''m%00o%00d%00e%00l%00", repeated),
        ("Content-Disposition: form-data; name*=utf-8''%6dode%6C", repeated),
        ("Content-Disposition: form-data; name =model", malformed),
        ("Content-Disposition: form-data; name= model", malformed),
        ("Content-Disposition: form-data;; name=model", malformed),
        (
            "Content-Type: text/plain; charset=utf-16\nContent-Disposition: form-data; name=model",
            "its charset is not UTF-8 or one like ASCII",
        ),
        (
            "Content-Disposition: form-data; name=a\nContent-Disposition: form-data; name=model",
            "a part has two Content-Dispositions",
        ),
        ("Content-Disposition: form-data; name=a;\n name=model", "a header of a part has no colon"),
        ("Content-Disposition: form-data; name=a\n x: y", "a header of a part has no valid name"),
        ("Content-Disposition : form-data; name=model", "a header of a part has no valid name"),
        ("Content-Disposition: form-data; name=model\n--B-x: y", "a boundary stands among the headers of a part"),
        ("--B: y\nContent-Disposition: form-data; name=model", "a boundary stands among the headers of a part"),
        ("Content-Disposition: form-data; name=mo\0del", "a header of a part holds a control character"),
        (
            "Content-Transfer-Encoding: base64\nContent-Disposition: form-data; name=model",
            "`model` has a Content-Transfer-Encoding",
        ),
    ] {
        check_headers(headers, Err(invalid(why)));
    }
    check_headers(
        "Content-Transfer-Encoding: base64\nContent-Transfer-Encoding: 8bit\nContent-Disposition: form-data; name=model",
        Err(invalid("`model` has a Content-Transfer-Encoding")),
    );
    check_bytes(
        b"--B\r\nContent-Disposition: form-data; name=model\n\r\nm\r\n--B--",
        Err(invalid("a header of a part does not end in CR LF")),
    );
}

#[test]
fn a_charset_like_ascii_does_not_matter_to_a_model_of_ascii() {
    let scan_as = |charset: &str, headers: &str, model: &[u8]| {
        let content_type = format!("multipart/form-data; boundary=B; charset={charset}");
        let scanner = ModelScanner::for_content_type(Some(content_type.as_bytes()))?;
        let head = format!("--B\r\n{headers}Content-Disposition: form-data; name=model\r\n\r\n");
        scan(scanner, [head.as_bytes(), model, b"\r\n--B--"])
    };
    let not_ascii = Err(invalid("`model` is not ASCII, and the charset is not UTF-8"));
    for charset in ["utf-8", "UTF8", "\"utf-8\"", "Utf_8"] {
        assert_eq!(scan_as(charset, "", "\u{e9}".as_bytes()), Ok("\u{e9}".to_owned()), "{charset}");
    }
    for charset in ["us-ascii", "ISO-8859-1", "iso8859-15", "latin1", "windows-1252", "cp1251", "KOI8-R", "gbk"] {
        assert_eq!(scan_as(charset, "", b"m"), Ok("m".to_owned()), "{charset}");
        for model in ["\u{e9}".as_bytes(), b"\xe9"] {
            assert_eq!(scan_as(charset, "", model), not_ascii, "{charset}");
        }
        let of_the_part = format!("Content-Type: text/plain; charset={charset}\r\n");
        assert_eq!(scan_as("utf-8", &of_the_part, b"m"), Ok("m".to_owned()), "{charset}");
        assert_eq!(scan_as("utf-8", &of_the_part, "\u{e9}".as_bytes()), not_ascii, "{charset}");
    }
    let unlike_ascii = Err(invalid("its charset is not UTF-8 or one like ASCII"));
    for charset in ["utf-16", "UTF16LE", "utf-32", "utf-7", "cp037", "cp500", "utf-8-sig", "hz", "iso-2022-jp", "x", ""]
    {
        assert_eq!(scan_as(charset, "", b"m"), unlike_ascii, "{charset}");
        let of_the_part = format!("Content-Type: text/plain; charset={charset}\r\n");
        assert_eq!(scan_as("utf-8", &of_the_part, b"m"), unlike_ascii, "{charset}");
    }
}

#[test]
fn no_value_is_no_model_where_there_need_be_none() {
    let part = |value: &str| format!("--B\r\nContent-Disposition: form-data; name=\"model\"\r\n\r\n{value}\r\n");
    let differ =
        |first: &str, second: &str| Err(ScanError::ModelsDiffer { first: first.to_owned(), second: second.to_owned() });
    for (values, expected) in [
        (&[""][..], Err(ScanError::ModelMissing)),
        (&["", ""], Err(ScanError::ModelMissing)),
        (&["m"], Ok("m".to_owned())),
        (&["", "m"], differ("", "m")),
        (&["m", ""], Err(ScanError::ModelEmpty)),
    ] {
        let mut scanner = form("B");
        scanner.let_model_be_none();
        let body = values.iter().copied().map(part).collect::<String>() + "--B--";
        assert_eq!(scan(scanner, [body.as_bytes()]), expected, "{values:?}");
    }
}

#[test]
fn a_boundary_is_a_line_of_its_own() {
    let head = "--B\nContent-Disposition: form-data; name=model\n\n";
    let not_after_line_end = "a boundary is not preceded by a line end";
    let not_before_line_end = "a boundary is not followed by a line end";
    check(&format!("{head}m--B--"), Err(invalid(not_after_line_end)));
    check(&format!("{head}--B--"), Err(invalid(not_after_line_end)));
    check("x--B--", Err(invalid(not_after_line_end)));
    check_bytes(b"\n--B--", Err(invalid(not_after_line_end)));
    check_bytes(b"--B \n--B--", Err(invalid(not_before_line_end)));
    check(&format!("{head}m\n--Bb\n--B--"), Err(invalid(not_before_line_end)));
    check(&format!("{head}m\n--B -\n--B--"), Err(invalid(not_before_line_end)));
    check(&format!("{head}m\n--B-\n--B--"), Err(invalid(not_before_line_end)));
    check(&format!("{head}\n--B--"), Err(ScanError::ModelEmpty));
}

#[test]
fn every_value_counts() {
    let part = |value: &str| format!("--B\nContent-Disposition: form-data; name=\"model\"\n\n{value}\n");
    check(&format!("{}{}--B--", part("a"), part("a")), Ok("a"));
    let differ = ScanError::ModelsDiffer { first: "a".to_owned(), second: "b".to_owned() };
    check(&format!("{}{}--B--", part("a"), part("b")), Err(differ.clone()));
    check(&format!("{}{}--B--", part("a"), part("b").replace("\"\n", "\"; filename=x\n")), Err(differ));
    let longest = "m".repeat(MODEL_LIMIT_BYTES);
    check(&format!("{}--B--", part(&longest)), Ok(&longest));
    for excess in 1..5 {
        let value = "m".repeat(MODEL_LIMIT_BYTES + excess);
        let begin = "m".repeat(MODEL_SHOWN_CHARS);
        check(&format!("{}--B--", part(&value)), Err(ScanError::ModelTooLong { begin: begin.clone() }));
        let differ = ScanError::ModelsDiffer { first: "a".to_owned(), second: format!("{begin}…") };
        check(&format!("{}{}--B--", part("a"), part(&value)), Err(differ));
    }
    check_bytes(
        b"--B\r\nContent-Disposition: form-data; name=model\r\n\r\n\xFF\r\n--B--",
        Err(invalid("`model` is not UTF-8")),
    );
}

#[test]
fn a_form_has_an_end_and_limits() {
    let ends_early = Err(invalid("the body ends before its last boundary"));
    let body = "--B\r\nContent-Disposition: form-data; name=model\r\n\r\nm\r\n--B--";
    for length in 0..body.len() {
        assert_eq!(scan(form("B"), [&body.as_bytes()[..length]]), ends_early, "{length} bytes");
    }
    let part = "--B\nContent-Disposition: form-data; name=model\n\nm\n";
    assert_eq!(
        scan(form("B"), [format!("{}--B--", part.repeat(1000)).replace('\n', "\r\n").as_bytes()]),
        Ok("m".to_owned())
    );
    let parts = format!("{}--B--", part.repeat(1001)).replace('\n', "\r\n");
    assert_eq!(scan(form("B"), [parts.as_bytes()]), Err(invalid("it has too many parts")));

    let disposition = "Content-Disposition: form-data; name=model";
    check_headers(&format!("{}{disposition}", "a: b\n".repeat(31)), Ok("m"));
    check_headers(&format!("{}{disposition}", "a: b\n".repeat(32)), Err(invalid("a part has too many headers")));
    let filler = "a".repeat(8192 - disposition.len() - "a: \r\n\r\n\r\n".len());
    check_headers(&format!("a: {filler}\n{disposition}"), Ok("m"));
    check_headers(&format!("a: a{filler}\n{disposition}"), Err(invalid("the headers of a part are too long")));
}

#[test]
fn the_model_is_known_at_its_boundary() {
    let mut scanner = form("B");
    let mut feed = |chunk: &str| {
        scanner.feed(chunk.as_bytes()).expect("the form must be valid so far");
        scanner.model().map(str::to_owned)
    };
    assert_eq!(feed("--B\r\nContent-Disposition: form-data; name=model\r\n\r\nm\r\n--"), None);
    assert_eq!(feed("B"), Some("m".to_owned()));
    assert_eq!(feed("\r\nContent-Disposition: form-data; name=file\r\n\r\n..."), Some("m".to_owned()));
}

#[derive(Debug, Clone)]
struct Part {
    header: &'static str,
    content: Vec<u8>,
}

/// Parts whose content is made of what boundaries are made of.
fn parts(boundary: &'static str) -> impl Strategy<Value = Vec<Part>> {
    let pieces = select(vec!["\r\n--", "\r\n", "\r", "\n", "-", "--", "B", "b", "m", &boundary[..boundary.len() - 1]]);
    let content = prop_oneof![
        3 => prop::collection::vec(pieces, 0..8).prop_map(|pieces| pieces.concat().into_bytes()),
        1 => prop::collection::vec(any::<u8>(), 0..40),
        2 => Just(b"m".to_vec()),
    ];
    let header = select(vec![
        "content-disposition: form-data; name=model",
        "Content-Disposition: form-data; filename=\"x\"; name=\"model\"",
        "Content-Type: a/b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"model\"",
        "Content-Disposition: form-data; name=\"Model\"",
    ]);
    let needle = format!("--{boundary}").into_bytes();
    let content = content.prop_filter("content must not hold the boundary", move |content| {
        !content.windows(needle.len()).any(|window| window == needle)
    });
    prop::collection::vec((header, content).prop_map(|(header, content)| Part { header, content }), 0..5)
}

fn write(boundary: &str, parts: &[Part]) -> Vec<u8> {
    let mut body = Vec::new();
    for part in parts {
        body.extend_from_slice(format!("--{boundary}\r\n{}\r\n\r\n", part.header).as_bytes());
        body.extend_from_slice(&part.content);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{boundary}--\r\n").as_bytes());
    body
}

fn decode(value: Vec<u8>) -> Result<String, ScanError> {
    String::from_utf8(value).map_err(|_| invalid("`model` is not UTF-8"))
}

fn is_named_model(headers: &str) -> bool {
    headers.split([';', '\r', '\n']).any(|piece| matches!(piece.trim(), "name=model" | "name=\"model\""))
}

/// The values of `model`, read the simple way; only right for bodies that are a form.
fn values(boundary: &str, body: &[u8]) -> Vec<Vec<u8>> {
    // Latin-1 keeps every byte one character.
    let latin: String = "\r\n".chars().chain(body.iter().map(|&byte| char::from(byte))).collect();
    let delimiter = format!("\r\n--{boundary}");
    latin
        .split(&delimiter)
        .skip(1)
        .take_while(|part| !part.starts_with("--"))
        .filter_map(|part| part.split_once("\r\n\r\n"))
        .filter(|(headers, _)| is_named_model(headers))
        .map(|(_, content)| content.chars().map(|byte| byte as u8).collect())
        .collect()
}

fn boundary() -> impl Strategy<Value = &'static str> {
    select(vec!["B", "-", "---", "BbB", "------b", "----WebKitFormBoundary7MA4YWxkTrZu0gW"])
}

proptest! {
    #[test]
    fn reads_what_was_written(
        (boundary, parts) in boundary().prop_flat_map(|boundary| (Just(boundary), parts(boundary))),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let body = write(boundary, &parts);
        let models = parts.into_iter().filter(|part| is_named_model(part.header));
        let expected = expected(models.map(|part| decode(part.content)));
        prop_assert_eq!(scan(form(boundary), cut(&body, &cuts)), expected.clone());
        prop_assert_eq!(scan(form(boundary), body.chunks(1)), expected);
    }

    #[test]
    fn a_damaged_form_is_refused_or_read_as_others_read_it(
        (boundary, parts) in boundary().prop_flat_map(|boundary| (Just(boundary), parts(boundary))),
        damage in prop::collection::vec((any::<Index>(), select(b"\r\n-Bb:;= m\"\\".to_vec()), 0..3_u8), 1..4),
        cuts in prop::collection::vec(any::<Index>(), 0..6),
    ) {
        let mut body = write(boundary, &parts);
        for (at, byte, kind) in damage {
            let at = at.index(body.len());
            match kind {
                0 => body[at] = byte,
                1 => body.insert(at, byte),
                _ => { body.remove(at); }
            }
        }
        let found = scan(form(boundary), [body.as_slice()]);
        prop_assert_eq!(scan(form(boundary), cut(&body, &cuts)), found.clone());
        prop_assert_eq!(scan(form(boundary), body.chunks(1)), found.clone());
        if let Ok(model) = found {
            prop_assert_eq!(expected(values(boundary, &body).into_iter().map(decode)), Ok(model));
        }
    }

    #[test]
    fn survives_anything(body in prop::collection::vec(select(b"\r\n-B:;=\"\\ model".to_vec()), 0..200)) {
        let whole = scan(form("B"), [body.as_slice()]);
        prop_assert_eq!(scan(form("B"), body.chunks(1)), whole);
    }
}
