use proptest::sample::Index;

use super::*;

/// Feeds a body and ends it.
pub(super) fn scan<'a>(
    mut scanner: ModelScanner,
    chunks: impl IntoIterator<Item = &'a [u8]>,
) -> Result<String, ScanError> {
    for chunk in chunks {
        scanner.feed(chunk)?;
    }
    scanner.finish()?;
    Ok(scanner.model().expect("a scanner that finished must know the model").to_owned())
}

/// Scans a body in one piece, in two pieces, and byte by byte, which must all come to the same. Two pieces means cut
/// everywhere, but for the middle of long bodies.
pub(super) fn scan_cut_everywhere(scanner: impl Fn() -> ModelScanner, body: &[u8]) -> Result<String, ScanError> {
    let whole = scan(scanner(), [body]);
    for at in (0..=body.len()).filter(|&at| at < 200 || body.len() - at < 200) {
        let (head, tail) = body.split_at(at);
        assert_eq!(scan(scanner(), [head, tail]), whole, "{} cut at {at}", body.escape_ascii());
    }
    assert_eq!(scan(scanner(), body.chunks(1)), whole, "{} byte by byte", body.escape_ascii());
    whole
}

/// Cuts a body in some places.
pub(super) fn cut<'a>(body: &'a [u8], cuts: &[Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(body.len() + 1)).collect();
    cuts.sort_unstable();
    cuts.push(body.len());
    let mut start = 0;
    cuts.into_iter().map(|end| &body[std::mem::replace(&mut start, end)..end]).collect()
}

/// What a scanner has to say of a body in which some other reader found these values of `model`.
pub(super) fn expected(values: impl IntoIterator<Item = Result<String, ScanError>>) -> Result<String, ScanError> {
    let mut model: Option<String> = None;
    for value in values {
        let value = value?;
        match &model {
            _ if value.is_empty() => return Err(ScanError::ModelEmpty),
            Some(first) if *first != value => {
                return Err(ScanError::ModelsDiffer { first: first.clone(), second: value });
            }
            _ => model = Some(value),
        }
    }
    model.ok_or(ScanError::ModelMissing)
}

#[test]
fn content_type_picks_the_format() {
    let json = br#"{"model":"m"}"#;
    for content_type in [
        None,
        Some("application/json"),
        Some("text/plain; boundary=B"),
        Some("multipart/mixed; boundary=B"),
        Some(""),
        Some("\""),
    ] {
        let scanner = ModelScanner::for_content_type(content_type.map(str::as_bytes));
        assert_eq!(scanner.and_then(|scanner| scan(scanner, [&json[..]])), Ok("m".to_owned()), "{content_type:?}");
    }

    let longest = "b".repeat(1024);
    for (parameters, boundary) in [
        ("; boundary=B", "B"),
        (" ;charset=UTF-8;  BOUNDARY=\"B\" ; ", "B"),
        ("; boundary=\"a b\"; x=\"; boundary=B\"", "a b"),
        ("; boundary=----=_Part_1.2", "----=_Part_1.2"),
        ("; boundary=a*b&c{d}#%e", "a*b&c{d}#%e"),
        ("; boundary=B; charset=latin1", "B"),
        (&format!("; boundary={longest}"), &longest),
        (&format!("; boundary={}", &longest[..71]), &longest[..71]),
    ] {
        let content_type = format!("Multipart/Form-Data{parameters}");
        let body = format!("--{boundary}\r\nContent-Disposition: form-data; name=model\r\n\r\nm\r\n--{boundary}--");
        let scanner = ModelScanner::for_content_type(Some(content_type.as_bytes()));
        assert_eq!(scanner.and_then(|scanner| scan(scanner, [body.as_bytes()])), Ok("m".to_owned()), "{parameters}");
    }

    for parameters in [
        "",
        "; charset=utf-8",
        "; boundary=",
        "; boundary=\"\"",
        "; boundary=\"a \"",
        "; boundary=\"a\\b\"",
        "; boundary=\"a;b\"",
        "; boundary=<B>",
        "; boundary=\"B",
        "; boundary=B; boundary=B",
        "; boundary=B; boundary*=utf-8''C",
        "; boundary=B; charset=utf-16",
        &format!("; boundary={longest}b"),
    ] {
        let content_type = format!("multipart/form-data{parameters}");
        let refused = ModelScanner::for_content_type(Some(content_type.as_bytes()));
        assert!(matches!(refused, Err(ScanError::InvalidForm { .. })), "{parameters}: {refused:?}");
    }
}

#[test]
fn errors_are_final() {
    let mut scanner = ModelScanner::json();
    assert_eq!(scanner.feed(br#"{"model":"a","#), Ok(()));
    assert_eq!(scanner.model(), Some("a"));
    let differ = Err(ScanError::ModelsDiffer { first: "a".to_owned(), second: "b".to_owned() });
    assert_eq!(scanner.feed(br#""model":"b""#), differ);
    assert_eq!(scanner.model(), None);
    assert_eq!(scanner.feed(b"}"), differ);
    assert_eq!(scanner.finish(), differ);

    let mut scanner = ModelScanner::json();
    assert_eq!(scanner.finish(), Err(ScanError::ModelMissing));
    assert_eq!(scanner.feed(br#"{"model":"a"}"#), Err(ScanError::ModelMissing));
}

#[test]
fn every_error_has_a_code() {
    let text = String::new;
    for (error, code) in [
        (ScanError::ModelMissing, "model_required"),
        (ScanError::ModelNotAString, "model_required"),
        (ScanError::ModelEmpty, "model_required"),
        (ScanError::ModelTooLong { begin: text() }, "model_not_found"),
        (ScanError::NotAnObject, "invalid_json"),
        (ScanError::InvalidJson { why: "", offset: 0 }, "invalid_json"),
        (ScanError::InvalidForm { why: "" }, "invalid_json"),
        (ScanError::InvalidGzip, "invalid_json"),
        (ScanError::DecodesTooLarge { ratio: 1 }, "request_too_large"),
        (ScanError::UnsupportedCoding { coding: text() }, "unsupported_encoding"),
        (ScanError::ModelsDiffer { first: text(), second: text() }, "invalid_json"),
    ] {
        assert_eq!(error.code(), code, "{error:?}");
    }
    let error = ScanError::InvalidJson { why: "expected a colon", offset: 7 };
    assert_eq!(error.to_string(), "request body is not valid JSON: expected a colon at byte 7");
}
