//! What the host's KVM can give a guest: capabilities, CPUID, MSRs, and a digest by which two hosts
//! are compared.

use std::arch::x86_64::__cpuid_count;
use std::fs::OpenOptions;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::OpenOptionsExt;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use nix::errno::Errno;

use super::Machine;
use super::cpuid::{self, CpuModel, LEAF1_ECX_OSXSAVE, MTRRS};
use super::error::{MachineError, StateError, kvm};
use super::state::vcpu::set_msrs;
use crate::protocol::cpu::HostCpu;

/// Most vCPUs mcd gives a machine.
pub const CPUS_MAX: u8 = 64;

/// IA32_MISC_ENABLE, and its bit for fast string instructions.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRINGS: u64 = 1;
/// The default memory type, and there: on, write-back. What firmware would have set up.
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 0x806;

/// Bytes of the XSAVE area that hold the state of a CPU without AVX.
const XSAVE_LEGACY_BYTES: usize = 4096;

/// What this host can do, asked once per machine.
pub(super) struct HostCaps {
    /// MSRs to save and restore, in the order KVM lists them.
    pub(super) msrs: Vec<u32>,
    /// Bytes of the XSAVE area.
    pub(super) xsave_bytes: usize,
    /// How many of them can hold anything for this guest, and so are saved.
    pub(super) xsave_saved_bytes: usize,
    /// The guest's TSC can be scaled.
    pub(super) tsc_control: bool,
    /// What the guest's CPUID says, but for the vCPU's own number.
    pub(super) cpuid: CpuId,
    /// Most vCPUs.
    pub(super) cpus_max: u8,
    /// Guest-physical addresses have this many bits: the fewer of what the host has and what the
    /// guest is told.
    pub(super) address_bits: u32,
}

/// Leaf that says how wide addresses are, and what it is if a CPU has none.
const LEAF_WIDTHS: u32 = 0x8000_0008;
const ADDRESS_BITS_DEFAULT: u32 = 36;

fn address_bits(cpuid: &CpuId) -> u32 {
    let leaf = cpuid.as_slice().iter().find(|entry| entry.function == LEAF_WIDTHS);
    leaf.map_or(ADDRESS_BITS_DEFAULT, |entry| entry.eax & 0xff)
}

/// The version of the KVM interface, the same for ever.
const KVM_API_VERSION: i32 = 12;

/// Opens /dev/kvm.
pub(super) fn open() -> Result<Kvm, MachineError> {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/kvm")
        .map_err(|e| MachineError::Open { errno: Errno::from_raw(e.raw_os_error().unwrap_or(0)) })?;
    use std::os::fd::FromRawFd;
    // SAFETY: the descriptor was just opened on /dev/kvm and is handed over whole.
    let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
    // The interface's version has been 12 ever since it was declared stable; anything else, or an
    // error (-1), is no KVM.
    if kvm.get_api_version() == KVM_API_VERSION { Ok(kvm) } else { Err(MachineError::NotKvm) }
}

