//! Why a run of watched nodes could not be brought to its end: in the demo, the fault injection,
//! the lab and the tests.

use std::fmt;
use std::io;
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::namespaces::NamespaceError;
use super::nodes::Node;
use crate::control::ClientError;

/// The exit status of what a person interrupts, as shells have it.
const KILLED_BY_SIGINT: u8 = 130;

/// Why a run could not be brought to its end.
#[derive(thiserror::Error)]
pub enum TestbedError {
    /// The network could not be made.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
    /// The system refused something else.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
    /// A node's control socket refused a command, or the connection to it broke.
    #[error("node {name}: {source}")]
    Control {
        /// Which.
        name: String,
        /// What it answered.
        source: ClientError,
    },
    /// A node ended although nobody killed it.
    #[error("node {name} ended by itself ({status})\n--- the last lines of its log:\n{log}")]
    Died {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// The end of its log.
        log: String,
    },
    /// Something did not happen in time.
    #[error("waited {limit_s} s in vain for {what}{logs}")]
    TooLate {
        /// What.
        what: String,
        /// How long it was waited for, in s.
        limit_s: u64,
        /// The ends of the logs.
        logs: String,
    },
    /// A signal came.
    #[error("interrupted; nothing is left behind")]
    Interrupted,
}

/// As [`fmt::Display`], so that a test that unwraps it shows the logs as lines.
impl fmt::Debug for TestbedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TestbedError {
    /// For `map_err`: the system refused `action`.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> TestbedError {
        let action = action.into();
        move |source| TestbedError::Io { action, source }
    }

    /// For a `node` that ended with `status` although nobody killed it.
    pub fn died(node: &Node, status: ExitStatus) -> TestbedError {
        TestbedError::Died { name: node.name().to_owned(), status, log: node.log_tail(16) }
    }

    /// The number for scripts: as for the other commands, and as shells do for a signal.
    pub fn exit_code(&self) -> ExitCode {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        ExitCode::from(match self {
            TestbedError::Namespaces(_) => HOST_LACKS_SOMETHING,
            TestbedError::Interrupted => KILLED_BY_SIGINT,
            _ => FAILURE,
        })
    }
}

/// The first signal asks for an orderly end, a second one ends at once; the nodes die either way.
///
/// # Errors
/// If the system has no room for a handler.
pub fn catch_signals() -> io::Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, i32::from(KILLED_BY_SIGINT), stop.clone())?;
        signal_hook::flag::register(signal, stop.clone())?;
    }
    Ok(stop)
}
