//! Finds `model` in a body of `application/x-www-form-urlencoded`, as servers read it that take forms.
//!
//! Command-line clients call JSON by that name too, so a body that begins with a brace is read both ways, and has to name
//! the same model in both.

use super::{KEY, ModelValue, ScanError, json::JsonScanner};

/// Looks for the key in pairs.
#[derive(Debug, Default)]
pub(super) struct PairScanner {
    part: Part,
    escape: Escape,
    /// How much of the key equals [`KEY`] so far; `None` once it does not.
    matched: Option<usize>,
    model: ModelValue,
    /// Where the body begins with a brace.
    json: Option<Box<JsonScanner>>,
    begun: bool,
    /// A semicolon ended the pair before.
    behind_semicolon: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    #[default]
    KeyStart,
    Key,
    Value {
        is_model: bool,
    },
}

/// How far an escape has come: `%`, and its first digit.
#[derive(Debug, Clone, Copy, Default)]
enum Escape {
    #[default]
    None,
    Percent,
    Digit(u8, u8),
}

/// What ends a pair, and what one decodes to.
#[derive(Debug, Clone, Copy)]
enum Piece {
    Ampersand,
    Semicolon,
    Equals,
    Byte(u8),
}

const TWO_WAYS: ScanError =
    ScanError::InvalidForm { why: "a semicolon beside `model`, which servers read in two ways" };
const NOT_UTF8: ScanError = ScanError::InvalidForm { why: "`model` is not UTF-8" };

// === impl PairScanner ===

impl PairScanner {
    pub(super) fn feed(&mut self, chunk: &[u8]) -> Result<(), ScanError> {
        let mut text = chunk;
        if !self.begun
            && let Some(begin) = chunk.iter().position(|byte| !byte.is_ascii_whitespace())
        {
            self.begun = true;
            text = &chunk[begin..];
            if text.starts_with(b"{") {
                let mut json = Box::<JsonScanner>::default();
                if self.model.may_be_none {
                    json.let_model_be_none();
                }
                self.json = Some(json);
            }
        }
        if let Some(json) = &mut self.json {
            json.feed(text)?;
        }
        chunk.iter().try_for_each(|byte| self.byte(*byte))?;
        self.agree()
    }

    /// As soon as it is told in every way in which the body is read. Of JSON alone it is known before the end, as a form
    /// need not name one.
    pub(super) fn model(&self) -> Option<&str> {
        let json = self.json.as_ref().and_then(|json| json.model());
        json.or_else(|| self.model.first.as_deref().filter(|_| self.json.is_none()))
    }

    pub(super) fn let_model_be_none(&mut self) {
        self.model.may_be_none = true;
    }

    pub(super) fn finish(&mut self) -> Result<(), ScanError> {
        self.escape_ended()?;
        self.end_pair(false)?;
        self.agree()?;
        match &self.json {
            Some(json) => json.finish(),
            None => self.model.finish(),
        }
    }

    /// Both readings name the same model.
    fn agree(&self) -> Result<(), ScanError> {
        let Some(json) = &self.json else { return Ok(()) };
        match (json.model(), self.model.said()) {
            (Some(first), Some(second)) if first != second => {
                Err(ScanError::ModelsDiffer { first: first.to_owned(), second: second.to_owned() })
            }
            _ => Ok(()),
        }
    }

    fn byte(&mut self, byte: u8) -> Result<(), ScanError> {
        match self.escape {
            Escape::Percent => match hex(byte) {
                Some(digit) => {
                    self.escape = Escape::Digit(byte, digit);
                    return Ok(());
                }
                None => self.escape_ended()?,
            },
            Escape::Digit(_, high) => match hex(byte) {
                Some(low) => {
                    self.escape = Escape::None;
                    return self.piece(Piece::Byte(high << 4 | low));
                }
                None => self.escape_ended()?,
            },
            Escape::None => {}
        }
        match byte {
            b'%' => {
                self.escape = Escape::Percent;
                Ok(())
            }
            b'&' => self.piece(Piece::Ampersand),
            b';' => self.piece(Piece::Semicolon),
            b'=' => self.piece(Piece::Equals),
            b'+' => self.piece(Piece::Byte(b' ')),
            byte => self.piece(Piece::Byte(byte)),
        }
    }

    /// What has come of an escape is none, and stands for itself.
    fn escape_ended(&mut self) -> Result<(), ScanError> {
        match std::mem::take(&mut self.escape) {
            Escape::None => Ok(()),
            Escape::Percent => self.piece(Piece::Byte(b'%')),
            Escape::Digit(byte, _) => {
                self.piece(Piece::Byte(b'%'))?;
                self.piece(Piece::Byte(byte))
            }
        }
    }

