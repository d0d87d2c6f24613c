//! Floor 3: the third party that decides who runs a guest.
//!
//! An arbiter keeps one [`Record`] per guest and replaces it only by compare-and-swap: of two nodes
//! that start from the same record, one wins. A node that gets no answer knows nothing, and must
//! act so.

pub mod command;
pub mod etcd;
pub mod file;
pub mod none;
mod spec;
mod text;

use crate::protocol::record::Record;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

pub use crate::protocol::record::Swap;
pub use spec::{ArbiterSpec, SpecError};

/// Keeps the record of one guest. Every call may take as long as the arbiter's timeout allows, so
/// callers give it a thread.
pub trait Arbiter: Send {
    /// The guest's record; `None` if it has none yet.
    ///
    /// # Errors
    /// [`ArbiterError`]: nothing is known of the record then.
    fn read(&mut self) -> Result<Option<Record>, ArbiterError>;

    /// Puts `new` in place of `expected` (`None`: no record), if that is the record.
    ///
    /// # Errors
    /// [`ArbiterError`]: the swap may have been carried out or not. Asking again shows which: a
    /// swap that finds its own `new` was won before.
    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError>;

    /// The arbiter in a few words, for logs and status.
    fn describe(&self) -> String;

    /// What makes the question in hand end soon, from another thread, when nobody wants its answer
    /// any more; `None` where every answer comes soon anyway.
    fn canceller(&self) -> Option<Canceller> {
        None
    }
}

/// Ends the question in hand (see [`Arbiter::canceller`]).
pub type Canceller = Box<dyn Fn() + Send + Sync>;

/// Why an arbiter did not answer. Each message is one line and names what to do.
#[derive(Debug, Error)]
pub enum ArbiterError {
    /// It did not answer in time, or cannot be asked at all.
    #[error("arbiter {arbiter} is out of reach: {why}")]
    Unreachable {
        /// Which arbiter.
        arbiter: String,
        /// Why, and what to do.
        why: String,
    },
    /// Its directory is not there.
    #[error("arbiter directory {} does not exist: mount the shared storage, \
        or create the directory on it", path.display())]
    NoDirectory {
        /// The directory.
        path: PathBuf,
    },
    /// The record is there and cannot be trusted. It is never taken for a missing one.
    #[error(
        "arbiter record {record} is damaged ({what}): restore it; or, once no node runs the guest, \
            remove it and start the guest anew"
    )]
    Corrupt {
        /// Where it is: the file, or the key.
        record: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A file with a certificate or a key does not hold one.
    #[error("{} holds no usable {what}: give a PEM file", path.display())]
    BadPem {
        /// The file.
        path: PathBuf,
        /// What should be in it.
        what: &'static str,
    },
    /// No room for a new record; the old one is kept.
    #[error("no space left for arbiter record {}: the old record stands; make room there", path.display())]
    Full {
        /// The file.
        path: PathBuf,
    },
    /// The filesystem cannot lock.
    #[error("arbiter directory {} has no file locks ({source}): use NFS version 4, a cluster filesystem, \
        or a local directory", path.display())]
    NoLocks {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Any other error of the system.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}
