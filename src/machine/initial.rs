//! What a vCPU starts with, and what the built-in guest is told of its network: the contract
//! between `boot/` and the machine.
//!
//! `boot/` loads a guest into memory and returns one [`InitialVcpu`] per vCPU that starts at once:
//!
//! ```text
//! boot::builtin::load(ram: &GuestRam, shape: &MachineShape, net: &GuestNet) -> Result<Vec<InitialVcpu>, BootError>
//! ```

use std::net::Ipv4Addr;

use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_fpu, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;

use super::error::{StateError, kvm};
use super::state::vcpu::set_msrs;

/// The state a vCPU starts with. vCPUs beyond the end of the list that boot returns wait for an
/// INIT and a SIPI.
#[derive(Clone)]
pub struct InitialVcpu {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, descriptor tables. An `apic_base` of 0 stands for "the vCPU's
    /// own".
    pub sregs: kvm_sregs,
    /// Floating point, if it is to differ from the reset state (which is: FCW 0x37F, MXCSR 0x1F80,
    /// all else 0).
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

/// Puts a first state into a vCPU. Called from its thread.
pub(super) fn apply(initial: &InitialVcpu, vcpu: &VcpuFd) -> Result<(), StateError> {
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(kvm("KVM_SET_MP_STATE"))?;
    vcpu.set_regs(&initial.regs).map_err(kvm("KVM_SET_REGS"))?;
    let mut sregs = initial.sregs;
    if sregs.apic_base == 0 {
        sregs.apic_base = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?.apic_base;
    }
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    if let Some(fpu) = &initial.fpu {
        vcpu.set_fpu(fpu).map_err(kvm("KVM_SET_FPU"))?;
    }
    set_msrs(vcpu, &initial.msrs)
}
