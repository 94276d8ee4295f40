//! From bytes to facts: the parsers of the bytes that clients and backends send.
//!
//! [`http1`] reads the heads and the framing of HTTP/1.1 messages and leaves their bytes where they lie. [`scan`] finds
//! the model in a request body and the token counts in an answer, in chunks that may be cut anywhere and without
//! holding them. All of it is strict where two readers of the same bytes could disagree, because a proxy stands between
//! two readers.
//!
//! HTTP/1.1 is read here and not by a library, because a proxy needs only the heads and the framing of two messages.
//! Reading them where they lie takes less time, and a sixth of the memory, of turning them into objects and back;
//! `docs/performance.md` has the figures.
//!
//! No socket and no task appears here, and no word about backends or tables: the room names no other room.

pub mod http1;
pub mod scan;
