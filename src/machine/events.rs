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
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::protocol::guest_event::GuestEvent;

#[derive(Default)]
struct State {
    /// At most one end, one boot, one panic, and one for each kind of device.
    waiting: VecDeque<GuestEvent>,
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
    fn put(&mut self, event: GuestEvent) {
        let latch = match &event {
            GuestEvent::Booted => &mut self.booted,
            GuestEvent::Panicked => &mut self.panicked,
            GuestEvent::DeviceBroken { device, reason, .. } => return self.put_broken(device, reason),
            GuestEvent::Shutdown | GuestEvent::Reset | GuestEvent::VcpuFailed { .. } => &mut self.ended,
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
        let now = GuestEvent::DeviceBroken { device, reason: reason.to_owned(), count: *times };
        let is_same =
            |event: &&mut GuestEvent| matches!(event, GuestEvent::DeviceBroken { device: d, .. } if *d == device);
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
    pub(super) fn put(&self, event: GuestEvent) {
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
    pub fn recv(&self) -> Option<GuestEvent> {
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
    pub fn recv_timeout(&self, timeout: Duration) -> Result<GuestEvent, RecvTimeoutError> {
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
    type Item = GuestEvent;

    fn next(&mut self) -> Option<GuestEvent> {
        self.recv()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(count: u64) -> GuestEvent {
        GuestEvent::DeviceBroken { device: "disk", reason: "a loop".to_owned(), count }
    }

    #[test]
    fn the_first_end_is_delivered_once_whatever_else_comes() {
        let mailbox = Arc::new(Mailbox::default());
        let events = MachineEvents::of(&mailbox);
        let owner = MailboxOwner(Arc::clone(&mailbox));
        for _ in 0..100_000 {
            mailbox.put(GuestEvent::Booted);
            mailbox.put(broken(0));
            mailbox.put(GuestEvent::Panicked);
        }
        for _ in 0..1_000 {
            mailbox.put(GuestEvent::Shutdown);
            mailbox.put(GuestEvent::Reset);
            mailbox.put(GuestEvent::VcpuFailed { cpu: 0, reason: String::new() });
        }
        assert_eq!(mailbox.state.lock().waiting.len(), 4, "the mailbox is bounded");
        drop(owner);
        let all: Vec<GuestEvent> = events.collect();
        assert_eq!(all, [GuestEvent::Booted, broken(100_000), GuestEvent::Panicked, GuestEvent::Shutdown]);
    }

    #[test]
    fn a_receiver_that_keeps_up_gets_a_bounded_number_of_events() {
        let mailbox = Arc::new(Mailbox::default());
        let events = MachineEvents::of(&mailbox);
        let mut got = Vec::new();
        for _ in 0..1_234 {
            for event in [GuestEvent::Booted, broken(0), GuestEvent::Shutdown] {
                mailbox.put(event);
            }
            while let Ok(event) = events.recv_timeout(Duration::ZERO) {
                got.push(event);
            }
        }
        let wanted = [GuestEvent::Booted, broken(1), GuestEvent::Shutdown, broken(10), broken(100), broken(1_000)];
        assert_eq!(got, wanted);
        mailbox.begin_anew();
        mailbox.put(GuestEvent::Shutdown);
        assert_eq!(events.recv_timeout(Duration::ZERO), Ok(GuestEvent::Shutdown), "of another guest");
        assert_eq!(events.recv_timeout(Duration::ZERO), Err(RecvTimeoutError::Timeout));
    }

    #[test]
    fn a_receiver_that_waits_sees_each_event_and_the_end_of_the_machine() {
        let owner = MailboxOwner(Arc::default());
        let events = MachineEvents::of(&owner.0);
        let receiver = std::thread::spawn(move || events.collect::<Vec<_>>());
        owner.0.put(GuestEvent::Booted);
        owner.0.put(GuestEvent::Reset);
        drop(owner);
        assert_eq!(receiver.join().expect("thread"), [GuestEvent::Booted, GuestEvent::Reset]);
    }

    #[test]
    fn powers_of_ten_are_told_from_other_numbers() {
        assert!([1, 10, 100, 1_000_000].iter().all(|number| is_power_of_ten(*number)));
        assert!([0, 2, 11, 20, 1001, u64::MAX].iter().all(|number| !is_power_of_ten(*number)));
    }
}
