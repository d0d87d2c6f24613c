//! When epochs are cut, how long a capture may take, and when output leaves.
//!
//! ```text
//!  Capture ──▶ the driver pauses, saves, copies, resumes ──▶ Captured, or CaptureFailed
//!     │  heartbeats, commands, timers go on: a heartbeat says that this node is capturing
//!     ├─ heartbeat timeout ──▶ an event reports that the guest is stuck
//!     └─ stall_max ──▶ protected: HandOver to the secondary, look at the record
//!                      │   the secondary's ──▶ Fenced
//!                      │   still ours after handover_timeout ──▶ ask for the guest again (Deciding)
//!                      └─ in a resync: the newcomer is given up
//! ```

use super::types::{Action, OutputCut};
use super::{Phase, Primary};
use crate::protocol::arbitration::ArbiterRequest;
use crate::protocol::event::Event;
use crate::protocol::messages::Message;
use crate::protocol::mutant;
use crate::protocol::peer_loss::PeerLoss;
use crate::protocol::resync::Ledger;
use crate::protocol::types::{ConnId, EpochId, Instant};

/// What the driver was asked to do with the machine and has not finished.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) struct Begun {
    what: BegunWhat,
    since: Instant,
    /// People were told that it takes long.
    reported: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum BegunWhat {
    Tracking(ConnId),
    Capture(EpochId),
}

impl Begun {
    pub(super) fn tracking(conn: ConnId, now: Instant) -> Begun {
        Begun { what: BegunWhat::Tracking(conn), since: now, reported: false }
    }

    /// What a checker needs to know of it.
    pub(super) fn digest(&self, now: Instant, into: &mut impl std::hash::Hasher) {
        std::hash::Hash::hash(&(self.what, now.since(self.since), self.reported), into);
    }
}

impl Primary {
    // ---- begun and done ----

    pub(super) fn is_capturing(&self) -> bool {
        self.begun.is_some_and(|begun| matches!(begun.what, BegunWhat::Capture(_)))
    }

    /// True while a capture lasts so long that people were told of it.
    pub fn is_stuck(&self) -> bool {
        self.is_capturing() && self.begun.is_some_and(|begun| begun.reported)
    }

    fn done(&mut self, what: BegunWhat) {
        self.begun = self.begun.filter(|begun| begun.what != what);
    }

    /// This node was asleep: the driver had no time either.
    pub(super) fn begun_slept(&mut self, unheard: std::time::Duration) {
        if let Some(begun) = &mut self.begun {
            begun.since = begun.since + unheard;
        }
    }

    pub(super) fn tracking(&mut self, conn: ConnId, result: Result<(), String>) {
        self.done(BegunWhat::Tracking(conn));
        if self.phase != Phase::Resync || self.peer.as_ref().is_none_or(|peer| peer.data != conn) {
            return;
        }
        match result {
            Ok(()) => self.tracking = true,
            Err(_) if mutant::is("tracking-failure-ignored") => self.tracking = true,
            Err(why) => self.lose_peer(PeerLoss::CaptureFailed(why)),
        }
    }

    pub(super) fn captured(&mut self, id: EpochId) {
        self.done(BegunWhat::Capture(id));
        self.epochs.captured(id);
        self.hash_preserved(id);
        if mutant::is("release-on-send") && self.phase == Phase::Protected {
            self.actions.push_back(Action::Release { through: id.epoch, before: Instant::from_us(u64::MAX) });
        }
    }

    pub(super) fn capture_failed(&mut self, now: Instant, id: EpochId, why: String) {
        self.done(BegunWhat::Capture(id));
        // One that was begun for an earlier peer says nothing about this one.
        if self.epochs.failed(id, now) {
            self.lose_peer(PeerLoss::CaptureFailed(why));
        }
    }

    /// When a capture that goes on and on next needs attention.
    pub(super) fn stuck_due(&self) -> Option<Instant> {
        let begun = self.begun.filter(|_| self.is_capturing() && self.vouches())?;
        let limit = if begun.reported { self.config.stall_max } else { self.config.heartbeat.timeout };
        Some(begun.since + limit)
    }

    /// True while somebody relies on captures.
    fn vouches(&self) -> bool {
        self.peer.is_some() && matches!(self.phase, Phase::Resync | Phase::Completing | Phase::Protected)
    }

