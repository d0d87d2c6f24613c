//! What a vCPU starts with, and what the built-in guest is told of its network: the contract between `boot/` and the machine.
//!
//! `boot/` loads a guest into memory and returns one [`InitialVcpu`] per vCPU that starts at once:
//!
//! ```text
//! boot::builtin::load(ram: &GuestRam, shape: &MachineShape, net: &GuestNet) -> Result<Vec<InitialVcpu>, BootError>
//! ```

use std::net::Ipv4Addr;

use kvm_bindings::{kvm_fpu, kvm_msr_entry, kvm_regs, kvm_sregs};

/// The state a vCPU starts with. vCPUs beyond the end of the list that boot returns wait for an INIT and a SIPI.
#[derive(Clone)]
pub struct InitialVcpu {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables. An `apic_base` of 0 stands for "the vCPU's own".
    pub sregs: kvm_sregs,
    /// Floating point, if it is to differ from the reset state (which is: FCW 0x37F, MXCSR 0x1F80, all else 0).
    pub fpu: Option<kvm_fpu>,
    /// Model-specific registers, written in this order (kvmclock's MSR_KVM_SYSTEM_TIME_NEW is one).
    pub msrs: Vec<kvm_msr_entry>,
}

/// The built-in guest's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestNet {
    /// Its address.
    pub ipv4: Ipv4Addr,
    /// Bits of its network's prefix, at most 32.
    pub prefix_len: u8,
    /// The way out of its network, if it has one.
    pub gateway: Option<Ipv4Addr>,
}
