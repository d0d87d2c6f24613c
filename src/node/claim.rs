//! Claiming the guest at a primary's start: carries out what [`Claim`] decides, before any other
//! thread may ask the arbiter.

use super::arbiter_thread::ask;
use super::config::NodeConfig;
use super::context::RETRY;
use super::error::NodeError;
use super::{clock, disks};
use crate::arbiter::{Arbiter, ArbiterError};
use crate::protocol::arbitration::ArbiterAnswer;
use crate::protocol::claim::{Claim, ClaimAction, ClaimInput, ClaimRefused};
use crate::protocol::record::Record;
use crate::protocol::types::InstanceId;

/// Has the arbiter give the guest to `me`; the record under which it starts.
///
/// # Errors
/// [`NodeError`]: the guest runs elsewhere, its disks bar it, or the arbiter does not answer.
pub(super) fn claim_guest(
    arbiter: &mut dyn Arbiter,
    config: &NodeConfig,
    me: InstanceId,
    both_nodes_are_dead: bool,
) -> Result<Record, NodeError> {
    let mut claim = Claim::new(me, both_nodes_are_dead, RETRY);
    let mut error = None;
    loop {
        match claim.poll_action() {
            Some(ClaimAction::Ask(call)) => {
                let answer = ask(arbiter, call.request).unwrap_or_else(|failed| {
                    let why = failed.to_string();
                    error = Some(failed);
                    ArbiterAnswer::Unreachable(why)
                });
                claim.handle(clock::now(), ClaimInput::Answer { ticket: call.ticket, answer });
            }
            Some(ClaimAction::CheckDisks { newest }) => {
                disks::check_and_stamp_images(config, newest)?;
                claim.handle(clock::now(), ClaimInput::DisksAllow);
            }
            Some(ClaimAction::Start(record)) => return Ok(record),
            Some(ClaimAction::Refuse(refused)) => return Err(refusal(arbiter, config, refused, error)),
            None => {
                // Nothing else runs yet that this could hold up.
                if let Some(at) = claim.poll_timeout() {
                    std::thread::park_timeout(clock::until(at));
                }
                claim.handle(clock::now(), ClaimInput::Tick);
            }
        }
    }
}

fn refusal(
    arbiter: &dyn Arbiter,
    config: &NodeConfig,
    refused: ClaimRefused,
    error: Option<ArbiterError>,
) -> NodeError {
    let guest = config.guest.to_string();
    match (refused, error) {
        (ClaimRefused::Elsewhere(record), _) => NodeError::RunsElsewhere {
            guest,
            record: format!("{} {:?}, owner {}", record.generation, record.state, record.owner),
        },
        (ClaimRefused::NoRecord, _) => {
            NodeError::RunsElsewhere { guest, record: format!("so says {}", arbiter.describe()) }
        }
        (ClaimRefused::Unreachable(_), Some(error)) => NodeError::Arbiter(error),
        (ClaimRefused::Unreachable(why) | ClaimRefused::Unanswered { why, .. }, _) => {
            NodeError::Unclaimed { guest, why }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::arbiter::Swap;
    use crate::node::arbiter_tests::config;
    use crate::node::config::{ArbiterConfig, OnPeerLoss};

    const ME: InstanceId = InstanceId(1);

    /// Carries every swap out, and loses so many of the answers.
    struct LosesAnswers {
        record: Option<Record>,
        lost: VecDeque<bool>,
    }

    impl Arbiter for LosesAnswers {
        fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
            Ok(self.record)
        }

        fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError> {
            let won = self.record.as_ref() == expected;
            self.record = if won { Some(*new) } else { self.record };
            match self.lost.pop_front() {
                Some(true) => {
                    Err(ArbiterError::Unreachable { arbiter: "test".into(), why: "no answer in time".into() })
                }
                _ if won => Ok(Swap::Won),
                _ => Ok(Swap::Lost(self.record)),
            }
        }

        fn describe(&self) -> String {
            "test".into()
        }
    }

    fn claim(lost: &[bool], record: Option<Record>) -> Result<Record, String> {
        let mut arbiter = LosesAnswers { record, lost: lost.iter().copied().collect() };
        let config = config(ArbiterConfig::None { on_peer_loss: OnPeerLoss::Wait });
        claim_guest(&mut arbiter, &config, ME, false).map_err(|error| error.to_string())
    }

    #[test]
    fn a_start_whose_answers_are_lost_starts_when_it_sees_its_own_record() {
        assert_eq!(claim(&[true, true], None), Ok(Record::first(ME)));
    }

    #[test]
    fn a_start_that_is_never_answered_says_what_may_have_come_of_it() {
        let why = claim(&[true; 10], None).expect_err("nobody answers");
        for word in ["'web'", "no answer in time", "mcd cold-start"] {
            assert!(why.contains(word), "{why}");
        }
        let why = claim(&[], Some(Record::first(InstanceId(2)))).expect_err("it runs elsewhere");
        assert!(why.contains("running elsewhere (g1 Solo"), "{why}");
    }
}
