//! Why a Linux guest could not be put into memory, in one line each.

use std::path::PathBuf;

use thiserror::Error;

use crate::machine::memory::MemoryError;

/// Why a Linux guest could not be put into memory.
#[derive(Debug, Error)]
pub enum LinuxError {
    /// A file could not be read.
    #[error("cannot read {path} ({reason}): check --{flag}")]
    Read {
        /// The flag that named it: `kernel` or `initrd`.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: std::io::Error,
    },
    /// A file that is larger than any of its kind.
    #[error("--{flag} {path} has {bytes} bytes, more than {most}: this is no file of that kind")]
    FileTooLarge {
        /// The flag that named it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
        /// The most such a file may have.
        most: u64,
    },
    /// A file that is empty.
    #[error("--{flag} {path} is empty: give the whole file")]
    Empty {
        /// The flag that named it.
        flag: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// The file is no kernel.
    #[error("--kernel is neither a bzImage nor a vmlinux: give a distribution's vmlinuz, or a vmlinux in ELF form")]
    NotAKernel,
    /// The kernel is for another kind of CPU.
    #[error("--kernel is a kernel for {what}: an x86-64 kernel is needed")]
    Architecture {
        /// What it is for.
        what: String,
    },
    /// A bzImage of a boot protocol that is too old.
    #[error(
        "--kernel speaks boot protocol {major}.{minor:02}, 2.12 or later is needed: take a kernel of the last ten years"
    )]
    Protocol {
        /// The protocol's major number.
        major: u8,
        /// The protocol's minor number.
        minor: u8,
    },
    /// A compression that cannot be unpacked here.
    #[error("--kernel is packed with {what}: gzip, xz, zstd and lz4 can be unpacked, or give the vmlinux itself")]
    Packing {
        /// Which.
        what: String,
    },
    /// A kernel file that makes no sense.
    #[error("--kernel is damaged ({what}): copy it again")]
    Damaged {
        /// What is wrong.
        what: String,
    },
    /// The kernel does not fit below the hole.
    #[error("--kernel takes guest memory up to {needed} bytes and there are {given} below 3 GiB: give more --memory")]
    KernelTooLarge {
        /// Where the kernel ends.
        needed: u64,
        /// How much RAM there is below the hole.
        given: u64,
    },
    /// The initrd does not fit.
    #[error(
        "--initrd has {bytes} bytes and there is room for {room} behind the kernel: \
            give more --memory or a smaller initrd"
    )]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// The room there is.
        room: u64,
    },
    /// The initrd changed while it was read.
    #[error("--initrd {path} became shorter while it was read: let nothing write to it")]
    InitrdChanged {
        /// The file.
        path: PathBuf,
    },
    /// A command line the kernel would cut off.
    #[error("--append has {bytes} bytes and this kernel takes {most}: make it shorter")]
    AppendTooLong {
        /// Its length.
        bytes: usize,
        /// The most this kernel takes.
        most: usize,
    },
    /// A command line that cannot be handed over.
    #[error("--append holds a control character: write it as one line of plain text")]
    AppendText,
    /// More than the ACPI tables have room for.
    #[error(
        "the ACPI tables of {cpus} vCPUs and {devices} devices take {bytes} bytes, more than their {room}: \
            fewer devices are needed"
    )]
    Tables {
        /// The machine's vCPUs.
        cpus: u8,
        /// The machine's virtio devices.
        devices: usize,
        /// What the tables take.
        bytes: usize,
        /// What there is.
        room: usize,
    },
    /// Guest memory did not take it.
    #[error("the kernel does not fit into memory: {0}")]
    Memory(#[from] MemoryError),
}

impl LinuxError {
    /// A damaged kernel file.
    pub(super) fn damaged(what: impl Into<String>) -> LinuxError {
        LinuxError::Damaged { what: what.into() }
    }
}
