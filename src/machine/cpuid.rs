//! The CPU a guest is shown: the host's, freed of what cannot be saved, or a model that many hosts
//! have.
//!
//! Two nodes can only be a pair if a guest sees the same CPU on both. [`CpuModel::Host`] gives it
//! everything the host has, which needs equal hosts; [`CpuModel::Baseline`] gives it what any
//! server CPU of the same maker of the last ten years has.
//!
//! What no guest gets: virtualisation of its own (VMX, SVM: nested state), KVM's asynchronous page
//! faults (tokens in flight), SGX (memory that cannot be read), processor trace, and KVM's features
//! that need a part of the VMM which is not there.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use super::error::{KvmError, MachineError};

/// Which CPU a guest is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuModel {
    /// Everything the host's CPU has and that can be saved: for hosts with equal CPUs.
    #[default]
    Host,
    /// The x86-64-v2 instructions (SSE4.2, POPCNT, CMPXCHG16B; no AVX) and a fixed family and
    /// model: for hosts whose CPUs have the same maker.
    Baseline,
}

/// Leaf of KVM's paravirtual features.
const LEAF_KVM_FEATURES: u32 = 0x4000_0001;
/// What is taken out of it: asynchronous page faults (4, 10, 14), wide message-signalled interrupts
/// (15) and migration control (17), which need more of a VMM than there is.
const KVM_FEATURES_NO: u32 = 1 << 4 | 1 << 10 | 1 << 14 | 1 << 15 | 1 << 17;
/// What the baseline leaves in it: kvmclock (0, 3, 24), the I/O delay (1), steal time (5), the
/// end-of-interrupt hint (6) and polling (12): all that Debian's kernels of the last ten years know
/// of and both makers' KVM has.
const KVM_FEATURES_BASELINE: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 24;

/// Leaf 1, ECX.
const LEAF1_ECX_VMX: u32 = 1 << 5;
/// KVM emulates the TSC-deadline timer but does not list it.
const LEAF1_ECX_TSC_DEADLINE: u32 = 1 << 24;
/// CR4.OSXSAVE mirrored: says what the guest's kernel did, not what the CPU can.
pub(super) const LEAF1_ECX_OSXSAVE: u32 = 1 << 27;
/// There is a hypervisor to be asked, at leaf 0x4000_0000.
const LEAF1_ECX_HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the counts of processors mean something.
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Leaf 7, EBX: SGX and processor trace.
const LEAF7_EBX_NO: u32 = 1 << 2 | 1 << 25;
/// Leaf 7, ECX: launch control of SGX.
const LEAF7_ECX_NO: u32 = 1 << 30;
/// Leaf 0x8000_0001, ECX: SVM, and the monitoring that goes with it.
const LEAF8001_ECX_NO: u32 = 1 << 2;

/// Leaf 1 of the baseline. EAX: a family of each maker that kernels know and have no exceptions
/// for.
const BASELINE_INTEL_SIGNATURE: u32 = 0x0f61;
const BASELINE_AMD_SIGNATURE: u32 = 0x0006_0fb1;
/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, x2APIC, POPCNT, TSC deadline, hypervisor.
const BASELINE_LEAF1_ECX: u32 =
    1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 21 | 1 << 23 | LEAF1_ECX_TSC_DEADLINE | LEAF1_ECX_HYPERVISOR;
