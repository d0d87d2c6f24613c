//! Why a lab could not be built or a scenario not be brought to its end.

use std::io;

use mcd::control::ClientError;
use mcd::demo::namespaces::NamespaceError;

/// Why a lab could not be built or a scenario not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
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
    /// Something that `make setup-lab` brings is not there.
    #[error("{0} is missing: run `make setup-lab`")]
    Missing(String),
    /// A kernel or a module is not as expected.
    #[error("the kernel in {kernel}: {what}")]
    Kernel {
        /// Where it is.
        kernel: String,
        /// What is wrong.
        what: String,
    },
    /// Something did not happen in time.
    #[error("waited {limit_s} s in vain for {what}{last}")]
    TooLate {
        /// What.
        what: String,
        /// How long it was waited for, in s.
        limit_s: u64,
        /// What was heard last.
        last: String,
    },
    /// A host's QEMU ended although nobody cut its power.
    #[error("host {host} is gone: its QEMU ended by itself{last}")]
    HostGone {
        /// Which.
        host: String,
        /// What it said last.
        last: String,
    },
    /// A command in a host failed.
    #[error("on host {host}: `{command}` ended with {code}: {output}")]
    Command {
        /// Which host.
        host: String,
        /// What was run.
        command: String,
        /// Its exit status.
        code: i32,
        /// What it printed.
        output: String,
    },
    /// A host's shell, node or monitor does not speak as expected.
    #[error("host {host}: {what}")]
    Garbled {
        /// Which host.
        host: String,
        /// What was wrong.
        what: String,
    },
    /// QEMU's monitor refused.
    #[error("QEMU's monitor of host {host}: {source}")]
    Monitor {
        /// Which host.
        host: String,
        /// What it said.
        source: ClientError,
    },
    /// What a scenario must show was not so.
    #[error("{0}")]
    Wrong(String),
    /// A signal came.
    #[error("interrupted; nothing is left behind")]
    Interrupted,
}

impl LabError {
    /// For `map_err`: the system refused `action`.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
        let action = action.into();
        move |source| LabError::Io { action, source }
    }

    /// The number for scripts, as for `mcd demo`.
    pub fn exit_code(&self) -> u8 {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        const KILLED_BY_SIGINT: u8 = 130;
        match self {
            LabError::Namespaces(_) | LabError::Missing(_) | LabError::Kernel { .. } => HOST_LACKS_SOMETHING,
            LabError::Interrupted => KILLED_BY_SIGINT,
            _ => FAILURE,
        }
    }
}
