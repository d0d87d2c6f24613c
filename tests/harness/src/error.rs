//! Why a run could not be brought to its end. What a run found is in its report.

use std::io;
use std::process::{ExitCode, ExitStatus};

use mcd::demo::fabric::FabricError;

/// Why a run could not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    /// The network could not be made.
    #[error(transparent)]
    Fabric(#[from] FabricError),
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
    /// A signal came.
    #[error("interrupted; nothing is left behind")]
    Interrupted,
}

impl HarnessError {
    /// For `map_err`: the system refused `action`.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> HarnessError {
        let action = action.into();
        move |source| HarnessError::Io { action, source }
    }

    /// The number for scripts, as for `mcd demo`.
    pub fn exit_code(&self) -> ExitCode {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        const KILLED_BY_SIGINT: u8 = 130;
        ExitCode::from(match self {
            HarnessError::Fabric(_) => HOST_LACKS_SOMETHING,
            HarnessError::Interrupted => KILLED_BY_SIGINT,
            _ => FAILURE,
        })
    }
}