impl HostCaps {
    /// Asks `kvm` what it can give a guest that is shown `model`.
    pub(super) fn ask(kvm_fd: &Kvm, model: CpuModel) -> Result<HostCaps, MachineError> {
        let needed = [
            (Cap::Irqchip, "an in-kernel interrupt controller"),
            (Cap::Pit2, "an in-kernel timer"),
            (Cap::PitState2, "an in-kernel timer whose state can be read"),
            (Cap::ImmediateExit, "immediate_exit"),
            (Cap::Xcrs, "KVM_GET_XCRS"),
            (Cap::Xsave, "KVM_GET_XSAVE"),
            (Cap::VcpuEvents, "KVM_GET_VCPU_EVENTS"),
            (Cap::Debugregs, "KVM_GET_DEBUGREGS"),
            (Cap::AdjustClock, "KVM_SET_CLOCK"),
        ];
        if let Some((_, what)) = needed.iter().find(|(cap, _)| !kvm_fd.check_extension(*cap)) {
            return Err(MachineError::Lacks { what });
        }
        if kvm_fd.check_extension_int(Cap::SyncRegs) & 7 != 7 {
            return Err(MachineError::Lacks { what: "KVM_CAP_SYNC_REGS for registers, sregs and events" });
        }
        let msrs = kvm_fd.get_msr_index_list().map_err(kvm("KVM_GET_MSR_INDEX_LIST"))?;
        let supported = kvm_fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let xsave_bytes = usize::try_from(kvm_fd.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(XSAVE_LEGACY_BYTES);
        let cpuid = model.cpuid(&supported, kvm_fd.check_extension(Cap::TscDeadlineTimer))?;
        Ok(HostCaps {
            address_bits: address_bits(&supported).min(address_bits(&cpuid)),
            msrs: msrs_to_save(kvm_fd, msrs.as_slice())?.into_iter().filter(|index| model.has_msr(*index)).collect(),
            xsave_bytes,
            xsave_saved_bytes: if model == CpuModel::Host { xsave_bytes } else { XSAVE_LEGACY_BYTES },
            tsc_control: kvm_fd.check_extension(Cap::TscControl),
            cpuid,
            cpus_max: u8::try_from(kvm_fd.get_max_vcpus()).unwrap_or(u8::MAX).min(CPUS_MAX),
        })
    }

    /// The CPUID of vCPU `cpu` of `cpus`.
    pub(super) fn cpuid_of(&self, cpu: u8, cpus: u8) -> CpuId {
        let mut cpuid = self.cpuid.clone();
        cpuid::number(&mut cpuid, cpu, cpus);
        cpuid
    }
}

/// The MSRs that KVM lists, and the MTRRs: it keeps these too and does not list them (Linux 6.18).
/// In one order on every kernel.
fn msrs_to_save(kvm_fd: &Kvm, listed: &[u32]) -> Result<Vec<u32>, MachineError> {
    let mut msrs: Vec<u32> = listed.iter().copied().filter(|index| !MTRRS.contains(index)).collect();
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(kvm("KVM_CREATE_VCPU"))?;
    for index in MTRRS {
        let Ok(mut entry) = Msrs::from_entries(&[kvm_msr_entry { index, ..Default::default() }]) else { continue };
        // KVM says how many of them it could read.
        if vcpu.get_msrs(&mut entry).map_err(kvm("KVM_GET_MSRS"))? == 1 {
            msrs.push(index);
        }
    }
    Ok(msrs)
}

/// Sets what firmware would have set in every vCPU before an operating system starts.
pub(super) fn power_on(vcpu: &VcpuFd) -> Result<(), StateError> {
    let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let mut old = Msrs::from_entries(&[msr(MSR_MISC_ENABLE, 0)]).map_err(|_| StateError::Room)?;
    vcpu.get_msrs(&mut old).map_err(kvm("KVM_GET_MSRS"))?;
    let misc = old.as_slice().first().map_or(0, |entry| entry.data);
    set_msrs(vcpu, &[msr(MSR_MISC_ENABLE, misc | FAST_STRINGS), msr(MSR_MTRR_DEFAULT_TYPE, MTRR_ON_WRITE_BACK)])
}

/// A digest of what a guest can see of this host's CPU as `model`: two hosts whose digests differ
/// cannot take over from each other.
///
/// It covers the CPUID that guests are given, the MSRs and the size of the vector state that are
/// saved, and, because some hosts let a guest's user mode execute CPUID unfiltered, the feature
/// leaves of the bare CPU, unless the model is there to hide them. Names and frequencies are left
/// out.
///
/// # Errors
/// [`MachineError::Open`] without /dev/kvm, [`MachineError::Lacks`] or [`MachineError::Kvm`] if it
/// cannot be asked.
pub fn cpu_digest(model: CpuModel) -> Result<u64, MachineError> {
    let caps = HostCaps::ask(&open()?, model)?;
    let mut digest = Digest::new();
    for entry in caps.cpuid.as_slice().iter().filter(|e| !is_name_or_frequency(e.function)) {
        digest.add(&[entry.function, entry.index, entry.eax, entry.ebx, entry.ecx, entry.edx]);
    }
    digest.add(&caps.msrs);
    digest.add(&[caps.xsave_saved_bytes as u32]);
    let bare: &[(u32, u32, [u32; 4])] = if model == CpuModel::Host { &BARE_LEAVES } else { &[] };
    for &(leaf, index, masks) in bare {
        let found = __cpuid_count(leaf, index);
        let words = [found.eax, found.ebx, found.ecx, found.edx];
        for (word, mask) in words.iter().zip(masks) {
            digest.add(&[word & mask]);
        }
    }
    Ok(digest.value)
}

/// What this host can give a guest that is shown `model`: its features, and the speed of its TSC.
///
/// # Errors
/// As [`cpu_digest`].
pub fn host_cpu(model: CpuModel) -> Result<HostCpu, MachineError> {
    let kvm_fd = open()?;
    // Only a vCPU tells the speed of its TSC.
    let vm = kvm_fd.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
    let vcpu = vm.create_vcpu(0).map_err(kvm("KVM_CREATE_VCPU"))?;
    let tsc_khz = vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?;
    Ok(HostCpu { digest: cpu_digest(model)?, tsc_khz, tsc_scales: kvm_fd.check_extension(Cap::TscControl) })
}

/// The name of this host's CPU maker, as CPUID has it: twelve characters.
pub fn cpu_maker() -> [u8; 12] {
    let leaf = __cpuid_count(0, 0);
    let mut name = [0; 12];
    for (bytes, word) in name.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    name
}

impl Machine {
    /// How fast the TSC of the guest in it runs, in kHz: that of the host it was started on.
    pub fn tsc_khz(&self) -> u32 {
        self.vcpus.first().map_or(0, |vcpu| vcpu.slot().state.tsc_khz())
    }

