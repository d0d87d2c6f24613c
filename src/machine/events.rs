//! What a machine tells its owner, through a mailbox that no guest can fill or make lose what
//! matters.
//!
//! - What **ends** the guest (shutdown, reset, a vCPU that failed) is latched: the first wins, is
//!   delivered exactly once, and waits for as long as it takes.
//! - *Booted* and *panicked* say nothing more the second time: each is delivered once.
//! - A **broken device** is delivered the first, tenth, hundredth … time, with the count; while
//!   one waits in the mailbox, later ones only raise its count.
//!
//! So a guest that rings the event port for ever, or resets a device only to break it again, brings
//! about a bounded number of events, and a receiver that is slow finds a bounded number of them.
//! All of it begins anew with another guest's state ([`Mailbox::begin_anew`]).
//!
//! The vCPU that ends its guest is not entered again, as in QEMU, where a reset stops the vCPU that
//! asked for it at once (`cpu_stop_current`): it could only go on to do what the guest's owner will
//! discard, in the worst case ask again for ever. The other vCPUs run until the owner decides, also
//! as in QEMU; there the main loop stops them.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// What a machine tells its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest is up and serving.
    Booted,
    /// The guest switched itself off.
    Shutdown,
    /// The guest asked for a reset (or faulted in a way that resets a CPU).
    Reset,
    /// The guest panicked; its console has the reason.
    GuestPanic,
    /// A vCPU cannot go on.
    VcpuFailed {
        /// The vCPU.
        cpu: u16,
        /// Why.
        reason: String,
    },
    /// The guest broke the rules of a device, which does nothing until the guest resets it.
    DeviceBroken {
        /// The device's kind.
        device: &'static str,
        /// How, the last time.
        reason: String,
        /// How often devices of this kind have been broken.
        count: u64,
    },
}

impl fmt::Display for MachineEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MachineEvent::Booted => f.write_str("the guest is up"),
            MachineEvent::Shutdown => f.write_str("the guest switched itself off"),
            MachineEvent::Reset => f.write_str("the guest asked for a reset"),
            MachineEvent::GuestPanic => f.write_str("the guest panicked; its console says why"),
            MachineEvent::VcpuFailed { cpu, reason } => write!(f, "vCPU {cpu} cannot go on: {reason}"),
            MachineEvent::DeviceBroken { device, reason, count } => {
                let times = if *count > 1 { format!(" ({count} times so far)") } else { String::new() };
                write!(
                    f,
                    "the guest's driver broke the rules of {device}{times}: {reason}; the device does nothing until \
                    the guest resets it"
                )
            }
        }
    }
}

impl MachineEvent {
    /// True if the guest is at its end.
    pub fn is_end(&self) -> bool {
        matches!(self, MachineEvent::Shutdown | MachineEvent::Reset | MachineEvent::VcpuFailed { .. })
    }
}

#[derive(Default)]
struct State {
    /// At most one end, one boot, one panic, and one for each kind of device.
    waiting: VecDeque<MachineEvent>,
    ended: bool,
    booted: bool,
    panicked: bool,
    /// How often each kind of device was broken.
    broken: Vec<(&'static str, u64)>,
    /// The machine is gone.
    closed: bool,
}

impl State {
    /// Puts `event` into the mailbox if it is to be delivered.
    fn put(&mut self, event: MachineEvent) {
        let latch = match &event {
            MachineEvent::Booted => &mut self.booted,
            MachineEvent::GuestPanic => &mut self.panicked,
            MachineEvent::DeviceBroken { device, reason, .. } => return self.put_broken(device, reason),
            MachineEvent::Shutdown | MachineEvent::Reset | MachineEvent::VcpuFailed { .. } => &mut self.ended,
        };
        if !std::mem::replace(latch, true) {
            self.waiting.push_back(event);
        }
    }

    fn put_broken(&mut self, device: &'static str, reason: &str) {
        let place = self.broken.iter().position(|(kind, _)| *kind == device).unwrap_or(self.broken.len());
        if place == self.broken.len() {
            self.broken.push((device, 0));
        }
        let Some((_, times)) = self.broken.get_mut(place) else { return };
        *times = times.saturating_add(1);
        let now = MachineEvent::DeviceBroken { device, reason: reason.to_owned(), count: *times };
        let is_same =
            |event: &&mut MachineEvent| matches!(event, MachineEvent::DeviceBroken { device: d, .. } if *d == device);
        if let Some(waiting) = self.waiting.iter_mut().find(is_same) {
            *waiting = now;
        } else if is_power_of_ten(*times) {
            self.waiting.push_back(now);
        }
    }
}

fn is_power_of_ten(mut number: u64) -> bool {
    while number > 1 && number.is_multiple_of(10) {
        number /= 10;
    }
    number == 1
}

/// Where vCPUs and devices leave events. Never blocks for longer than a moment.
#[derive(Default)]
pub(super) struct Mailbox {
    state: Mutex<State>,
    arrived: Condvar,
}

impl Mailbox {
    /// Leaves an event.
    pub(super) fn put(&self, event: MachineEvent) {
        self.state.lock().put(event);
        self.arrived.notify_all();
    }

