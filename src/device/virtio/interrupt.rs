//! How a virtio device gets its guest's attention: the interrupt line, the doorbell, and the status
//! bit that it is broken.
//!
//! The line is level-triggered and follows the interrupt status register: up while any bit is set.
//! [`Signals::set_irq`] is synchronous, so that no capture misses an interrupt that is on its way.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::mmio::{INTERRUPT_CONFIG, INTERRUPT_USED, Transport, status};
use crate::device::Signals;

/// The driver's word that it needs no interrupt for used buffers (VIRTQ_AVAIL_F_NO_INTERRUPT).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// The way from one device to its guest.
pub(super) struct Interrupt {
    signals: Arc<dyn Signals>,
    gsi: u32,
    /// The device's kind, for people.
    device: &'static str,
    /// The line is up.
    up: bool,
}

impl Interrupt {
    /// The line `gsi` of a device of kind `device`; it is down.
    pub(super) fn new(signals: Arc<dyn Signals>, gsi: u32, device: &'static str) -> Interrupt {
        Interrupt { signals, gsi, device, up: false }
    }

    /// Brings the line to what the interrupt status says.
    pub(super) fn update(&mut self, transport: &Transport) {
        let up = transport.interrupt_status != 0;
        if up != self.up {
            self.up = up;
            self.signals.set_irq(self.gsi, up);
        }
    }

    /// Sets the line to what the interrupt status says, whatever it was: the controllers were
    /// restored without it.
    pub(super) fn restored(&mut self, transport: &Transport) {
        self.up = transport.interrupt_status != 0;
        self.signals.set_irq(self.gsi, self.up);
    }

    /// Tells the guest that buffers of `queue` were used: an interrupt unless it wants none, and
    /// the doorbell. A polling guest wants no interrupts at all but sleeps in the wait port, so
    /// with `ring_always` the doorbell rings regardless; without, for what it sees anyway when its
    /// notify returns, its word counts for the doorbell too.
    pub(super) fn used<M: GuestMemory>(&mut self, transport: &mut Transport, queue: usize, mem: &M, ring_always: bool) {
        // What was used must be visible before the driver's word is read (virtio 1.2, 2.7.7.2): a
        // driver that asks for interrupts again looks at the used ring after that. Without the
        // fence each side could miss what the other wrote, and both would sleep.
        fence(Ordering::SeqCst);
        let avail = transport.queues.get(queue).map_or(0, |q| q.avail_ring());
        let flags = mem.load::<u16>(GuestAddress(avail), Ordering::Acquire).map_or(0, u16::from_le);
        let wanted = flags & AVAIL_NO_INTERRUPT == 0;
        if wanted {
            transport.interrupt_status |= INTERRUPT_USED;
            self.update(transport);
        }
        if wanted || ring_always {
            self.signals.ring();
        }
    }

    /// Marks the device broken until the guest resets it: an interrupt to the guest and a call to
    /// the machine.
    pub(super) fn broken(&mut self, transport: &mut Transport, reason: &str) {
        transport.status |= status::NEEDS_RESET;
        transport.interrupt_status |= INTERRUPT_CONFIG;
        self.update(transport);
        self.signals.ring();
        self.signals.broken(self.device, reason);
    }
}
