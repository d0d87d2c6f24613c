//! Snapshot files: a guest's memory and machine state in a file, from which it can be started
//! again.
//!
//! ```text
//!  bytes 0…24     preface: magic, versions, length and check sum of the head
//!  then           head: whose it is, of which epoch, what machine, what CPU ([`SnapshotHead`])
//!  then           frames as on the wire: epoch-begin, pages…, state…, epoch-end
//! ```
//!
//! The preface, little-endian:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | magic, `MCD-SNAP` |
//! | 8 | 2 | version of the file's form |
//! | 10 | 2 | version of the protocol, which the frames are of |
//! | 12 | 4 | bytes of head |
//! | 16 | 4 | CRC32C of the head |
//! | 20 | 4 | CRC32C of the bytes before |
//!
//! Magic and versions stay where they are in every version to come. Pages rise by index, zero pages
//! are left out, and the file ends with the epoch-end, whose figures and digest cover all frames
//! before it: a file that was cut off or damaged anywhere is known as such. Disks are not in it; a
//! guest with disks it can write is stopped when its snapshot is taken, and the stamps of its
//! images carry the snapshot's id.

mod head;
mod read;
#[cfg(test)]
mod tests;
mod write;

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use head::{SavedCpu, SnapshotHead};
pub use read::{SnapshotChecks, SnapshotReader};
pub use write::{Written, write};

use crate::machine::memory::MemoryError;
use crate::protocol::cpu::CpuUnfit;
use crate::wire::WireError;

/// The first bytes of every snapshot file.
pub const MAGIC: [u8; 8] = *b"MCD-SNAP";
/// The version of the form that this build writes and reads.
pub const FILE_VERSION: u16 = 1;
/// Bytes of the preface.
pub const PREFACE_BYTES: usize = 24;
/// No head is longer.
pub const HEAD_BYTES_MAX: usize = 4096;

/// Names a snapshot for all time.
pub use crate::protocol::id::Id as SnapshotId;

/// Why a snapshot cannot be written, read or restored. Each is one line that says what to do.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// The system refused while it was written.
    #[error("cannot {doing} snapshot {} ({reason}): \
        name a file in a directory that is writable and has room", path.display())]
    Write {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// Something that is no file has the name.
    #[error("snapshot {}: what is there is no file; remove it or name another", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The node has no more use for it.
    #[error("snapshot {} was not finished: the node ended or lost the guest meanwhile", path.display())]
    Cancelled {
        /// The file.
        path: PathBuf,
    },
    /// The machine's state has more bytes than any machine.
    #[error("snapshot {}: a machine state of {bytes} bytes is more than the {bytes_max} a snapshot holds; please \
        report this", path.display())]
    StateTooLarge {
        /// The file.
        path: PathBuf,
        /// The state's.
        bytes: u64,
        /// What a snapshot may hold.
        bytes_max: u64,
    },
    /// The system refused while it was read.
    #[error("cannot read snapshot {} ({reason}): look whether it is there and may be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// It is something else.
    #[error("{} is no snapshot of mcd: name a file that `mcd snapshot save` wrote", path.display())]
    NotASnapshot {
        /// The file.
        path: PathBuf,
    },
    /// Another version of mcd wrote it.
    #[error(
        "snapshot {} is of format {}.{}, and this mcd reads {}.{}: \
            restore it with the release of mcd that wrote it", path.display(),
        theirs.0, theirs.1, ours.0, ours.1
    )]
    OtherVersion {
        /// The file.
        path: PathBuf,
        /// Its versions: of the file and of the frames in it.
        theirs: (u16, u16),
        /// This build's.
        ours: (u16, u16),
    },
    /// The file ends too early.
    #[error("snapshot {} was cut off: it ends inside {part}; take another copy of it", path.display())]
    CutOff {
        /// The file.
        path: PathBuf,
        /// Where it ends.
        part: &'static str,
    },
    /// Its content is not what was written.
    #[error("snapshot {} is damaged: {what}; take another copy of it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A page cannot be put into memory.
    #[error("snapshot {}: {reason}", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: MemoryError,
    },
    /// This host's CPU is not one the guest can go on on.
    #[error("snapshot {} was taken on a CPU of {theirs}, and this host, of {ours}, {unfit}", path.display())]
    Cpu {
        /// The file.
        path: PathBuf,
        /// The maker there.
        theirs: String,
        /// The maker here.
        ours: String,
        /// Why it does not fit.
        unfit: CpuUnfit,
    },
    /// The machine's state cannot be restored here.
    #[error("snapshot {}: {reason}", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: Box<crate::machine::MachineError>,
    },
}

impl SnapshotError {
    /// What a frame's error is in a file.
    fn of_frame(path: &Path, error: WireError) -> SnapshotError {
        let path = path.to_owned();
        let what = match error {
            WireError::Closed | WireError::ClosedMidFrame { .. } => {
                return SnapshotError::CutOff { path, part: "its frames" };
            }
            WireError::Io(reason) => return SnapshotError::Read { path, reason },
            WireError::NotMcd { .. } => "no frame begins where one should".to_owned(),
            WireError::OtherVersion { theirs, .. } => format!("a frame is of version {theirs}"),
            WireError::UnknownKind(kind) => format!("a frame is of the unknown kind {kind}"),
            WireError::TooLarge { kind, bytes, .. } => format!("a {kind} frame claims {bytes} bytes"),
            WireError::Damaged { kind, .. } => format!("the check sum of a {kind} frame is wrong"),
            WireError::Malformed { what } => format!("malformed {what}"),
            WireError::Page(error) => error.to_string(),
        };
        SnapshotError::Damaged { path, what }
    }
}
