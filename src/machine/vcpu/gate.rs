//! The pause word: how a controller tells a vCPU thread to run, park, apply a state or quit, and
//! how it learns that it did.
//!
//! The word carries a *sequence number* beside the order. Without it a quick pause, resume, pause
//! would be lost: a thread that sleeps through the middle would see the same word as before and
//! report the first pause for the second. So every order is a new word, and a thread reports
//! exactly the word it obeyed.
//!
//! The kick that cannot be lost has four steps, in this order, all sequentially consistent:
//!
//! ```text
//! controller                                vCPU thread
//! 1 word := Park(n)                         a immediate_exit := 0      (only after it was un-parked)
//! 2 immediate_exit := 1                     b read the word            (re-check)
//! 3 ring the doorbell (wakes the wait port) c KVM_RUN                  (reads immediate_exit)
//! 4 signal the thread
//! ```
//!
//! If b misses 1, then a came before 2, so c sees `immediate_exit` (or is already in the guest and
//! gets the signal of 4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::machine::futex;
use crate::machine::pause::PauseSignal;

/// What a vCPU thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(in crate::machine) enum Order {
    /// Run the guest.
    Run = 0,
    /// Finish pending I/O and stop. What only this vCPU can change of its state goes into
    /// the slot.
    Park = 1,
    /// Stay parked and complete the slot: no other vCPU and no device runs any more, so every
    /// interrupt on its way has arrived.
    Harvest = 2,
    /// While parked: put the slot's state into the vCPU.
    Apply = 3,
    /// End the thread.
    Quit = 4,
}

const ORDER_BITS: u32 = 3;

/// One order: the word as a whole, unlike any order shortly before or after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::machine) struct Ticket(u32);

impl Ticket {
    /// The order this ticket stands for.
    pub(in crate::machine) fn order(self) -> Order {
        match self.0 & ((1 << ORDER_BITS) - 1) {
            0 => Order::Run,
            1 => Order::Park,
            2 => Order::Harvest,
            3 => Order::Apply,
            _ => Order::Quit,
        }
    }
}

/// How long a side looks at the word before it sleeps on it. Waking a sleeper costs about 20 µs, so
/// a short look pays where there are cores enough for both sides.
#[derive(Clone, Copy, Debug)]
pub(in crate::machine) struct SpinLimit {
    /// The controller's, waiting for a vCPU to park.
    pub(in crate::machine) controller: Duration,
    /// The vCPU's, waiting to be resumed.
    pub(in crate::machine) vcpu: Duration,
}

/// How far a vCPU thread has come with an order. A controller can wait for each.
#[derive(Default)]
struct Milestone {
    word: AtomicU32,
    controller_sleeps: AtomicBool,
}

impl Milestone {
    fn reach(&self, ticket: Ticket) {
        self.word.store(ticket.0, Ordering::SeqCst);
        if self.controller_sleeps.load(Ordering::SeqCst) {
            futex::wake_all(&self.word);
        }
    }

    fn wait(&self, ticket: Ticket, spin_max: Duration, limit: Duration) -> bool {
        if spin(spin_max, || self.word.load(Ordering::SeqCst) == ticket.0) {
            return true;
        }
        let deadline = Instant::now() + limit;
        self.controller_sleeps.store(true, Ordering::SeqCst);
        let in_time = loop {
            let seen = self.word.load(Ordering::SeqCst);
            if seen == ticket.0 {
                break true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            futex::wait(&self.word, seen, Some(left));
        };
        self.controller_sleeps.store(false, Ordering::SeqCst);
        in_time
    }
}

/// The pause word of one vCPU, and two milestones on the way of each order: *stopped* (the vCPU is
/// out of the guest and its I/O is complete: guest memory does not change as far as it goes) and
/// *settled* (its state is in the slot: all is done). Between the two the vCPU thread is busy
/// reading its state, which a controller can use to copy memory.
pub(in crate::machine) struct Gate {
    word: AtomicU32,
    vcpu_sleeps: AtomicBool,
    stopped: Milestone,
    settled: Milestone,
    /// A pause waits for several vCPUs and devices at once.
    pause_signal: Arc<PauseSignal>,
    spin_limit: SpinLimit,
}

impl Gate {
    /// A gate that says `Park`, with nothing done yet.
    pub(in crate::machine) fn new(spin_limit: SpinLimit, pause_signal: Arc<PauseSignal>) -> Gate {
        Gate {
            word: AtomicU32::new(Order::Park as u32),
            vcpu_sleeps: AtomicBool::new(false),
            stopped: Milestone::default(),
            settled: Milestone::default(),
            pause_signal,
            spin_limit,
        }
    }

