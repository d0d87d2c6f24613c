//! The state of one vCPU: taken from KVM, given to KVM, written as sections, read from sections.
//!
//! The value is allocated once per vCPU and filled again in every pause. The orders of the calls
//! are load-bearing:
//!
//! Saving, what only the vCPU itself changes: FPU, control, MSRs. Then, when nothing else of the
//! machine runs, MP_STATE first, because reading it makes KVM digest a pending INIT or SIPI, which
//! changes registers (and then all is read again); registers, LAPIC; the events on their way in
//! last, because the calls before may move them.
//!
//! Restoring: TSC frequency, MP_STATE, then sregs before the LAPIC (they carry the APIC base and
//! with it the mode the LAPIC's registers are read in), the LAPIC before the MSRs (the TSC deadline
//! is dropped unless the LAPIC's timer is in deadline mode), IA32_TSC before the deadline (which is
//! compared with it), events last (setting registers clears pending exceptions). After the clock,
//! the TSC is aligned with it (see `tsc`).

use std::time::Duration;

use kvm_bindings::{
    Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::kvm_structs::{self, KvmStruct, bytes_of, bytes_of_words};
use super::sections::{self, FormatError, Kind, Sections};
use super::tsc::{ClockInstant, Tsc, ticks};
use crate::machine::error::{StateError, kvm};
use crate::machine::host::HostCaps;
use crate::protocol::cpu::same_tsc;

/// The version of every other vCPU section this build writes.
const VERSION: u16 = 1;
/// The version of the section that says how the vCPU runs.
const RUN_VERSION: u16 = 2;
/// IA32_TSC and IA32_TSC_ADJUST.
const MSR_TSC: u32 = 0x10;
const MSR_TSC_ADJUST: u32 = 0x3b;
/// IA32_TSC_DEADLINE.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Words of the legacy XSAVE region that `kvm_xsave` itself holds; what is beyond comes behind it.
const XSAVE_WORDS: usize = 1024;
/// Register offset and mode bits of the LAPIC's timer entry.
const LAPIC_LVT_TIMER: usize = 0x320;

/// The state of one vCPU.
pub(in crate::machine) struct VcpuState {
    /// The guest ended this vCPU (shut down, panicked, failed): it is never entered again.
    pub(in crate::machine) ended: bool,
    tsc_khz: u32,
    /// This host's own frequency.
    host_tsc_khz: u32,
    tsc: Tsc,
    mp_state: u32,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    /// Words of it that are saved behind the first [`XSAVE_WORDS`]; what is beyond is zero in every
    /// guest of this CPU model.
    xsave_extra_words: usize,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Msrs,
    events: kvm_vcpu_events,
}

impl VcpuState {
    /// An empty state with room for everything a vCPU of this host has.
    pub(in crate::machine) fn new(caps: &HostCaps, tsc_khz: u32) -> Result<VcpuState, StateError> {
        let extra_words = caps.xsave_bytes.div_ceil(4).saturating_sub(XSAVE_WORDS);
        let entries: Vec<kvm_msr_entry> =
            caps.msrs.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        Ok(VcpuState {
            ended: false,
            tsc_khz,
            host_tsc_khz: tsc_khz,
            tsc: Tsc::default(),
            mp_state: 0,
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: Xsave::new(extra_words).map_err(|_| StateError::Room)?,
            xsave_extra_words: caps.xsave_saved_bytes.div_ceil(4).saturating_sub(XSAVE_WORDS).min(extra_words),
            xcrs: kvm_xcrs::default(),
            debugregs: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: Msrs::from_entries(&entries).map_err(|_| StateError::Room)?,
            events: kvm_vcpu_events::default(),
        })
    }

    /// Takes what only `vcpu` itself changes. Its last KVM_RUN returned EINTR with every register
    /// synchronised into its run page.
    pub(in crate::machine) fn harvest_own(&mut self, vcpu: &VcpuFd) -> Result<(), StateError> {
        // SAFETY: the buffer was made with as many bytes as KVM_CAP_XSAVE2 names, and no feature
        // that would enlarge the area is enabled after the vCPU was made.
        unsafe { vcpu.get_xsave2(&mut self.xsave) }.map_err(kvm("KVM_GET_XSAVE2"))?;
        self.xcrs = vcpu.get_xcrs().map_err(kvm("KVM_GET_XCRS"))?;
        self.debugregs = vcpu.get_debug_regs().map_err(kvm("KVM_GET_DEBUGREGS"))?;
        let read = vcpu.get_msrs(&mut self.msrs).map_err(kvm("KVM_GET_MSRS"))?;
        if let Some(stuck) = self.msrs.as_slice().get(read) {
            return Err(StateError::Msr { call: "read", index: stuck.index });
        }
        let msr = |index| self.msrs.as_slice().iter().find(|entry| entry.index == index).map_or(0, |entry| entry.data);
        self.tsc.observe(vcpu, msr(MSR_TSC), msr(MSR_TSC_ADJUST), self.tsc_khz);
        Ok(())
    }

    /// Takes the rest, once nothing else of the machine runs.
    ///
    /// Each call to KVM costs about 5 µs, so general registers and sregs come from the run page,
    /// and so do the events of a vCPU that is alone. Only where another vCPU could have sent an
    /// INIT since is that not enough: then the registers are asked for again, and if they moved,
    /// all are.
    pub(in crate::machine) fn harvest_rest(&mut self, vcpu: &VcpuFd, alone: bool) -> Result<(), StateError> {
        self.mp_state = vcpu.get_mp_state().map_err(kvm("KVM_GET_MP_STATE"))?.mp_state;
        let synced = vcpu.sync_regs();
        self.regs = synced.regs;
        self.sregs = synced.sregs;
        if !alone && vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))? != synced.regs {
            self.regs = vcpu.get_regs().map_err(kvm("KVM_GET_REGS"))?;
            self.sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
            self.harvest_own(vcpu)?;
        }
        self.lapic = vcpu.get_lapic().map_err(kvm("KVM_GET_LAPIC"))?;
        // Another vCPU may have sent an NMI after the run page was written.
        self.events = if alone { synced.events } else { vcpu.get_vcpu_events().map_err(kvm("KVM_GET_VCPU_EVENTS"))? };
        Ok(())
    }

    /// Puts the state into `vcpu`, whose TSC goes on as if `ahead` had passed since the save. That
    /// comes before the timer's deadline: KVM looks at the TSC when it is written and never again.
    pub(in crate::machine) fn apply(
        &mut self,
        vcpu: &VcpuFd,
        caps: &HostCaps,
        ahead: Duration,
    ) -> Result<(), StateError> {
        self.tsc.forget();
        let ahead = ticks(ahead.as_nanos().try_into().unwrap_or(i128::MAX), self.tsc_khz);
        if let Some(tsc) = self.msrs.as_mut_slice().iter_mut().find(|entry| entry.index == MSR_TSC) {
            tsc.data = tsc.data.wrapping_add(ahead);
        }
        self.apply_tsc_frequency(vcpu, caps)?;
        vcpu.set_mp_state(kvm_mp_state { mp_state: self.mp_state }).map_err(kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs).map_err(kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs).map_err(kvm("KVM_SET_SREGS"))?;
        // SAFETY: the buffer holds as many bytes as KVM_CAP_XSAVE2 names; KVM reads no more, and
        // checks the content.
        unsafe { vcpu.set_xsave2(&self.xsave) }.map_err(kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debugregs).map_err(kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic).map_err(kvm("KVM_SET_LAPIC"))?;
        self.apply_msrs(vcpu)?;
        vcpu.set_vcpu_events(&self.events).map_err(kvm("KVM_SET_VCPU_EVENTS"))?;
        Ok(())
    }

    /// Makes the TSC fit kvmclock, which stood thus at `instant`, as it did when it was saved. A
    /// TSC that is scaled stays as its MSR was written, some µs off.
    pub(in crate::machine) fn align(&mut self, vcpu: &VcpuFd, instant: ClockInstant) {
        if !self.is_scaled() {
            self.tsc.align(vcpu, instant, self.tsc_khz);
        }
    }

    /// How fast the guest's TSC runs.
    pub(in crate::machine) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// From now on this is the state of a guest whose TSC runs so fast.
    pub(in crate::machine) fn pretend_tsc(&mut self, tsc_khz: u32) {
        self.tsc_khz = tsc_khz;
    }

    /// Tells the guest's kernel, where it uses kvmclock, that it did not run for a while, so that
    /// its watchdogs do not bark.
    pub(in crate::machine) fn kvmclock_ctrl(vcpu: &VcpuFd) {
        if let Err(error) = vcpu.kvmclock_ctrl() {
            tracing::debug!(%error, "this vCPU's guest has no kvmclock, which would report the pause");
        }
    }

    /// Whether the guest's TSC has another speed than the host's.
    fn is_scaled(&self) -> bool {
        !same_tsc(self.tsc_khz, self.host_tsc_khz)
    }

    /// Runs the guest's TSC at the saved frequency where the host can, and refuses where it cannot
    /// and would be off.
    fn apply_tsc_frequency(&self, vcpu: &VcpuFd, caps: &HostCaps) -> Result<(), StateError> {
        let host = vcpu.get_tsc_khz().map_err(kvm("KVM_GET_TSC_KHZ"))?;
        if host == self.tsc_khz {
            return Ok(());
        }
        if caps.tsc_control {
            return Ok(vcpu.set_tsc_khz(self.tsc_khz).map_err(kvm("KVM_SET_TSC_KHZ"))?);
        }
        match same_tsc(self.tsc_khz, host) {
            true => Ok(()),
            false => Err(StateError::Tsc { saved_khz: self.tsc_khz, host_khz: host }),
        }
    }

    /// Writes the MSRs, IA32_TSC_DEADLINE after all others.
    fn apply_msrs(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let is_deadline = |entry: &kvm_msr_entry| entry.index == MSR_TSC_DEADLINE;
        let others: Vec<kvm_msr_entry> = self.msrs.as_slice().iter().filter(|e| !is_deadline(e)).copied().collect();
        set_msrs(vcpu, &others)?;
        if let Some(deadline) = self.msrs.as_slice().iter().find(|e| is_deadline(e)) {
            let data = deadline_to_restore(deadline.data, &self.lapic);
            set_msrs(vcpu, &[kvm_msr_entry { data, ..*deadline }])?;
        }
        Ok(())
    }

    /// Appends the state's sections, as of the `instant` at which kvmclock was read.
    pub(in crate::machine) fn encode(&mut self, cpu: u16, instant: ClockInstant, out: &mut Vec<u8>) {
        if self.is_scaled() {
            self.tsc.forget();
        }
        self.tsc.note(instant);
        sections::write(out, Kind::VcpuRun, RUN_VERSION, cpu, |o| {
            o.extend_from_slice(&self.mp_state.to_le_bytes());
            o.extend_from_slice(&self.tsc_khz.to_le_bytes());
            o.push(u8::from(self.ended));
            self.tsc.words().iter().for_each(|word| o.extend_from_slice(&word.to_le_bytes()));
        });
        sections::write(out, Kind::Regs, VERSION, cpu, |o| o.extend_from_slice(bytes_of(&self.regs)));
        sections::write(out, Kind::Sregs, VERSION, cpu, |o| o.extend_from_slice(bytes_of(&self.sregs)));
        sections::write(out, Kind::Xsave, VERSION, cpu, |o| {
            o.extend_from_slice(bytes_of_words(&self.xsave.as_fam_struct_ref().xsave.region));
            let extra = self.xsave.as_slice().get(..self.xsave_extra_words).unwrap_or_default();
            o.extend_from_slice(bytes_of_words(extra));
        });
        sections::write(out, Kind::Xcrs, VERSION, cpu, |o| o.extend_from_slice(bytes_of(&self.xcrs)));
        sections::write(out, Kind::DebugRegs, VERSION, cpu, |o| o.extend_from_slice(bytes_of(&self.debugregs)));
        sections::write(out, Kind::Lapic, VERSION, cpu, |o| o.extend_from_slice(bytes_of(&self.lapic)));
        sections::write(out, Kind::Msrs, VERSION, cpu, |o| {
            for entry in self.msrs.as_slice() {
                o.extend_from_slice(&entry.index.to_le_bytes());
                o.extend_from_slice(&entry.data.to_le_bytes());
            }
        });
        sections::write(out, Kind::VcpuEvents, VERSION, cpu, |o| o.extend_from_slice(bytes_of(&self.events)));
    }

    /// Reads the state of vCPU `cpu` from `sections` into this value.
    ///
    /// The MSRs must be the ones this host has, in its order: a state with others cannot be
    /// restored whole here.
    pub(in crate::machine) fn decode(&mut self, cpu: u16, from: &mut Sections<'_>) -> Result<(), FormatError> {
        let mut run = from.take(Kind::VcpuRun, RUN_VERSION, cpu)?;
        self.mp_state = run.u32()?;
        self.tsc_khz = run.u32()?;
        self.ended = run.u8()? != 0;
        self.tsc = Tsc::from_words([run.u64()?, run.u64()?, run.u64()?]);
        run.end()?;
        self.regs = take_struct(from, Kind::Regs, cpu)?;
        self.sregs = take_struct(from, Kind::Sregs, cpu)?;
        self.decode_xsave(cpu, from)?;
        self.xcrs = take_struct(from, Kind::Xcrs, cpu)?;
        self.debugregs = take_struct(from, Kind::DebugRegs, cpu)?;
        self.lapic = take_struct(from, Kind::Lapic, cpu)?;
        let mut msrs = from.take(Kind::Msrs, VERSION, cpu)?;
        for entry in self.msrs.as_mut_slice() {
            let index = msrs.u32()?;
            if index != entry.index {
                return Err(Kind::Msrs.bad(format!("MSR {index:#x} stands where this host has {:#x}", entry.index)));
            }
            entry.data = msrs.u64()?;
        }
        msrs.end()?;
        self.events = take_struct(from, Kind::VcpuEvents, cpu)?;
        Ok(())
    }

    fn decode_xsave(&mut self, cpu: u16, from: &mut Sections<'_>) -> Result<(), FormatError> {
        let mut fields = from.take(Kind::Xsave, VERSION, cpu)?;
        let bytes = fields.bytes((XSAVE_WORDS + self.xsave_extra_words) * 4)?;
        fields.end()?;
        let mut words = bytes.chunks_exact(4).map(|c| c.try_into().map_or(0, u32::from_le_bytes));
        // SAFETY: only the words of the area are written; the length field, on which the wrapper's
        // bounds rest, is not.
        let area = unsafe { self.xsave.as_mut_fam_struct() };
        for (word, saved) in area.xsave.region.iter_mut().zip(words.by_ref()) {
            *word = saved;
        }
        for (word, saved) in self.xsave.as_mut_slice().iter_mut().zip(words.chain(std::iter::repeat(0))) {
            *word = saved;
        }
        Ok(())
    }
}