    fn piece(&mut self, piece: Piece) -> Result<(), ScanError> {
        match (self.part, piece) {
            (_, Piece::Ampersand) => self.end_pair(false),
            (_, Piece::Semicolon) => self.end_pair(true),
            (Part::KeyStart | Part::Key, Piece::Equals) => {
                if self.part == Part::KeyStart {
                    self.matched = Some(0);
                }
                self.part = Part::Value { is_model: self.is_model() };
                Ok(())
            }
            (Part::KeyStart, Piece::Byte(byte)) => {
                self.part = Part::Key;
                self.matched = Some(0);
                self.key(byte);
                Ok(())
            }
            (Part::Key, Piece::Byte(byte)) => {
                self.key(byte);
                Ok(())
            }
            (Part::Value { is_model: false }, _) => Ok(()),
            (Part::Value { is_model: true }, Piece::Equals) => self.model.push(b"="),
            (Part::Value { is_model: true }, Piece::Byte(byte)) => self.model.push(&[byte]),
        }
    }

    fn key(&mut self, byte: u8) {
        self.matched = self
            .matched
            .filter(|at| KEY.get(*at).is_some_and(|expected| byte.eq_ignore_ascii_case(expected)))
            .map(|at| at + 1);
    }

    fn is_model(&self) -> bool {
        self.matched == Some(KEY.len())
    }

    fn end_pair(&mut self, by_semicolon: bool) -> Result<(), ScanError> {
        let is_model = match self.part {
            Part::KeyStart => false,
            Part::Key => self.is_model(),
            Part::Value { is_model } => is_model,
        };
        if is_model {
            if by_semicolon || self.behind_semicolon {
                return Err(TWO_WAYS);
            }
            self.model.complete(NOT_UTF8)?;
        }
        self.behind_semicolon = by_semicolon;
        self.part = Part::KeyStart;
        Ok(())
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{ModelScanner, tests::scan};
    use super::*;

    fn scanner() -> ModelScanner {
        ModelScanner::for_fields(Some(b"application/x-www-form-urlencoded")).unwrap()
    }

    fn read(body: &[u8]) -> Result<String, ScanError> {
        let whole = scan(scanner(), [body]);
        let cut = scan(scanner(), body.chunks(1));
        assert_eq!(whole, cut, "{}", String::from_utf8_lossy(body));
        whole
    }

    #[test]
    fn the_model_is_found_in_every_spelling_of_its_key() {
        for body in [
            "model=b",
            "x=1&model=b",
            "model=b&x=1",
            "&&model=b&",
            "mod%65l=b",
            "%6D%6f%64%65%6c=b",
            "MODEL=b",
            "model=%62",
            "model=b&model=b",
            "x=1;y=2&model=b",
            "x=%26model%3Da&model=b",
            "x&model=b",
            "=&model=b",
            r#"{"model":"b"}"#,
            r#" {"model":"b","x":"%26model=a"}"#,
            r#"{"model":"b","x":"&model=b&"}"#,
        ] {
            assert_eq!(read(body.as_bytes()).as_deref(), Ok("b"), "{body}");
        }
        assert_eq!(read(b"model=a+b%2Fc=%").as_deref(), Ok("a b/c=%"));
        assert_eq!(read(b"model=%4").as_deref(), Ok("%4"));
    }

    #[test]
    fn two_readings_are_refused() {
        for body in [
            "model=a&model=b",
            "model=a&Model=b",
            "model=a&mod%65l=b",
            "model=a;x=1",
            "x=1;model=a",
            "model=a;model=b",
            "model=%ff",
            r#"{"model":"a","x":"&model=b&"}"#,
            r#"{"model":"a","x":"&mod%65l=b&"}"#,
            r#"{"x":"&model=b&","model":"a"}"#,
            r#"{"model":"a","x":";model=b"}"#,
        ] {
            let refused = read(body.as_bytes());
            assert!(
                matches!(refused, Err(ScanError::ModelsDiffer { .. } | ScanError::InvalidForm { .. })),
                "{body}: {refused:?}"
            );
        }
    }

    #[test]
    fn none_is_none() {
        for body in ["", "x=1", "models=a", "mode=a", "model[]=a", "x=model=a", "+model=a", "xmodel=a"] {
            assert_eq!(read(body.as_bytes()), Err(ScanError::ModelMissing), "{body}");
        }
        for body in ["model=", "model", "model&x"] {
            assert_eq!(read(body.as_bytes()), Err(ScanError::ModelEmpty), "{body}");
            let mut scanner = scanner();
            scanner.let_model_be_none();
            assert_eq!(scan_none(scanner, body), Err(ScanError::ModelMissing), "{body}");
        }
        let mut scanner = scanner();
        scanner.let_model_be_none();
        assert!(matches!(scan_none(scanner, "model=&model=a"), Err(ScanError::ModelsDiffer { .. })));
    }

    fn scan_none(mut scanner: ModelScanner, body: &str) -> Result<(), ScanError> {
        scanner.feed(body.as_bytes())?;
        scanner.finish()
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(body in "[{}model=&;%65 +\":a,]{0,40}") {
            let _ = read(body.as_bytes());
        }
    }
}