/// All but thermal control, debug store, serial number and the like: FPU to CMOV (without VME's
/// neighbours that hang on a model), CLFLUSH, MMX, FXSR, SSE, SSE2, HTT.
const BASELINE_LEAF1_EDX: u32 = 0x178b_fbff;
/// LAHF, legacy CR8.
const BASELINE_LEAF8001_ECX: u32 = 1 | 1 << 4;
/// SYSCALL, NX, long mode.
const BASELINE_LEAF8001_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29;
/// Leaf 0x8000_0001, EDX: AMD repeats leaf 1's here.
const LEAF8001_EDX_REPEATED: u32 = 0x0183_f3ff;
/// The highest plain and extended leaves of the baseline.
const BASELINE_LEAF_MAX: u32 = 0xb;
const BASELINE_EXTENDED_LEAF_MAX: u32 = 0x8000_0008;
/// Address widths of the baseline: 40 bits physical (1 TiB), 48 bits virtual.
const BASELINE_WIDTHS: u32 = 48 << 8 | 40;
/// The baseline's name, as leaves 0x8000_0002 to 4 have it.
const BASELINE_NAME: &[u8; 48] = b"mcd baseline CPU (x86-64-v2)\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// Which memory has which caching: the default, eight ranges (base and mask), and the first MiB in
/// pieces. Every model says that it has them.
pub(super) const MTRRS: [u32; 28] = [
    0x2ff, 0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e,
    0x20f, 0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

/// The MSRs of the baseline: what every KVM saves for such a CPU. All others are those of features
/// that it does not have.
const BASELINE_MSRS: [u32; 20] = [
    0x10,  // time stamp counter
    0x174, // SYSENTER
    0x175,
    0x176,
    0x1a0, // miscellaneous features
    0x277, // page attributes
    0x6e0, // TSC deadline
    0x11,  // kvmclock, old numbers
    0x12,
    0x4b56_4d00, // kvmclock
    0x4b56_4d01,
    0x4b56_4d03, // steal time
    0x4b56_4d04, // end-of-interrupt hint
    0xc000_0081, // SYSCALL
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102, // kernel GS base
    0x17a,       // machine check status
    0x17b,       // machine check control
];

/// First word of the makers' names in leaf 0, EBX.
const AMD: u32 = u32::from_le_bytes(*b"Auth");

impl CpuModel {
    /// The name on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::Host => "host",
            CpuModel::Baseline => "baseline",
        }
    }

    /// Whether an MSR of the host's list is part of this CPU's state.
    pub(super) fn has_msr(self, index: u32) -> bool {
        match self {
            CpuModel::Host => true,
            CpuModel::Baseline => BASELINE_MSRS.contains(&index) || MTRRS.contains(&index),
        }
    }

    /// The CPUID of this model on a host whose KVM supports `supported`, but for what differs from
    /// vCPU to vCPU.
    ///
    /// # Errors
    /// [`MachineError::Kvm`] if there are more leaves than KVM takes.
    pub(super) fn cpuid(self, supported: &CpuId, has_deadline_timer: bool) -> Result<CpuId, MachineError> {
        let mut entries: Vec<kvm_cpuid_entry2> = supported.as_slice().to_vec();
        let is_amd = entries.iter().any(|e| e.function == 0 && e.ebx == AMD);
        for entry in &mut entries {
            free_of_the_unsavable(entry, has_deadline_timer);
        }
        if self == CpuModel::Baseline {
            entries.retain(|e| is_baseline_leaf(e.function));
            entries.iter_mut().for_each(|entry| reduce(entry, is_amd));
        }
        add_topology(&mut entries);
        CpuId::from_entries(&entries)
            .map_err(|_| KvmError { call: "KVM_SET_CPUID2", errno: nix::errno::Errno::E2BIG }.into())
    }
}

/// Takes out what depends on the CPU that was asked, and what cannot be saved.
fn free_of_the_unsavable(entry: &mut kvm_cpuid_entry2, has_deadline_timer: bool) {
    match entry.function {
        1 => {
            // EBX: brand index and CLFLUSH size stay; APIC id and count are the asked CPU's.
            entry.ebx &= 0xffff;
            entry.ecx &= !(LEAF1_ECX_OSXSAVE | LEAF1_ECX_VMX);
            entry.ecx |= LEAF1_ECX_HYPERVISOR;
            if has_deadline_timer {
                entry.ecx |= LEAF1_ECX_TSC_DEADLINE;
            }
        }
        7 if entry.index == 0 => {
            entry.ebx &= !LEAF7_EBX_NO;
            entry.ecx &= !LEAF7_ECX_NO;
        }
        // SGX, processor trace, SVM.
        0x12 | 0x14 | 0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => entry.ecx &= !LEAF8001_ECX_NO,
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        LEAF_KVM_FEATURES => entry.eax &= !KVM_FEATURES_NO,
        _ => {}
    }
}

fn is_baseline_leaf(function: u32) -> bool {
    matches!(function, 0 | 1 | 4 | 0x4000_0000..=0x4000_0001 | 0x8000_0000..=0x8000_0008)
}