fn take_struct<T: KvmStruct>(from: &mut Sections<'_>, kind: Kind, cpu: u16) -> Result<T, FormatError> {
    let mut fields = from.take(kind, VERSION, cpu)?;
    let value = kvm_structs::read(&mut fields)?;
    fields.end()?;
    Ok(value)
}

/// Writes `entries` and checks that KVM took every one: it stops silently at the first it refuses.
pub(in crate::machine) fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), StateError> {
    let msrs = Msrs::from_entries(entries).map_err(|_| StateError::Room)?;
    let written = vcpu.set_msrs(&msrs).map_err(kvm("KVM_SET_MSRS"))?;
    match entries.get(written) {
        Some(stuck) => Err(StateError::Msr { call: "write", index: stuck.index }),
        None => Ok(()),
    }
}

/// The value to write to IA32_TSC_DEADLINE for a saved one.
///
/// KVM reads the deadline as 0 from when the timer has fired until its interrupt is injected. If
/// the state was saved in between, writing 0 would disarm the timer and the guest would wait for
/// ever. So a 0 is restored as a deadline in the past (TSC 1), which fires at once, if the LAPIC's
/// timer is in deadline mode and not masked. A timer that was really disarmed then fires once more
/// than it should, which its guest must bear anyway: on hardware, too, disarming races with firing.
fn deadline_to_restore(saved: u64, lapic: &kvm_lapic_state) -> u64 {
    let byte = |offset: usize| lapic.regs.get(LAPIC_LVT_TIMER + offset).map_or(0, |b| *b as u8);
    let entry = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
    let (mode, masked) = ((entry >> 17) & 3, (entry >> 16) & 1 == 1);
    if saved == 0 && mode == 2 && !masked { 1 } else { saved }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_that_has_fired_fires_again_and_no_other_does() {
        let lapic = |entry: u32| {
            let mut lapic = kvm_lapic_state::default();
            for (to, from) in lapic.regs[LAPIC_LVT_TIMER..].iter_mut().zip(entry.to_le_bytes()) {
                *to = from as i8;
            }
            lapic
        };
        let (deadline, masked, periodic) = (lapic(0x400ef), lapic(0x500ef), lapic(0x200ef));
        assert_eq!(deadline_to_restore(0, &deadline), 1);
        assert_eq!(deadline_to_restore(77, &deadline), 77);
        assert_eq!(deadline_to_restore(0, &masked), 0);
        assert_eq!(deadline_to_restore(0, &periodic), 0);
    }
}
