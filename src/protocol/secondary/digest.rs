//! What a checker of all states needs to know of a secondary.

use std::hash::{Hash, Hasher};

use super::{Action, Secondary};
use crate::protocol::types::Instant;

impl Secondary {
    /// Tells a checker that explores all states what this one is: two secondaries with the same
    /// digest do the same from now on, whatever happens. Times count from `now`, so that it does
    /// not matter when a state came about; words for people are left out.
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        // Named one by one: a field that is new must find its place here.
        #[rustfmt::skip]
        let Secondary {
            config: _, me, phase, conns, data, heartbeat, step_at, welcome, made, life, guard, generation,
            expected, committed, began: _, record, inheritance, hashing, resync_left, arbitration, done_bytes, whole,
            cause: _, stages: _, no_primary: _, busy_times, quitting, quit_in_takeover, actions,
        } = self;
        (me, phase, conns, data, heartbeat, step_at.map(|at| at.since(now))).hash(into);
        welcome.as_ref().map(|welcome| (welcome.instance, welcome.generation)).hash(into);
        (generation, expected, committed, record, done_bytes, whole, quitting, quit_in_takeover).hash(into);
        busy_times.hash(into);
        (made, hashing, resync_left).hash(into);
        (life.is_some(), guard.is_some(), inheritance.as_ref().map(|inheritance| inheritance.digest())).hash(into);
        if let Some((timer, detector)) = life {
            timer.digest(now, into);
            detector.digest(now, into);
        }
        if let Some(guard) = guard {
            guard.digest(now, into);
        }
        arbitration.digest(now, into);
        for action in actions {
            match action {
                Action::Tell(_) => {}
                Action::Promote { record, epoch, began: _, stages: _, cause: _ } => (record, epoch).hash(into),
                Action::Heartbeat { conn, beat, until: _ } => (conn, beat).hash(into),
                other => other.hash(into),
            }
        }
    }
}
