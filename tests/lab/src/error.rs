//! Why a lab could not be built or a scenario not be brought to its end.

use std::io;
use std::process::ExitCode;

use mcd::control::ClientError;
use mcd::testbed::error::TestbedError;
use mcd::testbed::namespaces::NamespaceError;

/// Why a lab could not be built or a scenario not be brought to its end.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// As wherever nodes are run to be watched.
    #[error(transparent)]
    Run(#[from] TestbedError),
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
}

impl From<NamespaceError> for LabError {
    fn from(error: NamespaceError) -> LabError {
        TestbedError::from(error).into()
    }
}

impl LabError {
    /// For `map_err`: the system refused `action`.
    pub fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
        let error = TestbedError::io(action);
        move |source| error(source).into()
    }

    /// The number for scripts, as for `mcd demo`.
    pub fn exit_code(&self) -> ExitCode {
        const FAILURE: u8 = 1;
        const HOST_LACKS_SOMETHING: u8 = 3;
        match self {
            LabError::Run(error) => error.exit_code(),
            LabError::Missing(_) | LabError::Kernel { .. } => ExitCode::from(HOST_LACKS_SOMETHING),
            _ => ExitCode::from(FAILURE),
        }
    }
}
