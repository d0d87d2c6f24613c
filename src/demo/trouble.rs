//! What can go wrong where nodes are run to be watched: in the demo, the failure-injection harness
//! and the lab.

use std::io;
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::namespaces::NamespaceError;
use super::nodes::Node;

/// The exit status of what a person interrupts, as shells have it.
const KILLED_BY_SIGINT: u8 = 130;

/// Why a run could not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum Trouble {
    /// The network could not be made.
    #[error(transparent)]
    Namespaces(#[from] NamespaceError),
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

impl Trouble {
    /// For `map_err`: the system refused `action`.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Trouble {
        let action = action.into();
        move |source| Trouble::Io { action, source }
    }

    /// `node` ended with `status`.
    pub fn died(node: &Node, status: ExitStatus) -> Trouble {
        Trouble::Died { name: node.name().to_owned(), status, log: node.log_tail(16) }
    }

    /// The number for scripts: as for the other commands, and as shells do for a signal.
    pub fn exit_code(&self) -> ExitCode {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        ExitCode::from(match self {
            Trouble::Namespaces(_) => HOST_LACKS_SOMETHING,
            Trouble::Interrupted => KILLED_BY_SIGINT,
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
