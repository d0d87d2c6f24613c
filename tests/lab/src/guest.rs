//! Which guest is protected, and what its nodes are told about it.

use std::time::Duration;

use mcd::demo::fabric::{GUEST_IPV4, GUEST_PREFIX_LEN};

use crate::image::{GUEST_INITRD, GUEST_KERNEL};

/// A guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// mcd's own.
    BuiltIn,
    /// Debian's unmodified cloud kernel with a redis-server, and so many processors.
    Linux {
        /// Its processors.
        cpus: u8,
    },
}

impl Guest {
    /// The flags that describe its machine to the node that boots it.
    pub fn boot_flags(self) -> String {
        match self {
            Guest::BuiltIn => "--memory 64M".to_owned(),
            Guest::Linux { cpus } => {
                let append = format!("console=ttyS0 panic=-1 mitigations=off lab.ip={GUEST_IPV4}/{GUEST_PREFIX_LEN}");
                format!(
                    "--memory 192M --cpus {cpus} --kernel {GUEST_KERNEL} --initrd {GUEST_INITRD} --append \"{append}\""
                )
            }
        }
    }

    /// The flags that both of its nodes are given.
    pub fn node_flags(self) -> String {
        format!("--guest-ip {GUEST_IPV4}/{GUEST_PREFIX_LEN}")
    }

    /// How long it may take to boot and serve.
    pub fn boot_limit(self) -> Duration {
        match self {
            Guest::BuiltIn => Duration::from_secs(60),
            Guest::Linux { .. } => Duration::from_secs(240),
        }
    }
}
