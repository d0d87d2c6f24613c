//! Output buffers for fault tolerance by checkpoints: a guest's packets are held until the epoch
//! that produced them is committed elsewhere.
//!
//! Four verbs carry it:
//!
//! ```text
//!            push                seal(k)                  release(through k)
//!  guest ──────────→ open packets ──────→ sealed packets ──────────────────→ sink (the tap)
//!                         └──────────────────────┴── discard ──→ gone
//! ```
//!
//! - **hold** ([`OutputBuffer::push`]): a packet joins the open epoch;
//! - **seal** ([`OutputBuffer::seal`]): the open epoch gets its number and is closed;
//! - **release** ([`OutputBuffer::release`]): sealed packets leave, in order and exactly once;
//! - **discard** ([`OutputBuffer::discard`]): every packet held is dropped, because it never
//!   happened.
//!
//! The buffer is bounded by bytes and by packets. It knows nothing of guests, sockets or clocks.
//! Packets enter and leave a host through a [`PacketPort`]: [`VnetTapPort`] or the plain
//! [`TunTapPort`] for a real tap interface, [`MemoryPort`] for tests.
//!
//! ```
//! use netbuf::{Limits, OutputBuffer};
//!
//! let mut buffer = OutputBuffer::new(Limits { bytes_max: 1 << 20, packets_max: 1000 });
//! buffer.push(b"first")?;
//! buffer.seal(0)?;
//! buffer.push(b"second")?;
//!
//! let mut out = Vec::new();
//! buffer.release(0, |frame| {
//!     out.push(frame.to_vec());
//!     Ok(())
//! })?;
//! assert_eq!(out, [b"first".to_vec()]);
//! assert_eq!(buffer.open_packets(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod buffer;
mod link;
mod port;
mod queue;
mod tap;
mod vnet_tap;

pub use buffer::{
    Discarded, FRAME_BYTES_MAX, First, Limits, OutputBuffer, PushError, ReleaseError, Released, RestartError,
    SealError, Sealed,
};
pub use link::{LinkState, link_state};
pub use port::{MemoryPort, PacketPort, VNET_HEADER_BYTES};
pub use tap::{TapError, TunTapPort};
pub use vnet_tap::{VnetTapPort, check_up};