    pub(super) fn mind_capture(&mut self, now: Instant) {
        if !self.is_capturing() || !self.vouches() {
            return;
        }
        let Some(begun) = &mut self.begun else { return };
        let (stuck, stall_max) = (now.since(begun.since), self.config.stall_max);
        if stuck >= self.config.heartbeat.timeout && !begun.reported {
            begun.reported = true;
            self.tell(Event::GuestStuck { stuck, stall_max });
        }
        if stuck < stall_max || mutant::is("stuck-guest-vouched-for-ever") {
            return;
        }
        let why = format!("it did not pause for a capture within {} ms", stuck.as_millis());
        match self.phase {
            Phase::Protected => self.hand_over(now, why),
            _ => self.lose_peer(PeerLoss::CaptureFailed(why)),
        }
    }

    /// The guest cannot go on here: the secondary is asked to take over. Nothing is released any
    /// more, and this node only looks at the record, so that it does not win the guest back while
    /// the secondary asks for it.
    fn hand_over(&mut self, now: Instant, why: String) {
        if let Some(peer) = &self.peer {
            let message = Message::HandOver { reason: why.clone() };
            self.actions.push_back(Action::Send { conn: peer.data, message });
        }
        self.tell(Event::HandedOver { why });
        self.drop_connections();
        self.phase = Phase::Deciding;
        if mutant::is("handed-over-and-released") {
            self.actions.push_back(Action::ReleaseAll);
        }
        self.handed_over_until = Some(now + self.config.handover_timeout);
        if mutant::is("handed-over-without-looking") {
            self.handed_over_until = Some(now);
            return self.not_taken_over(now);
        }
        self.ask(ArbiterRequest::Read);
    }

    /// The record is still ours: nobody has taken the guest that was handed over, yet.
    pub(super) fn not_taken_over(&mut self, now: Instant) {
        match self.handed_over_until {
            Some(until) if now < until => self.arbitration.ask_later(now, ArbiterRequest::Read),
            _ => {
                self.handed_over_until = None;
                let new = self.record.next_solo(self.me);
                self.ask(ArbiterRequest::Swap { expected: Some(self.record), new });
            }
        }
    }

    // ---- captures ----

    pub(super) fn may_capture(&self) -> bool {
        let phase = self.phase == Phase::Protected || (self.phase == Phase::Resync && self.tracking);
        phase && self.begun.is_none() && self.epochs.idle()
    }

    pub(super) fn cuts_on_output(&self) -> bool {
        self.phase == Phase::Protected && (self.config.commit_on_output || self.epochs.is_pressed())
    }

    fn completes(&self) -> bool {
        let ready = self.phase == Phase::Resync && self.pairing_checked && !self.storage_behind;
        ready && self.ledger.as_ref().is_some_and(Ledger::is_done)
    }

    pub(super) fn consider_capture(&mut self, now: Instant) {
        if !self.may_capture() {
            return;
        }
        let completes_resync = self.completes();
        if !completes_resync && now < self.epochs.due(&self.config, self.cuts_on_output()) {
            return;
        }
        let id = self.epochs.begin(now);
        let output = match self.phase {
            Phase::Resync if completes_resync && !mutant::is("hold-one-epoch-late") => OutputCut::Hold,
            Phase::Resync => OutputCut::Pass,
            _ if id.epoch == 0 && mutant::is("hold-one-epoch-late") => OutputCut::Hold,
            _ => OutputCut::Seal,
        };
        if completes_resync {
            self.phase = Phase::Completing;
        }
        self.begun = Some(Begun { what: BegunWhat::Capture(id), since: now, reported: false });
        self.checkpoint_begun(id);
        self.actions.push_back(Action::Capture { id, completes_resync, output });
    }

    // ---- release ----

    pub(super) fn release(&mut self, now: Instant) {
        if self.phase != Phase::Protected || !(self.proven || mutant::is("no-check-after-a-stall")) {
            return;
        }
        let Some(committed) = self.epochs.committed() else { return };
        assert_eq!(committed.generation, self.record.generation, "I1: a commit of another generation releases output");
        assert_eq!(self.record.owner, self.me, "I3: a node releases output that the record gives to another");
        // The peer waits for the whole timeout after our last heartbeat, which left at most one
        // interval ago.
        let mut slack = self.config.heartbeat.timeout.saturating_sub(self.config.heartbeat.interval);
        if mutant::is("release-without-deadline") {
            slack = std::time::Duration::MAX;
        }
        self.actions.push_back(Action::Release { through: committed.epoch, before: now + slack });
        self.write_through(committed);
    }
}
