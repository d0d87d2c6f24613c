//! The guest's two clocks kept together over a takeover: its TSCs and kvmclock.
//!
//! They are saved and restored by different calls, and time passes between these; a guest that
//! compares its clocks (Linux does, twice a second) would see one of them jump against the other,
//! and stop trusting its TSC. So what is saved is what each TSC showed *at the instant* of the
//! saved kvmclock, by way of the host's TSC: KVM names it with the clock, and the offset from it to
//! each guest's TSC. After all is restored, the offset is set so that the same holds again, for all
//! vCPUs by one instant.

use std::arch::x86_64::_rdtsc;

use kvm_bindings::{
    KVM_CLOCK_HOST_TSC, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clock_data, kvm_device_attr,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::machine::error::{StateError, kvm};

#[allow(missing_docs)]
mod ioctls {
    use super::*;
    use vmm_sys_util::ioctl_iow_nr;
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}
use ioctls::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};

/// kvmclock and the host's TSC at one instant.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct ClockInstant {
    clock_ns: u64,
    host_tsc: u64,
}

impl ClockInstant {
    /// The instant at which KVM said `clock`, which has just been asked for.
    pub(super) fn of(clock: &kvm_clock_data) -> ClockInstant {
        let exact = clock.flags & KVM_CLOCK_HOST_TSC != 0;
        // KVM knows the host's TSC only while all vCPUs' run together; otherwise a few µs late is
        // the best there is.
        ClockInstant { clock_ns: clock.clock, host_tsc: if exact { clock.host_tsc } else { host_tsc() } }
    }

    /// Now.
    pub(in crate::machine) fn now(vm: &VmFd) -> Result<ClockInstant, StateError> {
        Ok(ClockInstant::of(&vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?))
    }
}

fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    unsafe { _rdtsc() }
}

/// One vCPU's TSC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tsc {
    /// What is added to the host's TSC, if KVM says it.
    offset: Option<u64>,
    /// IA32_TSC_ADJUST when the offset was asked for: a guest that moves its TSC changes it.
    adjust: u64,
    /// kvmclock at the instant of the save, and what the TSC showed then.
    saved: Option<(u64, u64)>,
}

impl Tsc {
    /// Looks whether the offset is still known, given IA32_TSC and IA32_TSC_ADJUST as just read,
    /// and asks for it only if not: every call costs the guest 5 µs in each pause.
    pub(super) fn observe(&mut self, vcpu: &VcpuFd, tsc: u64, adjust: u64, khz: u32) {
        let off = |offset: u64| host_tsc().wrapping_add(offset).wrapping_sub(tsc).cast_signed().unsigned_abs();
        // A millisecond: more than reading it can take, unless this thread was preempted.
        let known = self.offset.is_some_and(|offset| off(offset) < u64::from(khz));
        if !known || adjust != self.adjust {
            (self.offset, self.adjust) = (get_offset(vcpu), adjust);
        }
    }

    /// Forgets the offset: the TSC was written.
    pub(super) fn forget(&mut self) {
        self.offset = None;
    }

    /// Notes what the TSC showed at `instant`.
    pub(super) fn note(&mut self, instant: ClockInstant) {
        self.saved = self.offset.map(|offset| (instant.clock_ns, instant.host_tsc.wrapping_add(offset)));
    }

    /// Sets the TSC to what it has to show so that it fits kvmclock at `instant` as it did when it
    /// was saved. Nothing to do if the host that saved it could not say, or this one cannot set it.
    pub(super) fn align(&mut self, vcpu: &VcpuFd, instant: ClockInstant, khz: u32) {
        let Some(saved) = self.saved else { return };
        let offset = offset_at(saved, instant, khz);
        if set_offset(vcpu, offset) {
            self.offset = Some(offset);
        }
    }

    /// What is saved: whether anything is known, kvmclock and the TSC.
    pub(super) fn words(&self) -> [u64; 3] {
        self.saved.map_or([0; 3], |(clock_ns, tsc)| [1, clock_ns, tsc])
    }

    /// The reverse.
    pub(super) fn from_words([known, clock_ns, tsc]: [u64; 3]) -> Tsc {
        Tsc { saved: (known == 1).then_some((clock_ns, tsc)), ..Tsc::default() }
    }
}

/// The offset with which the TSC goes on from `saved` (kvmclock, TSC) at `instant`.
fn offset_at((clock_ns, tsc): (u64, u64), instant: ClockInstant, khz: u32) -> u64 {
    let passed_ns = i128::from(instant.clock_ns) - i128::from(clock_ns);
    tsc.wrapping_add(ticks(passed_ns, khz)).wrapping_sub(instant.host_tsc)
}

/// What a TSC of `khz` counts in `passed_ns`. Counters wrap, and so does a difference that is
/// negative.
pub(super) fn ticks(passed_ns: i128, khz: u32) -> u64 {
    (passed_ns.saturating_mul(i128::from(khz)) / 1_000_000) as u64
}

fn attribute(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: std::ptr::from_mut(value) as u64,
        flags: 0,
    }
}

/// `None` if the host's KVM is too old to say.
fn get_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0;
    // SAFETY: the ioctl writes the eight bytes of `offset`, which outlives it.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute(&mut offset)) };
    if result < 0 {
        tracing::debug!("KVM does not name the offset of a vCPU's TSC: {}", errno::Error::last());
        return None;
    }
    Some(offset)
}

fn set_offset(vcpu: &VcpuFd, mut offset: u64) -> bool {
    // SAFETY: the ioctl reads the eight bytes of `offset`, which outlives it.
    unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute(&mut offset)) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tsc_goes_on_by_as_much_as_kvmclock_does() {
        // Saved at 10 s of kvmclock with a TSC of 7,000; now it is 1 ms later, and this host's TSC
        // is anything.
        for host_tsc in [0, 5, u64::MAX] {
            let instant = ClockInstant { clock_ns: 10_001_000_000, host_tsc };
            let offset = offset_at((10_000_000_000, 7_000), instant, 2_000_000);
            assert_eq!(host_tsc.wrapping_add(offset), 7_000 + 2_000_000);
        }
        // kvmclock may have been set back by a hair.
        let instant = ClockInstant { clock_ns: 999, host_tsc: 0 };
        assert_eq!(offset_at((1_999, 7_000), instant, 1_000_000), 6_000);
    }

    #[test]
    fn what_is_saved_is_read_back() {
        let mut tsc = Tsc { offset: Some(u64::MAX), ..Tsc::default() };
        tsc.note(ClockInstant { clock_ns: 3, host_tsc: 5 });
        assert_eq!(tsc.words(), [1, 3, 4]);
        assert_eq!(Tsc::from_words(tsc.words()).saved, tsc.saved);
        assert_eq!(Tsc::from_words(Tsc::default().words()), Tsc::default());
    }
}
