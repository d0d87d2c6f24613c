//! What a primary asks of the arbiter, and what follows from each answer.

use super::{Action, Phase, Primary};
use super::{End, Input};
use crate::protocol::arbitration::{ArbiterRequest, Verdict};
use crate::protocol::event::Event;
use crate::protocol::messages::{Message, RefuseReason};
use crate::protocol::mutant;
use crate::protocol::peer_loss::PeerLoss;
use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::Instant;

impl Primary {
    pub(super) fn ask(&mut self, request: ArbiterRequest) {
        let call = self.arbitration.ask(request);
        self.actions.push_back(Action::Ask(call));
    }

    pub(super) fn notice_stall(&mut self, now: Instant) {
        let Some(slept) = self.guard.look(now) else { return };
        if let Some(peer) = &mut self.peer {
            peer.slept(now, slept);
        }
        self.begun_slept(slept.unheard);
        let Some(stall) = slept.stall else { return };
        if matches!(self.phase, Phase::Pairing | Phase::Protected) {
            self.tell(Event::Stalled { stall });
            self.prove_again();
        }
    }

    pub(super) fn prove_again(&mut self) {
        self.proven = false;
        if self.phase == Phase::Protected {
            self.ask(ArbiterRequest::Read);
        }
    }

    pub(super) fn verdict(&mut self, now: Instant, verdict: Verdict) {
        match (self.phase, verdict) {
            (Phase::Pairing, Verdict::Won(record)) => self.paired(record),
            (Phase::Deciding, Verdict::Won(record)) => self.alone(record),
            (Phase::Stopping, Verdict::Won(record)) => {
                // What the disks are stamped with: with an older one they would be taken for
                // outdated.
                self.record = record;
                self.end();
            }
            (_, Verdict::Won(record)) if record == self.record => self.confirmed(now),
            (Phase::Stopping, Verdict::Stands(Some(record)))
                if self.is_ours_since(&record) && !mutant::is("stop-only-from-the-old-record") =>
            {
                // A swap asked for before the shutdown was carried out after all: stop from there.
                self.begin_generation(record);
                self.ask_to_stop();
            }
            (_, Verdict::Stands(Some(record))) if record == self.record => self.confirmed(now),
            (Phase::Deciding, Verdict::Stands(Some(_))) if mutant::is("lost-swap-ignored") => {
                self.alone(self.record.next_solo(self.me));
            }
            (_, Verdict::Stands(record)) => self.fence(record),
            (_, Verdict::Won(_) | Verdict::Unreachable(_)) => {}
        }
    }

    /// True for a record that followed ours and still says that this node runs the guest.
    pub(super) fn is_ours_since(&self, record: &Record) -> bool {
        record.owner == self.me && record.state != RecordState::Stopped && record.generation > self.record.generation
    }

    pub(super) fn confirmed(&mut self, now: Instant) {
        match self.phase {
            Phase::Resync => self.pairing_checked = true,
            Phase::Deciding => self.not_taken_over(now),
            Phase::Protected => {
                self.proven = true;
                self.release(now);
            }
            _ => {}
        }
    }

    pub(super) fn paired(&mut self, record: Record) {
        self.begin_generation(record);
        self.ledger = None;
        let Some(peer) = &self.peer else {
            // It died while the arbiter thought: the pair is on record, so going on alone takes
            // another swap.
            self.phase = Phase::Deciding;
            self.ask(ArbiterRequest::Swap { expected: Some(record), new: record.next_solo(self.me) });
            return;
        };
        let (conn, instance) = (peer.data, peer.instance);
        self.phase = Phase::Protected;
        self.stopped_by_full_output = false;
        self.actions.push_back(Action::Send { conn, message: Message::Paired { record } });
        self.tell(Event::Protected { generation: record.generation, peer: instance });
        if self.quitting {
            self.actions.push_back(Action::Exit(End::Quit));
        } else if !self.proven {
            self.ask(ArbiterRequest::Read);
        }
    }

    pub(super) fn alone(&mut self, record: Record) {
        let was_paired = self.record.state == RecordState::Paired;
        self.begin_generation(record);
        self.proven = true;
        self.go_solo();
        self.tell(if was_paired {
            Event::Unprotected { why: "the secondary is gone".into() }
        } else {
            Event::NewcomerLost { why: PeerLoss::Left("as its image became whole".into()) }
        });
        if self.ends_with_the_answer() {
            self.shut_down();
        }
    }

    pub(super) fn begin_generation(&mut self, record: Record) {
        self.record = record;
        self.epochs.begin_generation(record.generation);
    }

    pub(super) fn fence(&mut self, record: Option<Record>) {
        let why = match record {
            Some(record) => format!("the arbiter's record is {} owned by {:?}", record.generation, record.owner),
            None => "the arbiter has no record of this guest".into(),
        };
        self.drop_connections();
        self.arbitration.forget();
        if mutant::is("fence-releases-first") {
            self.actions.push_back(Action::ReleaseAll);
        }
        self.phase = Phase::Fenced;
        self.guest_runs = false;
        self.actions.push_back(Action::Fence);
        self.tell(Event::Fenced { why });
        if self.ends_with_the_answer() {
            self.actions.push_back(Action::Exit(End::Fenced));
        }
    }

    pub(super) fn handle_fenced(&mut self, input: Input) {
        match input {
            Input::Command { ticket, command } => self.command(ticket, command),
            Input::RunDone { run, result } => self.run_done(run, result),
            Input::Snapshot { stop } => self.take_snapshot(stop),
            Input::Hello { conn, .. } => {
                let detail = "this node is fenced: another node runs the guest; name that one with --peer".into();
                self.refuse(conn, RefuseReason::NotPrimary, detail);
            }
            _ => {}
        }
    }
}
