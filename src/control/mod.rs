//! Floor 4: how a person or a program talks to a node: a unix socket that speaks QMP as QEMU does,
//! and what it tells.
//!
//! ```text
//!  client ──bytes──▶ reader ──commands──▶ executor ──▶ Handler (the node)
//!    ▲                 │ out of band          │ replies
//!    └──── writer ◀── outbox ◀────────────────┴──────────── EventSink (the node)
//! ```
//!
//! Every client has a reader, an executor and a writer thread, so a command that waits (a
//! checkpoint, a pause) holds up neither other clients nor commands sent out of band, and a client
//! that does not read holds up nobody but itself. Everything a client can make grow is bounded: the
//! size and depth of a command, commands waiting, replies waiting, events waiting, connections.
//!
//! * [`Server`] listens; the node gives it a [`Handler`] and emits events through its
//!   [`EventSink`].
//! * [`Client`] is the blocking other side, for `mcd status` and the demo.
//! * [`console`] is the guest's serial console: standard output, a file or a socket of its own.
//! * [`status`] and [`metrics`] are the shapes of the answers, for both sides.

use std::io;
use std::path::PathBuf;

mod bind;
pub mod client;
pub mod console;
mod framer;
pub mod message;
pub mod metrics;
mod outbox;
pub mod server;
mod session;
pub mod status;
#[cfg(test)]
mod tests;
pub mod verify;

pub use client::{Client, ClientError, Event, is_listening};
pub use message::{ErrorClass, QmpError};
pub use server::{EventSink, Handler, Server};

/// Most bytes of one command, and of one value nested in it.
pub const COMMAND_BYTES_MAX: usize = 1 << 20;

/// Deepest nesting of a command. Below the limit of the JSON parser, so that ours is the one that
/// speaks.
pub const COMMAND_DEPTH_MAX: usize = 100;

/// Most clients connected at once.
pub const CLIENTS_MAX: usize = 64;

/// Why the control socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A unix socket's path has at most 107 bytes.
    #[error(
        "control socket {path}: the path is longer than 107 bytes, which a unix socket cannot have; \
            choose a shorter one"
    )]
    PathTooLong {
        /// The path asked for.
        path: PathBuf,
    },
    /// Something else has that name; it is not touched.
    #[error("control socket {path}: a file that is no socket is there; remove it or choose another path")]
    NotASocket {
        /// The path asked for.
        path: PathBuf,
    },
    /// A live process answers there.
    #[error("control socket {path}: another process answers there; stop it or choose another path")]
    InUse {
        /// The path asked for.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("control socket {path}: cannot {action}: {source}")]
    Io {
        /// The path asked for.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// The system's error.
        source: io::Error,
    },
}
