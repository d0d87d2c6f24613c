//! A machine's state out of it and into it.

use std::iter::repeat_with;
use std::time::{Duration, Instant};

use super::devices::kind_of;
use super::error::MachineError;
use super::state::irqchip::IrqchipState;
use super::state::sections::{self, FormatError, Kind, Sections};
use super::state::tsc::ClockInstant;
use super::vcpu::Task;
use super::{Machine, elapsed_us, state_error};
use crate::device::bus::DeviceId;

/// The version of the section that says what machine it is.
const SHAPE_VERSION: u16 = 1;

/// What is not applied by a vCPU.
struct Decoded<'a> {
    irqchip: IrqchipState,
    devices: Vec<(DeviceId, &'a [u8])>,
}

impl Machine {
    /// Appends the machine's state, without its memory, to `out`.
    ///
    /// # Errors
    /// [`MachineError::Running`], [`MachineError::HalfRestored`], or [`MachineError::State`] if KVM
    /// would not hand over all of it; `out` then holds a part that is of no use.
    pub fn save(&mut self, out: &mut Vec<u8>) -> Result<(), MachineError> {
        self.need_paused("save it")?;
        if self.half_restored {
            return Err(MachineError::HalfRestored);
        }
        let start = Instant::now();
        for vcpu in &self.vcpus {
            vcpu.wait_settled("hand over its state")?;
        }
        self.times.settle_us = elapsed_us(start);
        sections::write(out, Kind::Shape, SHAPE_VERSION, 0, |o| {
            o.push(self.shape.cpus);
            o.extend_from_slice(&self.shape.memory_bytes.to_le_bytes());
        });
        for vcpu in &self.vcpus {
            vcpu.check()?;
        }
        let irqchip = IrqchipState::harvest(&self.vm).map_err(state_error("interrupt controllers"))?;
        for vcpu in &self.vcpus {
            vcpu.slot().state.encode(vcpu.number(), irqchip.instant, out);
        }
        irqchip.state.encode(out);
        for device in self.bus.devices() {
            let kind = kind_of(device.kind);
            sections::write(out, kind, device.kind.version(), device.instance, |o| self.bus.save(*device, o));
        }
        self.times.encode_us = elapsed_us(start) - self.times.settle_us;
        Ok(())
    }

    /// Puts a saved state into the machine, which is left paused. Guest memory must hold what it
    /// held when the state was saved.
    ///
    /// # Errors
    /// [`MachineError::Running`], or [`MachineError::State`] if the bytes are no state of such a
    /// machine or KVM refuses a part; the machine then cannot be resumed or saved until a restore
    /// succeeds.
    pub fn restore(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.restore_later(state, Duration::ZERO)
    }

    /// Like [`Machine::restore`], but the guest's clocks go on as if `ahead` had passed since the
    /// save: kvmclock, the TSCs where the host can set them, and what hangs on both. Timers that
    /// were due in that time fire at once, as after any time without a CPU.
    ///
    /// # Errors
    /// As [`Machine::restore`].
    pub fn restore_later(&mut self, state: &[u8], ahead: Duration) -> Result<(), MachineError> {
        self.need_paused("restore it")?;
        for vcpu in &self.vcpus {
            vcpu.wait_settled("stop")?;
        }
        self.half_restored = true;
        self.mailbox.0.begin_anew();
        let irqchip = self.decode(state)?;
        self.apply(repeat_with(|| Task::Restore(ahead)))?;
        irqchip.irqchip.apply(&self.vm, ahead).map_err(state_error("interrupt controllers"))?;
        let instant = ClockInstant::now(&self.vm).map_err(state_error("clock"))?;
        self.apply(repeat_with(|| Task::Align { instant, kvmclock_ctrl: !ahead.is_zero() }))?;
        for (device, bytes) in irqchip.devices {
            let restored = self.bus.restore(device, bytes).map_err(|e| kind_of(device.kind).bad(e.what));
            restored.map_err(state_error("devices"))?;
        }
        self.half_restored = false;
        Ok(())
    }

    /// Reads every section: the vCPUs' into their slots, the rest into the result.
    fn decode<'a>(&mut self, state: &'a [u8]) -> Result<Decoded<'a>, MachineError> {
        let mut from = Sections::parse(state).map_err(state_error("state"))?;
        self.check_shape(&mut from).map_err(state_error("state"))?;
        for vcpu in &self.vcpus {
            vcpu.slot().state.decode(vcpu.number(), &mut from).map_err(state_error("vCPU"))?;
        }
        let irqchip = IrqchipState::decode(&mut from).map_err(state_error("interrupt controllers"))?;
        let mut devices = Vec::with_capacity(self.bus.devices().len());
        for device in self.bus.devices() {
            let fields = from.take(kind_of(device.kind), device.kind.version(), device.instance);
            devices.push((*device, fields.map_err(state_error("devices"))?.remaining()));
        }
        from.finish().map_err(state_error("state"))?;
        Ok(Decoded { irqchip, devices })
    }

    fn check_shape(&self, from: &mut Sections<'_>) -> Result<(), FormatError> {
        let mut shape = from.take(Kind::Shape, SHAPE_VERSION, 0)?;
        let (cpus, memory_bytes) = (shape.u8()?, shape.u64()?);
        shape.end()?;
        if (cpus, memory_bytes) == (self.shape.cpus, self.shape.memory_bytes) {
            return Ok(());
        }
        Err(Kind::Shape.bad(format!("it is of a machine with {cpus} vCPUs and {memory_bytes} bytes of memory")))
    }
}