    /// Restores what a machine that never ran saves, with a TSC of `tsc_khz`: what this host's KVM
    /// will not take at a takeover it refuses now. Guest memory is not touched.
    ///
    /// # Errors
    /// As [`Machine::save`] and [`Machine::restore`].
    pub fn rehearse(&mut self, tsc_khz: u32) -> Result<(), MachineError> {
        self.vcpus.iter().for_each(|vcpu| vcpu.slot().state.pretend_tsc(tsc_khz));
        let mut state = Vec::new();
        self.save(&mut state)?;
        self.restore(&state)
    }
}

fn is_name_or_frequency(function: u32) -> bool {
    matches!(function, 0x15 | 0x16 | 0x4000_0010 | 0x8000_0002..=0x8000_0004)
}

/// Leaves of the bare CPU that matter to programs, with masks over EAX to EDX that leave out what
/// differs from core to core.
const BARE_LEAVES: [(u32, u32, [u32; 4]); 6] = [
    (0, 0, [u32::MAX; 4]),
    (1, 0, [u32::MAX, 0xff00, !LEAF1_ECX_OSXSAVE, u32::MAX]),
    (7, 0, [u32::MAX; 4]),
    (0xd, 0, [u32::MAX, 0, u32::MAX, u32::MAX]),
    (0xd, 1, [u32::MAX, 0, u32::MAX, u32::MAX]),
    (0x8000_0001, 0, [u32::MAX; 4]),
];

/// FNV-1a over 32-bit words: the digest tells hosts apart, it does not keep secrets.
struct Digest {
    value: u64,
}

impl Digest {
    fn new() -> Digest {
        Digest { value: 0xcbf2_9ce4_8422_2325 }
    }

    fn add(&mut self, words: &[u32]) {
        for byte in words.iter().flat_map(|w| w.to_le_bytes()) {
            self.value = (self.value ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}
