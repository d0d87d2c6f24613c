//! Which guest is protected, and what its nodes are told about it.

use std::time::Duration;

use mcd::demo::fabric::{GUEST_IPV4, GUEST_PREFIX_LEN};

/// A guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// mcd's own.
    BuiltIn,
}

impl Guest {
    /// The flags that describe its machine to the node that boots it.
    pub fn boot_flags(self) -> String {
        match self {
            Guest::BuiltIn => "--memory 64M".to_owned(),
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
        }
    }
}
