//! How one thread tells many what to do next and learns when they do it.

use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

struct State<P> {
    wanted: P,
    reached: Vec<P>,
}

/// The phase that is wanted of a number of workers, and the one each of them has reached.
pub(super) struct PhaseBarrier<P> {
    state: Mutex<State<P>>,
    changed: Condvar,
}

impl<P: Copy + Eq> PhaseBarrier<P> {
    /// For `workers` workers, which all begin in `phase`.
    pub(super) fn new(phase: P, workers: usize) -> PhaseBarrier<P> {
        PhaseBarrier {
            state: Mutex::new(State { wanted: phase, reached: vec![phase; workers] }),
            changed: Condvar::new(),
        }
    }

    /// Asks every worker for `phase`.
    pub(super) fn ask(&self, phase: P) {
        self.state.lock().wanted = phase;
        self.changed.notify_all();
    }

    /// Whether every worker has reached `phase`.
    pub(super) fn all_reached(&self, phase: P) -> bool {
        self.state.lock().reached.iter().all(|reached| *reached == phase)
    }

    /// Waits until every worker has reached `phase`; false if that took longer than `timeout`.
    pub(super) fn wait_all_reached(&self, phase: P, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        while !state.reached.iter().all(|reached| *reached == phase) {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                return state.reached.iter().all(|reached| *reached == phase);
            }
        }
        true
    }

    /// Worker number `worker` says that it has reached `phase`.
    pub(super) fn reached(&self, worker: usize, phase: P) {
        if let Some(place) = self.state.lock().reached.get_mut(worker) {
            *place = phase;
        }
        self.changed.notify_all();
    }

    /// Waits until something else than `phase` is wanted and tells what, or `phase` when `timeout`
    /// is over.
    pub(super) fn wait_other(&self, phase: P, timeout: Option<Duration>) -> P {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = self.state.lock();
        while state.wanted == phase {
            match deadline {
                None => self.changed.wait(&mut state),
                Some(deadline) if self.changed.wait_until(&mut state, deadline).timed_out() => break,
                Some(_) => {}
            }
        }
        state.wanted
    }
}
