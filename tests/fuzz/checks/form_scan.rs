//! The scanner for multipart forms against a reader as lenient as servers are.
//!
//! An input is a line with the Content-Type, which ends in LF or CR LF, and the body behind it.

use inference_proxy::wire::scan::{ModelScanner, ScanError};

use super::{Model, arrivals, expected, scan};

/// Checks a form with its Content-Type.
pub fn check(input: &[u8]) {
    let end = input.iter().position(|byte| *byte == b'\n').unwrap_or(input.len());
    let (content_type, body) = (input[..end].trim_ascii_end(), input.get(end + 1..).unwrap_or_default());
    let scanner = || ModelScanner::for_content_type(Some(content_type));
    let first = match scanner() {
        Ok(first) => first,
        Err(error) => return assert!(matches!(error, ScanError::InvalidForm { .. }), "{error}"),
    };
    let found = scan(first, &[body]);
    for pieces in arrivals(body) {
        let scanner = scanner().expect("a Content-Type must mean the same every time");
        assert_eq!(scan(scanner, &pieces), found, "it depends on how it is cut");
    }
    let is_form = content_type
        .split(|byte| *byte == b';')
        .next()
        .is_some_and(|media_type| media_type.trim_ascii().eq_ignore_ascii_case(b"multipart/form-data"));
    if let (true, Ok((model, _))) = (is_form, &found) {
        let boundary = parameter(content_type, b"boundary").expect("an accepted form must have a boundary");
        for strict_lines in [true, false] {
            let models = models(body, &boundary, strict_lines, parameter);
            let found = expected(models.iter().cloned().map(Model::Text), false);
            assert_eq!(found.as_ref(), Ok(model), "others read {models:?}");
            // Starlette may see fewer fields, but no other value.
            let python: Vec<String> = self::models(body, &boundary, strict_lines, python_parameter);
            assert!(python.iter().all(|value| value == model), "Python reads {python:?}, the scanner {model:?}");
        }
    }
}

/// The values of all fields named `model`, as a server might read them: boundaries at the beginning of a line, lines ended
/// by CR LF, or by either.
fn models(body: &[u8], boundary: &[u8], strict_lines: bool, parameter: Parameter) -> Vec<String> {
    let delimiter = [b"--", boundary].concat();
    // Where each boundary begins, with the line end in front of it, and what is behind it.
    let mut cuts: Vec<(usize, usize)> = Vec::new();
    for at in 0..=body.len().saturating_sub(delimiter.len()) {
        if !body[at..].starts_with(&delimiter) {
            continue;
        }
        let front = match &body[..at] {
            [] => 0,
            [.., b'\r', b'\n'] => at - 2,
            [.., b'\n'] if !strict_lines => at - 1,
            _ => continue,
        };
        cuts.push((front, at + delimiter.len()));
    }
    let mut models = Vec::new();
    for (n, (_, start)) in cuts.iter().enumerate() {
        if body[*start..].starts_with(b"--") {
            break;
        }
        let Some((end, _)) = cuts.get(n + 1) else { break };
        let part = &body[*start..(*end).max(*start)];
        // What is behind the boundary in its line means nothing.
        let Some((_, part)) = split_once(part, b"\r\n") else { continue };
        let (headers, content) = match (part.strip_prefix(b"\r\n"), split_once(part, b"\r\n\r\n")) {
            (Some(content), _) => (&b""[..], content),
            (None, Some(split)) => split,
            (None, None) => continue,
        };
        if headers.split(|byte| *byte == b'\n').any(|line| names_model(line, parameter)) {
            models.push(String::from_utf8_lossy(content).into_owned());
        }
    }
    models
}

/// A way to read the parameter of this name in a header value.
type Parameter = fn(&[u8], &[u8]) -> Option<Vec<u8>>;

fn names_model(line: &[u8], parameter: Parameter) -> bool {
    let Some((name, value)) = split_once(line.trim_ascii(), b":") else { return false };
    name.trim_ascii().eq_ignore_ascii_case(b"content-disposition")
        && parameter(value, b"name").is_some_and(|name| name.trim_ascii() == b"model")
}

/// The last parameter of this name in a header value, without its quotes and escapes.
fn parameter(value: &[u8], wanted: &[u8]) -> Option<Vec<u8>> {
    let mut pieces = vec![Vec::new()];
    let (mut quoted, mut escaped) = (false, false);
    for byte in value {
        match byte {
            _ if std::mem::take(&mut escaped) => {}
            b'\\' if quoted => {
                escaped = true;
                continue;
            }
            b'"' => {
                quoted = !quoted;
                continue;
            }
            b';' if !quoted => {
                pieces.push(Vec::new());
                continue;
            }
            _ => {}
        }
        pieces.last_mut().expect("there must be a first piece").push(*byte);
    }
    let mut values = pieces.iter().skip(1).filter_map(|piece| split_once(piece, b"="));
    values
        .rfind(|(name, _)| name.trim_ascii().eq_ignore_ascii_case(wanted))
        .map(|(_, value)| value.trim_ascii().to_vec())
}

/// The same as Python's `email.message` reads it, which Starlette's form parser is built on: a semicolon ends a parameter
/// if an even number of quotes stands before it.
fn python_parameter(value: &[u8], wanted: &[u8]) -> Option<Vec<u8>> {
    let count = |text: &[u8], what: &[u8]| text.windows(what.len()).filter(|window| *window == what).count();
    let mut found = None;
    let mut rest = split_once(value, b";")?.1;
    loop {
        let ends = rest.iter().enumerate().filter(|(_, byte)| **byte == b';').map(|(at, _)| at);
        let is_end = |at: &usize| {
            let text = &rest[..*at];
            (count(text, b"\"") as isize - count(text, b"\\\"") as isize) % 2 == 0
        };
        let end = ends.into_iter().find(is_end).unwrap_or(rest.len());
        if let Some((name, value)) = split_once(&rest[..end], b"=")
            && name.trim_ascii().eq_ignore_ascii_case(wanted)
        {
            found = Some(python_unquote(value.trim_ascii()));
        }
        match rest.get(end + 1..) {
            Some(behind) => rest = behind,
            None => return found,
        }
    }
}

fn python_unquote(value: &[u8]) -> Vec<u8> {
    match value {
        [b'"', inner @ .., b'"'] => {
            let inner = String::from_utf8_lossy(inner).replace("\\\\", "\\").replace("\\\"", "\"");
            inner.into_bytes()
        }
        [b'<', inner @ .., b'>'] => inner.to_vec(),
        _ => value.to_vec(),
    }
}

fn split_once<'t>(text: &'t [u8], at: &[u8]) -> Option<(&'t [u8], &'t [u8])> {
    let found = text.windows(at.len()).position(|window| window == at)?;
    Some((&text[..found], &text[found + at.len()..]))
}
