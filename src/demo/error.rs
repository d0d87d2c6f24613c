//! Why a demo could not be brought to its end.

use std::io;
use std::process::{ExitCode, ExitStatus};

use super::fabric::FabricError;
use super::nodes::Node;

/// Why a demo could not be brought to its end. Whether a client noticed something is another question: see
/// [`super::report::Report::ok`].
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// The network could not be made.
    #[error(transparent)]
    Fabric(#[from] FabricError),
    /// There is no KVM to use.
    #[error(
        "cannot open /dev/kvm: {0}: this needs a Linux host with KVM, and a user who may use it (root, or the group kvm)"
    )]
    NoKvm(io::Error),
    /// The system refused something else.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: io::Error,
    },
    /// A node ended although nobody killed it.
    #[error("node {name} ended by itself ({status})\n--- the last lines of its log:\n{log}")]
    Died {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// What it said last.
        log: String,
    },
    /// Something did not happen in time.
    #[error("waited {limit_s} s in vain for {what}{logs}")]
    TooLate {
        /// What.
        what: String,
        /// How long it was waited for, in s.
        limit_s: u64,
        /// What the nodes said last.
        logs: String,
    },
    /// The primary was fenced: the other node has the guest.
    #[error(
        "the primary stood still, was given up by its secondary and is fenced, and nothing could be done about it here"
    )]
    Fenced,
    /// The guest died with its host.
    #[error(
        "the guest is lost: in the instant before it was killed the primary had lost sight of the secondary and gone on alone. This          machine is too busy for the demo\n--- the last lines of {name}'s log:\n{log}"
    )]
    Lost {
        /// The node that should have taken over.
        name: String,
        /// What it said last.
        log: String,
    },
    /// The primary is gone and there is no other node.
    #[error("the primary is gone and there was no secondary to take over")]
    NoSecondary,
    /// A signal came.
    #[error("interrupted; nothing is left behind")]
    Interrupted,
}

impl DemoError {
    /// For `map_err`: the system refused `action`.
    pub(super) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> DemoError {
        let action = action.into();
        move |source| DemoError::Io { action, source }
    }

    /// `node` ended with `status`.
    pub(super) fn died(node: &Node, status: ExitStatus) -> DemoError {
        DemoError::Died { name: node.name().to_owned(), status, log: node.log_tail(12) }
    }

    /// `heir` has given up its image.
    pub(super) fn lost(heir: &Node) -> DemoError {
        DemoError::Lost { name: heir.name().to_owned(), log: heir.log_tail(12) }
    }

    /// The number for scripts: as for the other commands, and as shells do for a signal.
    pub fn exit_code(&self) -> ExitCode {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        const KILLED_BY_SIGINT: u8 = 130;
        ExitCode::from(match self {
            DemoError::Fabric(_) | DemoError::NoKvm(_) => HOST_LACKS_SOMETHING,
            DemoError::Interrupted => KILLED_BY_SIGINT,
            _ => FAILURE,
        })
    }
}
