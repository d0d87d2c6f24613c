//! The state of what the vCPUs share inside KVM: timer, interrupt controllers, clock.
//!
//! Saved and restored after the vCPUs. The timer goes in before the controllers: setting it may
//! raise its line, which the controllers' own state then overrides.

use std::time::Duration;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;

use super::kvm_structs::{self, bytes_of};
use super::sections::{self, FormatError, Kind, Sections};
use super::tsc::ClockInstant;
use crate::machine::error::{StateError, kvm};

const VERSION: u16 = 1;
const IRQCHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Timer, interrupt controllers and clock.
pub(in crate::machine) struct IrqchipState {
    pit: kvm_pit_state2,
    irqchip: [kvm_irqchip; 3],
    clock: kvm_clock_data,
}

/// A harvest, and the instant of its clock.
pub(in crate::machine) struct Harvest {
    /// The state.
    pub(in crate::machine) state: IrqchipState,
    /// When its clock was read.
    pub(in crate::machine) instant: ClockInstant,
}

impl IrqchipState {
    /// Takes the state from `vm`.
    pub(in crate::machine) fn harvest(vm: &VmFd) -> Result<Harvest, StateError> {
        let pit = vm.get_pit2().map_err(kvm("KVM_GET_PIT2"))?;
        let mut irqchip = [kvm_irqchip::default(); 3];
        for (chip, id) in irqchip.iter_mut().zip(IRQCHIPS) {
            chip.chip_id = id;
            vm.get_irqchip(chip).map_err(kvm("KVM_GET_IRQCHIP"))?;
        }
        let clock = vm.get_clock().map_err(kvm("KVM_GET_CLOCK"))?;
        let instant = ClockInstant::of(&clock);
        Ok(Harvest { state: IrqchipState { pit, irqchip, clock }, instant })
    }

    /// Puts the state into `vm`, whose clock goes on as if `ahead` had passed since the save. (KVM
    /// offers to add the time itself, but would trust two hosts' wall clocks to agree.)
    pub(in crate::machine) fn apply(&self, vm: &VmFd, ahead: Duration) -> Result<(), StateError> {
        vm.set_pit2(&self.pit).map_err(kvm("KVM_SET_PIT2"))?;
        let ahead_ns = u64::try_from(ahead.as_nanos()).unwrap_or(u64::MAX);
        let clock = kvm_clock_data { clock: self.clock.clock.saturating_add(ahead_ns), flags: 0, ..Default::default() };
        vm.set_clock(&clock).map_err(kvm("KVM_SET_CLOCK"))?;
        for chip in &self.irqchip {
            vm.set_irqchip(chip).map_err(kvm("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }

    /// Appends the state's sections.
    pub(in crate::machine) fn encode(&self, out: &mut Vec<u8>) {
        sections::write(out, Kind::Pit, VERSION, 0, |o| o.extend_from_slice(bytes_of(&self.pit)));
        for (instance, chip) in (0u16..).zip(&self.irqchip) {
            sections::write(out, Kind::IrqChip, VERSION, instance, |o| o.extend_from_slice(bytes_of(chip)));
        }
        sections::write(out, Kind::Clock, VERSION, 0, |o| o.extend_from_slice(bytes_of(&self.clock)));
    }

    /// Reads the state from `sections`.
    pub(in crate::machine) fn decode(from: &mut Sections<'_>) -> Result<IrqchipState, FormatError> {
        let pit = take(from, Kind::Pit, 0)?;
        let mut irqchip = [kvm_irqchip::default(); 3];
        for ((instance, chip), id) in (0u16..).zip(irqchip.iter_mut()).zip(IRQCHIPS) {
            *chip = take(from, Kind::IrqChip, instance)?;
            if chip.chip_id != id {
                return Err(Kind::IrqChip.bad(format!("chip {} stands where {id} should", chip.chip_id)));
            }
        }
        let clock = take(from, Kind::Clock, 0)?;
        Ok(IrqchipState { pit, irqchip, clock })
    }
}

fn take<T: kvm_structs::KvmStruct>(from: &mut Sections<'_>, kind: Kind, instance: u16) -> Result<T, FormatError> {
    let mut fields = from.take(kind, VERSION, instance)?;
    let value = kvm_structs::read(&mut fields)?;
    fields.end()?;
    Ok(value)
}
