//! What a checker of all states needs to know of a primary.

use std::hash::{Hash, Hasher};

use super::{Action, Primary};
use crate::protocol::messages::features;
use crate::protocol::types::Instant;

impl Primary {
    /// Tells a checker that explores all states what this one is: two primaries with the same
    /// digest do the same from now on, whatever happens. Times count from `now`, so that it does
    /// not matter when a state came about; words for people are left out.
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        // Named one by one: a field that is new must find its place here.
        #[rustfmt::skip]
        let Primary {
            config, me, record, phase, candidates, peer, refusals: _, begun, tracking, handed_over_until, epochs,
            ledger, comparison, hole_search, tickets, verify, progress_at, verify_at, arbitration, guard, proven,
            pairing_checked, storage_behind, stopped_by_operator, stopped_by_full_output, snapshot, quitting, restart,
            guest_alarm: _, guest_runs, pending, actions,
        } = self;
        (me, record, phase, ledger, proven, pairing_checked, storage_behind, tracking).hash(into);
        begun.is_some().hash(into);
        begun.iter().for_each(|begun| begun.digest(now, into));
        (handed_over_until.map(|until| until.since(now)), restart, pending).hash(into);
        candidates.iter().for_each(|candidate| candidate.digest(now, into));
        (comparison, hole_search, tickets, verify).hash(into);
        if self.peer_features() & features::DISK_HASHES != 0 {
            (progress_at.since(now), verify_at.since(now)).hash(into);
        }
        (stopped_by_operator, stopped_by_full_output, snapshot, quitting, guest_runs).hash(into);
        peer.is_some().hash(into);
        if let Some(peer) = peer {
            peer.digest(now, into);
        }
        epochs.digest(config, now, into);
        arbitration.digest(now, into);
        guard.digest(now, into);
        for action in actions {
            match action {
                Action::Tell(_) => {}
                Action::Release { through, before } => (through, before.since(now)).hash(into),
                Action::Heartbeat { conn, beat, until: _ } => (conn, beat).hash(into),
                other => other.hash(into),
            }
        }
    }
}
