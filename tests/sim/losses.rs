//! I6: somebody has the guest, or it was lost in a way that nobody could have helped.

use mcd::protocol::primary;
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::secondary;

use crate::model::{Holding, Model};
use crate::net::ProcId;
use crate::node::{Proc, Role};
use crate::world::World;

/// How a guest may be lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The last node that had it crashed.
    Crash,
    /// An operator ended the last node that had it.
    Operator,
    /// The arbiter gave it to a node that had died since it asked.
    LateSwap,
    /// The only image was acknowledged and could not be applied.
    SpoiltImage,
    /// The node that won it could not restore it.
    NotRestored,
    /// It was never started: the node that claimed it got no answer and gave up.
    Unanswered,
}

/// How many ways there are.
pub const LOSSES: usize = 6;

impl Loss {
    /// Each way, by its place in [`Stats`](crate::world::Stats).
    pub const ALL: [(Loss, &str); LOSSES] = [
        (Loss::Crash, "crashes"),
        (Loss::Operator, "operators"),
        (Loss::LateSwap, "late swaps"),
        (Loss::SpoiltImage, "spoilt images"),
        (Loss::NotRestored, "failed restores"),
        (Loss::Unanswered, "claims without an answer"),
    ];
}

impl World {
    /// Something happened that may cost the guest: if nobody has it now, that is why.
    pub fn accept_loss(&mut self, loss: Loss) {
        self.accepted_loss.get_or_insert(loss);
    }

    /// Checks that somebody has the guest.
    pub fn check_holders(&mut self) {
        let accepted_loss = self.accepted_loss.take();
        let Some(record) = self.arbiter.record else { return };
        if record.state == RecordState::Stopped || self.violation.is_some() {
            return;
        }
        if self.procs.iter().any(|proc| self.has_guest(proc, record)) {
            self.lost = false;
        } else if self.lost {
            // Until somebody starts it anew.
        } else if let Some(loss) = accepted_loss {
            self.lost = true;
            self.stats.lost_guests[loss as usize] += 1;
            self.trace.across(self.now, &format!("the guest is lost, and nobody else had it: {loss:?}"));
        } else {
            self.violate(format!(
                "I6: nobody has the guest any more, and nothing that happened explains it; {record:?}"
            ));
        }
    }

    fn has_guest(&self, proc: &Proc, record: Record) -> bool {
        let owns = record.owner == proc.me;
        proc.alive
            && match &proc.role {
                Role::Primary(machine) => machine.phase() != primary::Phase::Fenced && owns,
                // It starts the guest when it hears of it.
                Role::Claiming(_) => owns,
                Role::Restoring(..) => owns && !proc.applier.is_spoilt,
                Role::Waiting => false,
                Role::Secondary(machine) => {
                    let new_primary = |holding: &Holding| owns || Model::may_take_over(holding, proc.me, record);
                    machine.phase() != secondary::Phase::Done
                        && !proc.applier.is_spoilt
                        && !proc.not_restored
                        && self.model.holdings.get(&proc.me).is_some_and(new_primary)
                }
            }
    }

    /// A life of a node ends: if the guest was lost with it, somebody has to have been told.
    pub fn check_loss_told(&mut self, proc: ProcId) {
        let node = &self.procs[proc];
        if node.not_restored && !node.loss_told {
            self.violate(format!("I6: n{} could not restore the guest it won, and nobody was told", node.slot));
        }
    }
}
