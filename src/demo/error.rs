//! Why a demo could not be brought to its end.

use std::io;
use std::process::ExitCode;

use crate::testbed::error::TestbedError;
use crate::testbed::nodes::Node;

/// Why a demo could not be brought to its end. Whether a client noticed something is another
/// question: see [`super::report::Report::ok`].
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// As wherever nodes are run to be watched.
    #[error(transparent)]
    Run(#[from] TestbedError),
    /// There is no KVM to use.
    #[error(
        "cannot open /dev/kvm: {0}: this needs a Linux host with KVM, and a user who may use it (root, \
            or the group kvm)"
    )]
    NoKvm(io::Error),
    /// The primary was fenced: the other node has the guest.
    #[error(
        "the primary was frozen, was given up by its secondary and is fenced, and nothing could be done about it here"
    )]
    Fenced,
    /// The guest died with its host.
    #[error(
        "the guest is lost: in the instant before it was killed the primary had lost sight of the secondary and gone \
            on alone. This machine is too busy for the demo\n--- the last lines of {name}'s log:\n{log}"
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
}

impl DemoError {
    /// For `map_err`: the system refused `action`.
    pub(super) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> DemoError {
        let error = TestbedError::io(action);
        move |source| error(source).into()
    }

    /// `new_primary` has given up its image.
    pub(super) fn lost(new_primary: &Node) -> DemoError {
        DemoError::Lost { name: new_primary.name().to_owned(), log: new_primary.log_tail(12) }
    }

    /// The number for scripts.
    pub fn exit_code(&self) -> ExitCode {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        match self {
            DemoError::Run(error) => error.exit_code(),
            DemoError::NoKvm(_) => ExitCode::from(HOST_LACKS_SOMETHING),
            _ => ExitCode::from(FAILURE),
        }
    }
}
