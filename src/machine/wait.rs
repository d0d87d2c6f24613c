//! The wait port: how an idle guest sleeps, and the doorbell that wakes it.
//!
//! `out 0x600, eax` says that the guest has nothing to do for `eax` microseconds. The vCPU thread
//! then sleeps until a device used a buffer, the time is over, or the machine is paused. Arrivals
//! are counted, per vCPU: one that comes between the guest's last poll and its `out` finds the
//! count moved and the wait returns at once. A pause does not end a wait: the thread comes back to
//! it after the resume, so that an idle guest stays idle from epoch to epoch. In a restored machine
//! no wait is pending: the guest's `out` is complete in its state, so it simply polls again.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::futex;

/// The wait port (32-bit, out).
pub const WAIT_PORT: u16 = 0x600;
/// The event port (32-bit, out).
pub const EVENT_PORT: u16 = 0x604;
/// The value that stands for "no limit".
pub const WAIT_FOREVER: u32 = u32::MAX;

/// The doorbell of one vCPU.
#[derive(Default)]
pub(super) struct Doorbell {
    /// Goes up with each used buffer.
    rings: AtomicU32,
    /// Goes up with each ring and each probe: the word a waiter sleeps on.
    bell: AtomicU32,
    sleeps: AtomicBool,
}

/// Why a wait came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Woken {
    /// A device used a buffer, or the time is over: the guest goes on.
    Done,
    /// The controller wants the thread; the wait is not over.
    Wanted,
}

/// A wait the guest asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wait {
    /// When it is over; never, without one.
    pub(super) deadline: Option<Instant>,
}

impl Wait {
    /// The wait that writing `us` to the port asks for, beginning now.
    pub(super) fn begin(us: u32) -> Wait {
        let deadline = (us != WAIT_FOREVER).then(|| Instant::now() + Duration::from_micros(u64::from(us)));
        Wait { deadline }
    }
}

impl Doorbell {
    /// A device used a buffer.
    pub(super) fn ring(&self) {
        self.rings.fetch_add(1, Ordering::SeqCst);
        self.probe();
    }

    /// How many rings there have been.
    pub(super) fn count(&self) -> u32 {
        self.rings.load(Ordering::SeqCst)
    }

    /// Makes a waiter look up, without counting as an arrival.
    pub(super) fn probe(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        if self.sleeps.load(Ordering::SeqCst) {
            futex::wake_all(&self.bell);
        }
    }

    /// Waits until the doorbell rings, `wait` is over, or `wanted` says that the thread is needed.
    /// `seen` is the count of rings that earlier waits have answered; it is brought up to date when
    /// the wait is done.
    pub(super) fn wait(&self, wait: Wait, seen: &mut u32, wanted: impl Fn() -> bool) -> Woken {
        loop {
            let bell = self.bell.load(Ordering::SeqCst);
            let rings = self.rings.load(Ordering::SeqCst);
            if rings != *seen {
                *seen = rings;
                return Woken::Done;
            }
            if wanted() {
                return Woken::Wanted;
            }
            let left = wait.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Woken::Done;
            }
            self.sleeps.store(true, Ordering::SeqCst);
            futex::wait(&self.bell, bell, left);
            self.sleeps.store(false, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_early_ring_is_not_lost() {
        let bell = Doorbell::default();
        let mut seen = 0;
        bell.ring();
        assert_eq!(bell.wait(Wait::begin(WAIT_FOREVER), &mut seen, || false), Woken::Done);
        assert_eq!(bell.wait(Wait::begin(0), &mut seen, || false), Woken::Done);
        assert_eq!(bell.wait(Wait::begin(WAIT_FOREVER), &mut seen, || true), Woken::Wanted);
    }

    #[test]
    fn a_ring_ends_a_wait_without_limit() {
        let bell = Arc::new(Doorbell::default());
        let waiter = std::thread::spawn({
            let bell = Arc::clone(&bell);
            move || {
                let mut seen = 0;
                for _ in 0..1_000 {
                    assert_eq!(bell.wait(Wait::begin(WAIT_FOREVER), &mut seen, || false), Woken::Done);
                    if seen >= 1_000 {
                        return;
                    }
                }
            }
        });
        while !waiter.is_finished() {
            bell.ring();
            std::thread::yield_now();
        }
        waiter.join().expect("waiter");
    }

    #[test]
    fn a_probe_shows_that_the_thread_is_wanted() {
        use std::sync::atomic::AtomicBool;
        let bell = Arc::new(Doorbell::default());
        let wanted = Arc::new(AtomicBool::new(false));
        let waiter = std::thread::spawn({
            let (bell, wanted) = (Arc::clone(&bell), Arc::clone(&wanted));
            move || bell.wait(Wait::begin(WAIT_FOREVER), &mut 0, || wanted.load(Ordering::SeqCst))
        });
        wanted.store(true, Ordering::SeqCst);
        bell.probe();
        assert_eq!(waiter.join().expect("waiter"), Woken::Wanted);
    }
}