/// Takes a leaf down to the baseline. What the host lacks stays lacking, and shows in the digest.
fn reduce(entry: &mut kvm_cpuid_entry2, is_amd: bool) {
    match entry.function {
        0 => entry.eax = BASELINE_LEAF_MAX,
        1 => {
            entry.eax = if is_amd { BASELINE_AMD_SIGNATURE } else { BASELINE_INTEL_SIGNATURE };
            // CLFLUSH size; the brand index is the host's.
            entry.ebx &= 0xff00;
            entry.ecx &= BASELINE_LEAF1_ECX;
            entry.edx &= BASELINE_LEAF1_EDX;
        }
        // Caches: sizes are the host's, so guests are told of none.
        4 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        LEAF_KVM_FEATURES => entry.eax &= KVM_FEATURES_BASELINE,
        0x8000_0000 => entry.eax = BASELINE_EXTENDED_LEAF_MAX,
        0x8000_0001 => {
            let repeated = if is_amd { LEAF8001_EDX_REPEATED } else { 0 };
            (entry.eax, entry.ebx) = (0, 0);
            entry.ecx &= BASELINE_LEAF8001_ECX;
            entry.edx &= BASELINE_LEAF8001_EDX | repeated;
        }
        0x8000_0002..=0x8000_0004 => {
            let at = (entry.function - 0x8000_0002) as usize * 16;
            let word = |n: usize| {
                BASELINE_NAME.get(at + n * 4..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
            };
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
        }
        0x8000_0005..=0x8000_0006 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // The TSC does not change its speed: a host that cannot promise that is no host for this.
        0x8000_0007 => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        0x8000_0008 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (BASELINE_WIDTHS, 0, 0, 0),
        _ => {}
    }
}

/// Room for the topology of leaf 0xb, which hosts list in as many ways as there are; leaf 0x1f,
/// which says the same, goes.
fn add_topology(entries: &mut Vec<kvm_cpuid_entry2>) {
    /// KVM_CPUID_FLAG_SIGNIFCANT_INDEX.
    const INDEX_MATTERS: u32 = 1;
    entries.retain(|e| !matches!(e.function, 0xb | 0x1f));
    if entries.iter().any(|e| e.function == 0 && e.eax >= 0xb) {
        entries.extend((0..2).map(|index| kvm_cpuid_entry2 {
            function: 0xb,
            index,
            flags: INDEX_MATTERS,
            ..Default::default()
        }));
    }
}

/// Writes into a machine's CPUID what is vCPU `cpu`'s own: every vCPU is a core of one package.
pub(super) fn number(cpuid: &mut CpuId, cpu: u8, cpus: u8) {
    let is_amd = cpuid.as_slice().iter().any(|e| e.function == 0 && e.ebx == AMD);
    let id_bits = u32::from(cpus).next_power_of_two().trailing_zeros();
    let others = u32::from(cpus.saturating_sub(1));
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            // Local APIC id and number of logical processors.
            1 => {
                entry.ebx = entry.ebx & 0xffff | u32::from(cpus) << 16 | u32::from(cpu) << 24;
                entry.edx = if cpus > 1 { entry.edx | LEAF1_EDX_HTT } else { entry.edx & !LEAF1_EDX_HTT };
            }
            // Intel's caches: the third level is shared by all cores, the others by none; and the
            // number of cores.
            4 if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1 << id_bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << id_bits) - 1) << 26;
            }
            // x2APIC id, and two levels: one thread in a core, all cores in a package.
            0xb => topology_level(entry, cpu, cpus, id_bits),
            0x8000_0008 if is_amd => entry.ecx = id_bits << 12 | others,
            // AMD's caches, the same way.
            0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                entry.eax = entry.eax & 0x3fff | if level >= 3 { others << 14 } else { 0 };
            }
            // AMD: extended APIC id, core, node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (u32::from(cpu), u32::from(cpu), 0),
            _ => {}
        }
    }
}