    /// Forgets all events and all latches: the machine gets another guest's state.
    pub(super) fn begin_anew(&self) {
        *self.state.lock() = State::default();
    }
}

/// The machine's hold on its mailbox: receivers end when it is dropped.
pub(super) struct MailboxOwner(pub(super) Arc<Mailbox>);

impl Drop for MailboxOwner {
    fn drop(&mut self) {
        self.0.state.lock().closed = true;
        self.0.arrived.notify_all();
    }
}

/// The events of a machine. Clones share them: each event goes to one of them.
#[derive(Clone)]
pub struct MachineEvents {
    mailbox: Arc<Mailbox>,
}

impl MachineEvents {
    pub(super) fn of(mailbox: &Arc<Mailbox>) -> MachineEvents {
        MachineEvents { mailbox: Arc::clone(mailbox) }
    }

    /// Waits for the next event; `None` when the machine is gone and all are delivered.
    pub fn recv(&self) -> Option<MachineEvent> {
        let mut state = self.mailbox.state.lock();
        loop {
            if let Some(event) = state.waiting.pop_front() {
                return Some(event);
            }
            if state.closed {
                return None;
            }
            self.mailbox.arrived.wait(&mut state);
        }
    }

    /// Waits for the next event, at most for `timeout`.
    ///
    /// # Errors
    /// Without one in that time, or when the machine is gone and all are delivered.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<MachineEvent, RecvTimeoutError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.mailbox.state.lock();
        loop {
            if let Some(event) = state.waiting.pop_front() {
                return Ok(event);
            }
            if state.closed {
                return Err(RecvTimeoutError::Disconnected);
            }
            if self.mailbox.arrived.wait_until(&mut state, deadline).timed_out() {
                return state.waiting.pop_front().ok_or(RecvTimeoutError::Timeout);
            }
        }
    }
}

impl Iterator for MachineEvents {
    type Item = MachineEvent;

    fn next(&mut self) -> Option<MachineEvent> {
        self.recv()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_are_told_in_words() {
        let broken = |count| MachineEvent::DeviceBroken { device: "virtio-net", reason: "no chain".into(), count };
        for (event, text) in [
            (MachineEvent::VcpuFailed { cpu: 3, reason: "KVM stopped".into() }, "vCPU 3 cannot go on: KVM stopped"),
            (MachineEvent::GuestPanic, "the guest panicked; its console says why"),
            (
                broken(1),
                "the guest's driver broke the rules of virtio-net: no chain; the device does nothing until the guest \
                 resets it",
            ),
        ] {
            assert_eq!(event.to_string(), text);
        }
        assert!(broken(7).to_string().contains("virtio-net (7 times so far): no chain"));
    }

    fn broken(count: u64) -> MachineEvent {
        MachineEvent::DeviceBroken { device: "disk", reason: "a loop".to_owned(), count }
    }

    #[test]
    fn the_first_end_is_delivered_once_whatever_else_comes() {
        let mailbox = Arc::new(Mailbox::default());
        let events = MachineEvents::of(&mailbox);
        let owner = MailboxOwner(Arc::clone(&mailbox));
        for _ in 0..100_000 {
            mailbox.put(MachineEvent::Booted);
            mailbox.put(broken(0));
            mailbox.put(MachineEvent::GuestPanic);
        }
        for _ in 0..1_000 {
            mailbox.put(MachineEvent::Shutdown);
            mailbox.put(MachineEvent::Reset);
            mailbox.put(MachineEvent::VcpuFailed { cpu: 0, reason: String::new() });
        }
        assert_eq!(mailbox.state.lock().waiting.len(), 4, "the mailbox is bounded");
        drop(owner);
        let all: Vec<MachineEvent> = events.collect();
        assert_eq!(all, [MachineEvent::Booted, broken(100_000), MachineEvent::GuestPanic, MachineEvent::Shutdown]);
    }

    #[test]
    fn a_receiver_that_keeps_up_gets_a_bounded_number_of_events() {
        let mailbox = Arc::new(Mailbox::default());
        let events = MachineEvents::of(&mailbox);
        let mut got = Vec::new();
        for _ in 0..1_234 {
            for event in [MachineEvent::Booted, broken(0), MachineEvent::Shutdown] {
                mailbox.put(event);
            }
            while let Ok(event) = events.recv_timeout(Duration::ZERO) {
                got.push(event);
            }
        }
        let wanted = [MachineEvent::Booted, broken(1), MachineEvent::Shutdown, broken(10), broken(100), broken(1_000)];
        assert_eq!(got, wanted);
        mailbox.begin_anew();
        mailbox.put(MachineEvent::Shutdown);
        assert_eq!(events.recv_timeout(Duration::ZERO), Ok(MachineEvent::Shutdown), "of another guest");
        assert_eq!(events.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
    }

    #[test]
    fn a_receiver_that_waits_sees_each_event_and_the_end_of_the_machine() {
        let owner = MailboxOwner(Arc::default());
        let events = MachineEvents::of(&owner.0);
        let receiver = std::thread::spawn(move || events.collect::<Vec<_>>());
        owner.0.put(MachineEvent::Booted);
        owner.0.put(MachineEvent::Reset);
        drop(owner);
        assert_eq!(receiver.join().expect("thread"), [MachineEvent::Booted, MachineEvent::Reset]);
    }

    #[test]
    fn powers_of_ten_are_told_from_other_numbers() {
        assert!([1, 10, 100, 1_000_000].iter().all(|number| is_power_of_ten(*number)));
        assert!([0, 2, 11, 20, 1001, u64::MAX].iter().all(|number| !is_power_of_ten(*number)));
    }
}
