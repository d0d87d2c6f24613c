//! How a virtio device gets its guest's attention: the interrupt line, the doorbell, and the word
//! that it is broken.
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
    /// How often the device was broken.
    breaks: u64,
}

impl Interrupt {
    /// The line `gsi` of a device of kind `device`; it is down.
    pub(super) fn new(signals: Arc<dyn Signals>, gsi: u32, device: &'static str) -> Interrupt {
        Interrupt { signals, gsi, device, up: false, breaks: 0 }
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

    /// Marks the device broken until the guest resets it, and tells the guest and the machine. A
    /// guest that resets a device only to break it again, thousands of times a second, must not
    /// fill logs: the machine hears of the first time, the tenth, the hundredth, and so on.
    pub(super) fn broken(&mut self, transport: &mut Transport, reason: &str) {
        transport.status |= status::NEEDS_RESET;
        transport.interrupt_status |= INTERRUPT_CONFIG;
        self.update(transport);
        self.signals.ring();
        self.breaks = self.breaks.saturating_add(1);
        match self.breaks {
            1 => self.signals.broken(self.device, reason),
            breaks if is_power_of_ten(breaks) => {
                self.signals.broken(self.device, &format!("{reason} (broken {breaks} times by now)"));
            }
            _ => {}
        }
    }
}

fn is_power_of_ten(mut number: u64) -> bool {
    while number > 1 && number.is_multiple_of(10) {
        number /= 10;
    }
    number == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::virtio::test_support::Recorder;

    #[test]
    fn a_device_that_is_broken_again_and_again_is_told_of_less_and_less() {
        let machine = Arc::new(Recorder::default());
        let mut interrupt = Interrupt::new(machine.clone(), 16, "disk");
        let mut transport = Transport::new(2, 0, Vec::new());
        (0..1234).for_each(|_| interrupt.broken(&mut transport, "a chain that loops"));
        let told = machine.broken.lock().clone();
        let times = |times: u64| format!("a chain that loops (broken {times} times by now)");
        assert_eq!(told, ["a chain that loops".to_owned(), times(10), times(100), times(1000)]);
        assert_ne!(transport.status & status::NEEDS_RESET, 0);
        assert!([0, 2, 11, 20, 1001, u64::MAX].iter().all(|number| !is_power_of_ten(*number)));
    }
}
