//! The checks as a library, so that each target is one line. The ordinary tests use the same file.

pub mod checks;
