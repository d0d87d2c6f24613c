//! Floor 3: the byte form of what nodes say to each other, and the connection that carries it.
//!
//! ```text
//!  Message ── codec ──┐
//!  pages ──── pages ──┼──→ frame (header, CRC32C, caps) ──→ link (TCP) ──→ frame ──→ …
//!  state ─────────────┘
//! ```
//!
//! Everything is little-endian. Every length is checked against a cap before anything is allocated
//! for it, and whatever bytes a peer sends, the answer is a value or a [`WireError`], never a
//! panic.

pub mod block_hashes;
pub mod codec;
pub mod error;
pub mod frame;
pub mod heartbeat;
pub mod link;
pub mod pages;
pub mod watch;

pub use error::{PageError, WireError};
pub use frame::{Frame, FrameBatch, FrameKind, FrameReader, FrameWriter};
pub use heartbeat::{HeartbeatError, HeartbeatPeer, heartbeat_message};
pub use link::{Link, LinkCloser, LinkError, LinkReader, LinkWriter, Listener, ListenerCloser};
pub use pages::{PageDecoder, PageEncoder, PageKind, PageRecord};
pub use watch::LinkWatch;
