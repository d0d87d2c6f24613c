//! Starting a guest: how a primary claims it, and what each answer of the arbiter means.
//!
//! ```text
//!  read ──▶ may it start here? ──▶ do its disks allow it? ──▶ swap ──▶ won, or the record is the very one
//!   │            │ no                                         ▲ │  │       asked for: the guest starts
//!   │            ▼                                  no answer └─┘  └─▶ another record: it starts elsewhere
//!   └ no answer: refused; nothing was asked for                     still no answer: nobody knows
//! ```
//!
//! A swap whose answer was lost may have been carried out, so the same swap is asked again: never
//! another one, or the record that a lost answer left would be taken for another node's. If the
//! arbiter does not answer at all, the guest may be on record as this node's, which does not run
//! it; then only a person can say that nobody does (`mcd cold-start`).

use std::collections::VecDeque;
use std::time::Duration;

use super::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest, Arbitration, Verdict};
use super::mutant;
use super::record::{Record, RecordState};
use super::types::{Generation, InstanceId, Instant};

/// How often a swap is asked for before it is given up.
pub const CLAIMS_MAX: u32 = 4;

/// Why a primary may not start the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimRefused {
    /// The arbiter knows it as running elsewhere (or nobody said that it stopped).
    Elsewhere(Record),
    /// The arbiter refuses, and shows no record.
    NoRecord,
    /// The arbiter is out of reach, and nothing was asked of it but the record.
    Unreachable(String),
    /// The arbiter did not say whether it gave this node the guest. It may have, or do so yet.
    Unanswered {
        /// The record asked for.
        wanted: Record,
        /// Why there is no answer, in words.
        why: String,
    },
}

/// What happened, told to the claim.
#[derive(Clone, Debug)]
pub enum ClaimInput {
    /// Time passed.
    Tick,
    /// The arbiter answered.
    Answer {
        /// The question's ticket.
        ticket: u64,
        /// The answer.
        answer: ArbiterAnswer,
    },
    /// The guest may start from its disks.
    DisksAllow,
}

/// What the driver has to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClaimAction {
    /// Ask the arbiter.
    Ask(ArbiterCall),
    /// Check whether the guest may start from its disks, then say `DisksAllow`; if it may not,
    /// nothing was claimed.
    CheckDisks {
        /// The newest generation on record.
        newest: Option<Generation>,
    },
    /// Start the guest under this record, which the arbiter holds.
    Start(Record),
    /// Do not start it.
    Refuse(ClaimRefused),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Reading,
    /// The disks are checked before this swap.
    Checking(Option<Record>, Record),
    /// This record is asked for.
    Swapping(Record),
    Over,
}

/// The claim of one start.
#[derive(Clone, Debug)]
pub struct Claim {
    me: InstanceId,
    both_nodes_are_dead: bool,
    step: Step,
    /// Swaps asked for that got no answer.
    unanswered: u32,
    arbitration: Arbitration,
    actions: VecDeque<ClaimAction>,
}

impl Claim {
    /// Of the guest by `me`, which asks an arbiter that did not answer again after `retry`.
    ///
    /// `both_nodes_are_dead` is the operator's word that no node of the record runs any more: only
    /// then is a guest claimed that was never stopped.
    pub fn new(me: InstanceId, both_nodes_are_dead: bool, retry: Duration) -> Claim {
        let mut arbitration = Arbitration::new(retry);
        let read = arbitration.ask(ArbiterRequest::Read);
        let actions = VecDeque::from([ClaimAction::Ask(read)]);
        Claim { me, both_nodes_are_dead, step: Step::Reading, unanswered: 0, arbitration, actions }
    }

    /// Takes what happened.
    pub fn handle(&mut self, now: Instant, input: ClaimInput) {
        match input {
            ClaimInput::Tick => {}
            ClaimInput::Answer { ticket, answer } => {
                if let Some(verdict) = self.arbitration.answer(now, ticket, answer) {
                    self.verdict(verdict);
                }
            }
            ClaimInput::DisksAllow => {
                if let Step::Checking(expected, new) = self.step {
                    self.step = Step::Swapping(new);
                    self.ask(ArbiterRequest::Swap { expected, new });
                }
            }
        }
        if let Some(call) = self.arbitration.poll(now) {
            self.actions.push_back(ClaimAction::Ask(call));
        }
    }

    /// The next thing to do, if any.
    pub fn poll_action(&mut self) -> Option<ClaimAction> {
        self.actions.pop_front()
    }

    /// When to call `handle(now, ClaimInput::Tick)` at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.arbitration.due()
    }

    fn ask(&mut self, request: ArbiterRequest) {
        let call = self.arbitration.ask(request);
        self.actions.push_back(ClaimAction::Ask(call));
    }

    fn verdict(&mut self, verdict: Verdict) {
        match (self.step, verdict) {
            (Step::Reading, Verdict::Stands(stands)) => match self.wanted(stands) {
                Ok(new) => {
                    self.step = Step::Checking(stands, new);
                    self.actions.push_back(ClaimAction::CheckDisks { newest: stands.map(|record| record.generation) });
                }
                Err(record) => self.refuse(ClaimRefused::Elsewhere(record)),
            },
            (Step::Reading, Verdict::Unreachable(why)) => self.refuse(ClaimRefused::Unreachable(why)),
            (Step::Swapping(_), Verdict::Won(record)) => self.start(record),
            (Step::Swapping(wanted), Verdict::Stands(Some(record)))
                if record.generation == wanted.generation && mutant::is("claim-won-by-generation") =>
            {
                self.start(wanted);
            }
            (Step::Swapping(_), Verdict::Stands(Some(record))) => self.refuse(ClaimRefused::Elsewhere(record)),
            (Step::Swapping(_), Verdict::Stands(None)) => self.refuse(ClaimRefused::NoRecord),
            (Step::Swapping(wanted), Verdict::Unreachable(why)) => self.no_answer(wanted, why),
            (Step::Reading | Step::Checking(..) | Step::Over, _) => {}
        }
    }

    /// The swap may have been carried out. It is asked for again by itself.
    fn no_answer(&mut self, wanted: Record, why: String) {
        self.unanswered += 1;
        if mutant::is("claim-won-without-an-answer") {
            self.start(wanted);
        } else if self.unanswered >= CLAIMS_MAX {
            self.refuse(ClaimRefused::Unanswered { wanted, why });
        } else if mutant::is("claim-read-anew") {
            self.step = Step::Reading;
            self.ask(ArbiterRequest::Read);
        }
    }

    /// The record with which the guest may start that the arbiter knows as `stands`; else the
    /// record that bars it.
    fn wanted(&self, stands: Option<Record>) -> Result<Record, Record> {
        match stands {
            None => Ok(Record::first(self.me)),
            Some(record) if record.state == RecordState::Stopped || self.both_nodes_are_dead => {
                Ok(record.next_solo(self.me))
            }
            Some(record) if mutant::is("running-guest-claimed") => Ok(record.next_solo(self.me)),
            Some(record) => Err(record),
        }
    }

    fn start(&mut self, record: Record) {
        self.over(ClaimAction::Start(record));
    }

    fn refuse(&mut self, refused: ClaimRefused) {
        self.over(ClaimAction::Refuse(refused));
    }

    fn over(&mut self, action: ClaimAction) {
        self.arbitration.forget();
        self.step = Step::Over;
        self.actions.push_back(action);
    }
}

#[cfg(test)]
mod tests;
