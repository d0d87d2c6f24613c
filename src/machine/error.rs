//! What can go wrong with a machine.

use nix::errno::Errno;
use thiserror::Error;

use super::boot::BootError;
use super::memory::MemoryError;
use super::state::FormatError;

/// A call to KVM that failed.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{call} failed: {errno}")]
pub struct KvmError {
    /// The call.
    pub call: &'static str,
    /// What the kernel said.
    pub errno: Errno,
}

/// Makes a [`KvmError`] of what kvm-ioctls returns.
pub(super) fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |error| KvmError { call, errno: Errno::from_raw(error.errno()) }
}

/// Why a vCPU's or a device's state could not be saved or restored.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum StateError {
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The bytes are no state of this machine.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// An MSR could not be read or written; KVM stops at the first.
    #[error("KVM refused to {call} MSR {index:#x}: the two hosts' kernels or CPUs differ")]
    Msr {
        /// `read` or `write`.
        call: &'static str,
        /// The MSR.
        index: u32,
    },
    /// The saved TSC frequency is not the host's.
    #[error(
        "the guest's TSC runs at {saved_khz} kHz, this host's at {host_khz} kHz and cannot be scaled: use equal hosts"
    )]
    Tsc {
        /// The guest's, in kHz.
        saved_khz: u32,
        /// This host's, in kHz.
        host_khz: u32,
    },
    /// More registers than the kernel's interface can carry.
    #[error("this host's CPU state is larger than the KVM interface carries")]
    Room,
}

/// What can go wrong with a machine.
#[derive(Debug, Error)]
pub enum MachineError {
    /// /dev/kvm could not be opened.
    #[error("cannot open /dev/kvm ({errno}): load the kvm module, or give this user access to it")]
    Open {
        /// What the kernel said.
        errno: Errno,
    },
    /// Something else has the name.
    #[error("/dev/kvm is not KVM: load the kvm module, or give this container the host's device")]
    NotKvm,
    /// The host's KVM lacks something a machine cannot do without.
    #[error("this host's KVM lacks {what}: a newer kernel is needed")]
    Lacks {
        /// What it lacks.
        what: &'static str,
    },
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The machine cannot have this many vCPUs.
    #[error("a machine has 1 to {max} vCPUs, not {cpus}")]
    Cpus {
        /// What was asked for.
        cpus: u8,
        /// The most this host and mcd can do.
        max: u8,
    },
    /// Not the disks of the machine's shape.
    #[error("the guest has {wanted} disks (6 at most) and this node was given {given}: name an image for each")]
    Disks {
        /// How many the shape has.
        wanted: usize,
        /// How many backends there are.
        given: usize,
    },
    /// A disk of another size than the machine's shape says.
    #[error(
        "disk {number} of the guest has {wanted_bytes} bytes, this node's image {given_bytes}: \
            give one of the same size"
    )]
    DiskSize {
        /// The disk, from 0.
        number: usize,
        /// Its size in the shape.
        wanted_bytes: u64,
        /// The backend's size.
        given_bytes: u64,
    },
    /// More memory than the CPU can address.
    #[error("guest memory of {bytes} bytes ends above what this CPU addresses with {bits} bits: give it less")]
    AddressBits {
        /// The memory asked for, in bytes.
        bytes: u64,
        /// Bits of a guest-physical address.
        bits: u32,
    },
    /// The guest could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// State could not be saved or restored.
    #[error("{part}: {error}")]
    State {
        /// Which part of the machine.
        part: String,
        /// Why.
        error: StateError,
    },
    /// The operation needs a paused machine.
    #[error("the machine must be paused to {what}")]
    Running {
        /// The operation.
        what: &'static str,
    },
    /// A restore failed half way; what the machine holds is of no guest.
    #[error("the machine cannot run: its last restore failed, restore a whole state first")]
    HalfRestored,
    /// Something did not stop within the limit of a pause; the guest runs on.
    #[error("{what} did not stop within {waited_ms} ms: the host or its storage is stalled, or a backend blocks")]
    PauseTimedOut {
        /// `vCPU 2`, `disk 0`, `the network card`.
        what: String,
        /// How long it was waited for, in milliseconds.
        waited_ms: u64,
    },
    /// A pause was aborted; the guest runs on.
    #[error("the pause was aborted after {waited_ms} ms, when {what} had not stopped")]
    PauseAborted {
        /// What the pause was waiting for, as in [`MachineError::PauseTimedOut`].
        what: String,
        /// How long it had waited, in milliseconds.
        waited_ms: u64,
    },
    /// A stopped vCPU did not carry out an order in time.
    #[error("vCPU {cpu} did not {what} within {limit_s} s: the host is stalled")]
    Stuck {
        /// The vCPU.
        cpu: u16,
        /// What it was to do.
        what: &'static str,
        /// How long it was waited for, in seconds.
        limit_s: u64,
    },
    /// A thread or an event descriptor could not be made.
    #[error("cannot start {what} ({reason}): the host is out of resources")]
    Start {
        /// What.
        what: &'static str,
        /// Why.
        reason: std::io::Error,
    },
}
