//! What must hold of any bytes that come in, parser by parser. A check panics if it does not hold.
//!
//! Two callers run the same checks: the fuzz targets beside this folder, which invent inputs, and the ordinary tests,
//! which run those under `testdata/fuzz`: what real clients send, what attackers send, and what fuzzing has found. A
//! check compares with something that was written apart from the product (another library, or a plain reading of the
//! specification), for a parser that does not panic can still be wrong.

pub mod body;
pub mod form_scan;
pub mod gzip_scan;
pub mod head;
pub mod json_scan;
pub mod labels;
pub mod paths;
pub mod usage;

use inference_proxy::wire::scan::{ModelScanner, ScanError};

/// A target by its name, which is also that of its file and of the folder with its seeds.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: &[Target] = &[
    ("json_scan", json_scan::check),
    ("form_scan", form_scan::check),
    ("gzip_scan", gzip_scan::check),
    ("head", head::check),
    ("body", body::check),
    ("paths", paths::check),
    ("labels", labels::check),
    ("usage", usage::check),
];

/// Numbers that depend on an input only, so that an input that fails fails again.
struct Dice(u64);

impl Dice {
    fn of(input: &[u8]) -> Dice {
        // FNV-1a; xorshift must not begin with zero.
        Dice(
            input
                .iter()
                .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
                | 1,
        )
    }

    /// A number from 0 to below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % end
    }

    /// `input` in pieces, most of which are of a similar size; some are empty.
    fn cut<'i>(&mut self, input: &'i [u8]) -> Vec<&'i [u8]> {
        let longest = 1 << self.below(12);
        let mut rest = input;
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let (piece, behind) = rest.split_at(self.below(longest + 1).min(rest.len()));
            pieces.push(piece);
            rest = behind;
        }
        pieces
    }
}

/// Ways in which an input may arrive: byte by byte, and cut at two sets of places.
fn arrivals(input: &[u8]) -> [Vec<&[u8]>; 3] {
    let mut dice = Dice::of(input);
    [input.chunks(1).collect(), dice.cut(input), dice.cut(input)]
}

/// What a scanner says of a body that arrives in these pieces: the model, and the answer that is continued.
fn scan(mut scanner: ModelScanner, pieces: &[&[u8]]) -> Result<(String, Option<String>), ScanError> {
    let mut told: Option<String> = None;
    let end = pieces.iter().try_for_each(|piece| {
        scanner.feed(piece)?;
        let model = scanner.model().map(str::to_owned);
        assert!(told.is_none() || model == told, "the model was {told:?} and is {model:?} now");
        told = model;
        Ok(())
    });
    match end.and_then(|()| scanner.finish()) {
        Ok(()) => {
            let model = scanner.model().expect("a scanner that finished must know the model").to_owned();
            assert!(told.is_none_or(|told| told == model), "the model changed at the end");
            assert!(!model.is_empty() && model.len() <= inference_proxy::wire::scan::MODEL_LIMIT_BYTES, "{model:?}");
            Ok((model, scanner.continues().map(str::to_owned)))
        }
        Err(error) => {
            assert_eq!(scanner.model(), None, "an error takes the model back");
            assert_eq!(
                (scanner.feed(b"{}"), scanner.finish()),
                (Err(error.clone()), Err(error.clone())),
                "it is final"
            );
            assert!(error.to_string().len() < 16 * 1024, "a message that long is none: {error}");
            Err(error)
        }
    }
}

/// A value of `model` that another reader found.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Model {
    Text(String),
    Null,
    /// A number, a literal, an array or an object.
    Other,
}

/// What a scanner has to say of a body in which another reader found these values of `model`, in their order.
fn expected(models: impl IntoIterator<Item = Model>, may_be_none: bool) -> Result<String, ScanError> {
    use inference_proxy::wire::scan::{MODEL_LIMIT_BYTES, MODEL_SHOWN_CHARS};
    let mut said: Option<String> = None;
    for model in models {
        let (model, error) = match model {
            Model::Text(text) => (text, ScanError::ModelEmpty),
            Model::Null => (String::new(), ScanError::ModelNotAString),
            Model::Other => return Err(ScanError::ModelNotAString),
        };
        let begin = || model.chars().take(MODEL_SHOWN_CHARS).collect::<String>();
        let is_long = model.len() > MODEL_LIMIT_BYTES;
        match said {
            Some(first) if !model.is_empty() && first != model => {
                let second = if is_long { begin() + "…" } else { model };
                return Err(ScanError::ModelsDiffer { first, second });
            }
            Some(first) if model.is_empty() && !first.is_empty() => return Err(error),
            _ if model.is_empty() && !may_be_none => return Err(error),
            _ if is_long => return Err(ScanError::ModelTooLong { begin: begin() }),
            _ => said = Some(model),
        }
    }
    said.filter(|model| !model.is_empty()).ok_or(ScanError::ModelMissing)
}