    /// The newest order.
    pub(in crate::machine) fn current(&self) -> Ticket {
        Ticket(self.word.load(Ordering::SeqCst))
    }

    /// Controller: gives an order and wakes a parked thread. A thread in the guest must be kicked
    /// too.
    pub(in crate::machine) fn give(&self, order: Order) -> Ticket {
        let sequence = (self.word.load(Ordering::SeqCst) >> ORDER_BITS).wrapping_add(1);
        let word = (sequence << ORDER_BITS) | order as u32;
        self.word.store(word, Ordering::SeqCst);
        if self.vcpu_sleeps.load(Ordering::SeqCst) {
            futex::wake_all(&self.word);
        }
        Ticket(word)
    }

    /// vCPU: says that it is out of the guest.
    pub(in crate::machine) fn stop(&self, ticket: Ticket) {
        self.stopped.reach(ticket);
        self.pause_signal.notify();
    }

    /// vCPU: says that the order of `ticket` has been carried out.
    pub(in crate::machine) fn settle(&self, ticket: Ticket) {
        self.settled.reach(ticket);
    }

    /// vCPU: waits until there is an order newer than `ticket`.
    pub(in crate::machine) fn wait_after(&self, ticket: Ticket) {
        if spin(self.spin_limit.vcpu, || self.current() != ticket) {
            return;
        }
        self.vcpu_sleeps.store(true, Ordering::SeqCst);
        while self.current() == ticket {
            futex::wait(&self.word, ticket.0, None);
        }
        self.vcpu_sleeps.store(false, Ordering::SeqCst);
    }

    /// Controller: true when the vCPU obeying `ticket` is out of the guest.
    pub(in crate::machine) fn has_stopped(&self, ticket: Ticket) -> bool {
        self.stopped.word.load(Ordering::SeqCst) == ticket.0
    }

    /// How long either side looks before it sleeps.
    pub(in crate::machine) fn spin_limit(&self) -> SpinLimit {
        self.spin_limit
    }

    /// Controller: waits until the vCPU obeying `ticket` is out of the guest; false if it was not
    /// within `limit`.
    pub(in crate::machine) fn wait_stopped(&self, ticket: Ticket, limit: Duration) -> bool {
        self.stopped.wait(ticket, self.spin_limit.controller, limit)
    }

    /// Controller: waits until `ticket` has been carried out; false if it was not within `limit`.
    pub(in crate::machine) fn wait_settled(&self, ticket: Ticket, limit: Duration) -> bool {
        self.settled.wait(ticket, self.spin_limit.controller, limit)
    }
}

/// Looks at `done` for at most `limit`; true if it came true.
pub(in crate::machine) fn spin(limit: Duration, done: impl Fn() -> bool) -> bool {
    if done() {
        return true;
    }
    if limit.is_zero() {
        return false;
    }
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() >= limit {
            return false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread that obeys a gate and counts what it did.
    fn obey(gate: &Gate) -> (u32, u32) {
        let (mut runs, mut parks) = (0, 0);
        loop {
            let ticket = gate.current();
            match ticket.order() {
                Order::Quit => {
                    gate.settle(ticket);
                    return (runs, parks);
                }
                Order::Run => {
                    runs += 1;
                    std::hint::spin_loop();
                }
                Order::Park | Order::Harvest | Order::Apply => {
                    parks += 1;
                    gate.stop(ticket);
                    gate.settle(ticket);
                    gate.wait_after(ticket);
                }
            }
        }
    }

    #[test]
    fn no_order_is_lost_however_quickly_they_follow() {
        for spin_us in [0, 20] {
            let spin_max = Duration::from_micros(spin_us);
            let spin_limit = SpinLimit { controller: spin_max, vcpu: spin_max };
            let gate = Arc::new(Gate::new(spin_limit, Arc::default()));
            let thread = std::thread::spawn({
                let gate = Arc::clone(&gate);
                move || obey(&gate)
            });
            let limit = Duration::from_secs(20);
            for _ in 0..20_000 {
                let park = gate.give(Order::Park);
                assert!(gate.wait_stopped(park, limit));
                gate.give(Order::Run);
                let again = gate.give(Order::Park);
                assert!(gate.wait_settled(again, limit));
            }
            let quit = gate.give(Order::Quit);
            assert!(gate.wait_settled(quit, limit));
            let (_, parks) = thread.join().expect("thread");
            assert!(parks >= 40_000);
        }
    }

    #[test]
    fn a_thread_that_does_not_come_is_noticed() {
        let gate = Gate::new(SpinLimit { controller: Duration::ZERO, vcpu: Duration::ZERO }, Arc::default());
        let park = gate.give(Order::Park);
        assert!(!gate.wait_settled(park, Duration::from_millis(1)));
    }
}
