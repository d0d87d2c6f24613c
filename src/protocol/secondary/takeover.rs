//! How a secondary gets the guest: it suspects its primary, asks the arbiter, becomes a primary.

use super::{Action, Ending, Phase, Secondary};
use crate::protocol::arbitration::{ArbiterRequest, Verdict};
use crate::protocol::event::{Event, RejoinReason};
use crate::protocol::mutant;
use crate::protocol::peer_loss::PeerLoss;
use crate::protocol::primary::{Primary, PrimaryConfig};
use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::Instant;

impl Secondary {
    /// The primary that this node becomes once the guest is restored under `record`.
    pub fn lead(&self, config: PrimaryConfig, record: Record, now: Instant) -> Primary {
        let mut primary = Primary::new(config, self.me, record, now);
        if self.quit_in_takeover {
            primary.quit_from_the_start();
        }
        primary
    }

    pub(super) fn lose_primary(&mut self, now: Instant, why: PeerLoss) {
        match self.phase {
            Phase::Standby | Phase::Paired => {
                self.close_connections();
                self.phase = Phase::Deciding;
                self.cause = why.to_string();
                self.stages.suspected = now;
                self.tell(Event::Suspected { why });
                self.ask_for_the_guest();
            }
            Phase::Deciding | Phase::Locking | Phase::Promoted | Phase::Done => {}
            _ => self.start_over(now, why),
        }
    }

    /// Asks for the guest, from the record this node knows. Before it has heard of its pair that is
    /// the one the primary ran alone under: while that stands, nothing has left since the capture
    /// that made our image whole. If the pair came on record meanwhile, the answer says so, and the
    /// guest is asked for from there.
    fn ask_for_the_guest(&mut self) {
        let Some(primary) = self.primary() else { return };
        let expected = self.record.unwrap_or(Record::solo(self.generation, primary));
        if self.record.is_none() && mutant::is("standby-reads-first") {
            return self.ask(ArbiterRequest::Read);
        }
        self.ask(ArbiterRequest::Swap { expected: Some(expected), new: expected.next_solo(self.me) });
    }

    pub(super) fn ask(&mut self, request: ArbiterRequest) {
        let call = self.arbitration.ask(request);
        self.actions.push_back(Action::Ask(call));
    }

    pub(super) fn verdict(&mut self, verdict: Verdict) {
        if self.phase == Phase::Locking
            && let Verdict::Stands(record) = verdict
        {
            return self.still_ours(record);
        }
        if self.phase != Phase::Deciding {
            return;
        }
        match verdict {
            Verdict::Stands(Some(record)) if mutant::is("secondary-ignores-a-lost-swap") => {
                self.promote(record.next_solo(self.me));
            }
            Verdict::Won(record) => self.inherit(record),
            Verdict::Stands(Some(record)) => self.lost_to(record),
            Verdict::Stands(None) => self.rejoin(RejoinReason::NoRecord),
            Verdict::Unreachable(_) => {}
        }
    }

    fn lost_to(&mut self, record: Record) {
        match record.state {
            RecordState::Stopped => self.exit(Ending::GuestEnded("the guest was shut down".into())),
            RecordState::Solo if mutant::is("takes-over-a-solo-guest") && self.record.is_none() => {
                self.record = Some(record);
                self.ask(ArbiterRequest::Swap { expected: Some(record), new: record.next_solo(self.me) });
            }
            RecordState::Paired
                if record.peer == Some(self.me) && self.record.is_none() && !mutant::is("standby-gives-up") =>
            {
                self.record = Some(record);
                self.ask_for_the_guest();
            }
            _ => self.rejoin(RejoinReason::GuestElsewhere),
        }
    }

    pub(super) fn promote(&mut self, record: Record) {
        let Some(mut epoch) = self.committed else { return };
        if mutant::is("older-epoch-activated") {
            epoch.epoch = epoch.epoch.saturating_sub(1);
        }
        self.phase = Phase::Promoted;
        self.record = Some(record);
        self.tell(Event::Takeover { generation: record.generation, epoch });
        let (began, stages, cause) = (self.began, self.stages, self.cause.clone());
        self.actions.push_back(Action::Promote { record, epoch, began, stages, cause });
    }
}
