//! Who drives a node's engine: the thread that has an event for it, or the engine's own.
//!
//! ```text
//!  reader with a message ─┐
//!  machine thread, woken  ├─▶ inbox ─▶ free? drive it here ─▶ until nothing waits
//!    by waiting output ───┘               └─ driven by another thread ─▶ wake the engine's own thread
//!  all others ──────────────▶ inbox ─▶ the engine's own thread, which keeps the timers too
//! ```
//!
//! A wake-up costs more than all an engine does about an event, so on the way from the guest's
//! output to its release nobody wakes an engine only to have it wake somebody else. Rules do not
//! change with the thread that drives: every event goes through the inbox, in the inbox's order,
//! and one thread drives at a time.

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::error::NodeError;
use super::inbox::{Driver, Inbox, Queues};
use crate::protocol::types::Instant;

/// Steps that a thread does for the engine before it goes back to its own work. Whatever then
/// waits is the engine's own thread's.
const STEPS_MAX: u32 = 32;

/// What a step left.
pub(super) enum Step {
    /// Something may wait.
    Busy,
    /// Nothing waits; it is time for a step then.
    Idle(Option<Instant>),
    /// The engine's work is done.
    Ended,
}

/// One that is driven in steps. No step waits for anything.
pub(super) trait Engine: Send + 'static {
    /// Carries out what the protocol wants and takes the next event from `queues`.
    ///
    /// # Errors
    /// What this node cannot go on after.
    fn step(&mut self, queues: &Queues) -> Result<Step, NodeError>;
}

struct State<E> {
    /// Absent once its own thread has taken it back.
    engine: Option<E>,
    /// A step is under way: still so when nobody drives, it has panicked.
    stepping: bool,
    ended: bool,
    failed: Option<NodeError>,
}

impl<E: Engine> State<E> {
    /// Steps until nothing waits, or the engine has ended, or `steps_max` is reached.
    fn drive(&mut self, queues: &Queues, steps_max: Option<u32>) -> Step {
        if std::mem::replace(&mut self.stepping, true) {
            self.failed.get_or_insert(NodeError::Gone);
        }
        let step = self.steps(queues, steps_max);
        self.stepping = false;
        step
    }

    fn steps(&mut self, queues: &Queues, steps_max: Option<u32>) -> Step {
        let mut steps = 0;
        loop {
            let Some(engine) = self.engine.as_mut().filter(|_| !self.ended && self.failed.is_none()) else {
                return Step::Ended;
            };
            match engine.step(queues) {
                Ok(Step::Busy) => {}
                Ok(idle @ Step::Idle(_)) => return idle,
                Ok(Step::Ended) => self.ended = true,
                Err(error) => self.failed = Some(error),
            }
            steps += 1;
            if steps_max.is_some_and(|max| steps >= max) {
                return Step::Busy;
            }
        }
    }
}

struct Shared<E> {
    state: Mutex<State<E>>,
    queues: Queues,
    /// Until when the engine's own thread sleeps, if nobody wakes it; written by who drives.
    sleeps_until_us: AtomicU64,
}

impl<E: Engine> Driver for Shared<E> {
    fn try_drive(&self) -> bool {
        let Some(mut state) = self.state.try_lock() else { return false };
        match state.drive(&self.queues, Some(STEPS_MAX)) {
            Step::Idle(None) => true,
            // Its own thread keeps the timers.
            Step::Idle(Some(until)) => until.us >= self.sleeps_until_us.load(Ordering::Relaxed),
            Step::Busy | Step::Ended => false,
        }
    }
}

/// Drives an engine until its work is done, and gives it back. Threads with an event for it drive
/// it too.
///
/// # Errors
/// What a step failed with.
pub(super) fn run<E: Engine>(engine: E, inbox: &Inbox) -> Result<E, NodeError> {
    let state = State { engine: Some(engine), stepping: false, ended: false, failed: None };
    let shared = Arc::new(Shared {
        state: Mutex::new(state),
        queues: inbox.queues().clone(),
        sleeps_until_us: AtomicU64::new(u64::MAX),
    });
    // The cast is to the trait object; the engine's threads keep nothing of it alive.
    let driver: Weak<dyn Driver> = Arc::downgrade(&(Arc::clone(&shared) as Arc<dyn Driver>));
    inbox.set_driver(Some(driver));
    loop {
        let mut state = shared.state.lock();
        let until = match state.drive(&shared.queues, None) {
            Step::Busy => continue,
            Step::Idle(until) => until,
            Step::Ended => break,
        };
        shared.sleeps_until_us.store(until.map_or(u64::MAX, |until| until.us), Ordering::Relaxed);
        drop(state);
        inbox.wait(until);
    }
    inbox.set_driver(None);
    let mut state = shared.state.lock();
    let (engine, failed) = (state.engine.take(), state.failed.take());
    drop(state);
    match (engine, failed) {
        (Some(engine), None) => Ok(engine),
        (_, failed) => Err(failed.unwrap_or(NodeError::Gone)),
    }
}
