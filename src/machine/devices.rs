//! The machine's side of its devices: what they can make happen, where their state goes, and
//! whether its disks are the right ones.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::MachineError;
use super::events::Mailbox;
use super::pause::PauseSignal;
use super::state::sections::Kind;
use super::wait::Doorbell;
use crate::device::bus::DeviceKind;
use crate::device::{BlockBackend, Signals};
use crate::protocol::guest_event::GuestEvent;
use crate::protocol::machine_shape::{DISKS_MAX, MachineShape};

/// The machine's side of its devices.
pub(super) struct MachineSignals {
    pub(super) vm: Arc<VmFd>,
    pub(super) doorbells: Vec<Arc<Doorbell>>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) pause_signal: Arc<PauseSignal>,
}

impl Signals for MachineSignals {
    fn set_irq(&self, gsi: u32, active: bool) {
        // Synchronous on purpose: when this returns the interrupt is in the controllers' state, so
        // no capture can miss it.
        if let Err(error) = self.vm.set_irq_line(gsi, active) {
            tracing::error!(gsi, active, %error, "KVM refused an interrupt");
        }
    }

    fn ring(&self) {
        self.doorbells.iter().for_each(|doorbell| doorbell.ring());
    }

    fn broken(&self, device: &'static str, reason: &str) {
        // The mailbox counts.
        self.mailbox.put(GuestEvent::DeviceBroken { device, reason: reason.to_owned(), count: 0 });
    }

    fn quiesced(&self) {
        self.pause_signal.notify();
    }
}

/// The section that a device's state is in.
pub(super) fn kind_of(device: DeviceKind) -> Kind {
    match device {
        DeviceKind::Serial => Kind::Serial,
        DeviceKind::Net => Kind::Net,
        DeviceKind::Block => Kind::Block,
        DeviceKind::Rng => Kind::Rng,
        DeviceKind::Pci => Kind::Pci,
    }
}

/// Checks that `disks` are those of `shape`.
pub(super) fn check_disks(shape: &MachineShape, disks: &[Arc<dyn BlockBackend>]) -> Result<(), MachineError> {
    if shape.disks.len() > DISKS_MAX || shape.disks.len() != disks.len() {
        return Err(MachineError::Disks { wanted: shape.disks.len(), given: disks.len() });
    }
    for (number, (disk, backend)) in shape.disks.iter().zip(disks).enumerate() {
        if !disk.is_possible() || disk.bytes != backend.bytes() {
            return Err(MachineError::DiskSize { number, wanted_bytes: disk.bytes, given_bytes: backend.bytes() });
        }
    }
    Ok(())
}
