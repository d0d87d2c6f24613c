//! How `mcd` ends: a number for scripts, the same for every command.

use std::process::ExitCode;

use crate::checkpoint::snapshot::SnapshotError;
use crate::machine::{BootError, MachineError};
use crate::node::{DiskError, NodeError};

/// Defines the exit codes, the list of all of them and the part of `--help` about them, which can
/// not differ that way.
macro_rules! exit_codes {
    ($($name:ident = $code:literal, $meaning:literal;)*) => {
        /// The exit codes of `mcd`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum ExitStatus {
            $(#[doc = $meaning] $name = $code,)*
        }

        impl ExitStatus {
            /// All exit codes, by number. `docs/operating/reference.md` has an entry for each.
            pub const ALL: &[ExitStatus] = &[$(ExitStatus::$name,)*];
        }

        /// The part of `--help` about exit codes.
        pub(super) const HELP: &str = concat!("Exit codes:", $("\n  ", $code, "  ", $meaning,)*);
    };
}

exit_codes! {
    Ok = 0, "done; a node ended because it was told to";
    Failure = 1, "something failed at run time: see the line on stderr";
    Usage = 2, "a flag, a key or a value is wrong; nothing was started";
    Host = 3, "this host lacks something: /dev/kvm, the tap device, a permission, memory";
    Refused = 4, "the peer or the arbiter refused: another guest or version, a guest that runs elsewhere";
    Fenced = 5, "the node lost the guest to the other node and fenced itself";
    Restart = 6, "the guest asked to be restarted: start the node again";
}

impl ExitStatus {
    /// What a snapshot's error is to a script: like a bad `--kernel`, the file that a flag names is
    /// not what it should be.
    pub(super) fn of_snapshot(error: &SnapshotError) -> ExitStatus {
        match error {
            SnapshotError::Cpu { .. } | SnapshotError::Machine { .. } | SnapshotError::Memory { .. } => {
                ExitStatus::Host
            }
            _ => ExitStatus::Usage,
        }
    }

    /// What a node's error is to a script.
    pub(super) fn of(error: &NodeError) -> ExitStatus {
        match error {
            NodeError::Disk(
                DiskError::Refused { .. }
                | DiskError::OtherGuest { .. }
                | DiskError::Unknown { .. }
                | DiskError::NotOfSnapshot { .. },
            ) => ExitStatus::Refused,
            // The files named by --disk, --kernel and --initrd, or their size against --memory.
            NodeError::Disk(DiskError::NotRaw { .. } | DiskError::Compressed { .. }) => ExitStatus::Usage,
            NodeError::Disk(_) => ExitStatus::Host,
            NodeError::Machine(MachineError::Boot(BootError::Linux(_))) => ExitStatus::Usage,
            NodeError::Machine(MachineError::Boot(_)) => ExitStatus::Failure,
            NodeError::Machine(_) | NodeError::Tap(_) | NodeError::NoMachine(_) | NodeError::Thread(_) => {
                ExitStatus::Host
            }
            NodeError::Snapshot(error) => ExitStatus::of_snapshot(error),
            NodeError::RunsElsewhere { .. } | NodeError::Refused(_) | NodeError::NotAPrimary(_) => ExitStatus::Refused,
            _ => ExitStatus::Failure,
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> ExitCode {
        ExitCode::from(status as u8)
    }
}

/// Why a command did not do what was asked: the line for a person, and the number for a script.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) status: ExitStatus,
    pub(super) line: String,
}

impl Failure {
    /// Something in the flags or the file is wrong.
    pub(super) fn usage(line: impl Into<String>) -> Failure {
        Failure { status: ExitStatus::Usage, line: line.into() }
    }

    /// Something failed at run time.
    pub(super) fn run(line: impl Into<String>) -> Failure {
        Failure { status: ExitStatus::Failure, line: line.into() }
    }
}