fn topology_level(entry: &mut kvm_cpuid_entry2, cpu: u8, cpus: u8, id_bits: u32) {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    entry.edx = u32::from(cpu);
    (entry.eax, entry.ebx, entry.ecx) = match entry.index {
        0 => (0, 1, THREADS),
        1 => (id_bits, u32::from(cpus), 1 | CORES),
        index => (0, 0, index),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, words: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = words;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    /// A host that claims everything, in all leaves up to 0x20.
    fn generous(maker: &[u8; 4], signature: u32) -> CpuId {
        let all = u32::MAX;
        let mut entries =
            vec![entry(0, 0, [0x20, u32::from_le_bytes(*maker), 1, 2]), entry(1, 0, [signature, all, all, all])];
        entries.extend((2..=0x20).map(|f| entry(f, 0, [all; 4])));
        entries.push(entry(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]));
        entries.push(entry(LEAF_KVM_FEATURES, 0, [all; 4]));
        entries.push(entry(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]));
        entries.extend((0x8000_0001..=0x8000_0021).map(|f| entry(f, 0, [all; 4])));
        CpuId::from_entries(&entries).expect("entries")
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> Option<kvm_cpuid_entry2> {
        cpuid.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).copied()
    }

    #[test]
    fn no_model_shows_what_cannot_be_saved() {
        for model in [CpuModel::Host, CpuModel::Baseline] {
            let cpuid = model.cpuid(&generous(b"Genu", 0x906ed), true).expect("cpuid");
            let features = find(&cpuid, 1, 0).expect("leaf 1");
            assert_eq!(features.ecx & (LEAF1_ECX_VMX | LEAF1_ECX_OSXSAVE), 0);
            assert_ne!(features.ecx & LEAF1_ECX_HYPERVISOR, 0);
            assert_eq!(find(&cpuid, 0x8000_0001, 0).expect("leaf").ecx & LEAF8001_ECX_NO, 0);
            let kvm = find(&cpuid, LEAF_KVM_FEATURES, 0).expect("KVM's leaf").eax;
            assert_eq!((kvm & KVM_FEATURES_NO, kvm & 9), (0, 9), "no asynchronous faults, but kvmclock");
            for leaf in [0x12, 0x14, 0x8000_000a] {
                assert!(find(&cpuid, leaf, 0).is_none_or(|e| (e.eax, e.ebx, e.ecx, e.edx) == (0, 0, 0, 0)));
            }
        }
    }

    #[test]
    fn unlike_hosts_of_a_maker_have_one_baseline() {
        let of = |maker, signature, cut: u32| {
            let mut host = generous(maker, signature);
            // What the baseline does not show may differ: AVX, leaf 7, caches, the name.
            for entry in host.as_mut_slice() {
                match entry.function {
                    1 => entry.ecx &= !(1 << 28 | 1 << 26),
                    7 | 4 | 0xd | 0x8000_0002..=0x8000_0006 | 0x8000_0008 => entry.ebx ^= cut,
                    _ => {}
                }
            }
            CpuModel::Baseline.cpuid(&host, true).expect("cpuid").as_slice().to_vec()
        };
        assert_eq!(of(b"Genu", 0x306c3, 0), of(b"Genu", 0x906ed, 0xffff));
        assert_eq!(of(b"Auth", 0x800f12, 0), of(b"Auth", 0xa00f11, 0xffff));
        assert_ne!(of(b"Auth", 0x800f12, 0), of(b"Genu", 0x306c3, 0));
        let mut weak = generous(b"Genu", 0x306c3);
        weak.as_mut_slice().iter_mut().filter(|e| e.function == 1).for_each(|e| e.ecx &= !(1 << 20));
        let weak = CpuModel::Baseline.cpuid(&weak, true).expect("cpuid").as_slice().to_vec();
        assert_ne!(weak, of(b"Genu", 0x306c3, 0), "a host without SSE4.2 is told apart");
    }

    #[test]
    fn vcpus_are_cores_of_one_package() {
        for maker in [b"Genu", b"Auth"] {
            let shared = CpuModel::Host.cpuid(&generous(maker, 0x906ed), true).expect("cpuid");
            for cpu in 0..6 {
                let mut cpuid = shared.clone();
                number(&mut cpuid, cpu, 6);
                assert_eq!(find(&cpuid, 1, 0).expect("leaf 1").ebx >> 16, 6 | u32::from(cpu) << 8);
                let (threads, cores) = (find(&cpuid, 0xb, 0).expect("threads"), find(&cpuid, 0xb, 1).expect("cores"));
                assert_eq!((threads.eax, threads.ebx, threads.edx), (0, 1, cpu.into()));
                assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, cpu.into()));
                assert!(find(&cpuid, 0x1f, 0).is_none());
                let sizes = find(&cpuid, 0x8000_0008, 0).expect("sizes").ecx;
                assert!(maker != b"Auth" || sizes == 3 << 12 | 5);
            }
            let mut alone = shared.clone();
            number(&mut alone, 0, 1);
            assert_eq!(find(&alone, 1, 0).expect("leaf 1").edx & LEAF1_EDX_HTT, 0);
        }
    }
}
