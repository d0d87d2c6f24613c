//! What puts a guest into a new machine's memory and says how its vCPUs start.

pub mod builtin;
pub mod linux;
mod long_mode;
mod tables;

use thiserror::Error;

use crate::machine::memory::MemoryError;

/// Why a guest could not be put into memory.
#[derive(Debug, Error)]
pub enum BootError {
    /// Too little guest memory.
    #[error("the built-in guest needs at least {needed} bytes of memory, not {given}: give it more")]
    MemoryTooSmall {
        /// The least it runs with.
        needed: u64,
        /// What the machine has.
        given: u64,
    },
    /// More guest memory than the page tables made here can map.
    #[error("the built-in guest can use at most {most} bytes of memory, not {given}: give it less")]
    MemoryTooLarge {
        /// The most it can use.
        most: u64,
        /// What the machine has.
        given: u64,
    },
    /// A number of vCPUs the built-in guest does not start with.
    #[error("the built-in guest runs on 1 to {most} vCPUs, not on {given}: change the number")]
    Cpus {
        /// The most it runs on.
        most: u8,
        /// What the machine has.
        given: u8,
    },
    /// The embedded image is not what the build should have made.
    #[error("the built-in guest's image is damaged ({reason}): build mcd again")]
    Image {
        /// What is wrong with it.
        reason: String,
    },
    /// The host gave no random number.
    #[error("no random number for the built-in guest ({reason}): the host's random source must work")]
    Random {
        /// What the host said.
        reason: String,
    },
    /// A Linux guest.
    #[error(transparent)]
    Linux(#[from] linux::LinuxError),
    /// Guest memory did not take it.
    #[error("the built-in guest does not fit into memory: {0}")]
    Memory(#[from] MemoryError),
}
