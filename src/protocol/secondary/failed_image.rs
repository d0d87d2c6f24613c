//! A secondary that cannot run the guest: its image is spoilt, or the guest cannot be restored from
//! it.
//!
//! ```text
//!  what is committed cannot be applied ─┬─ before this node asks for the guest ─▶ it ends; the primary goes on alone
//!                                       ├─ while it asks ──▶ it ends and asks no more; see below
//!                                       └─ the guest is its ─┐
//!  the guest cannot be restored ─────────────────────────────┴▶ the guest is lost: told, and it ends
//! ```
//!
//! An ack says "could be activated now", and comes before applying. So an epoch can be acknowledged
//! and turn out not to fit the image, and the arbiter may give the guest to a node that finds that
//! out too late. Then the guest is lost (I6): its old primary lost the swap, or is dead, and fences
//! itself either way. The record stays as it is, owned by a node that has ended. It is not set to
//! *stopped*, which would say that the guest ended in order and let any node start it: what its
//! disks hold is as after a loss of power, and which image is newest a person has to say
//! (`mcd cold-start`).

use super::{Action, Ending, Phase, Secondary};
use crate::protocol::event::Event;
use crate::protocol::mutant;

impl Secondary {
    /// The image is spoilt. Nothing more is acknowledged, and the guest is not asked for any more.
    pub(super) fn image_failed(&mut self, why: String) {
        match self.phase {
            _ if mutant::is("spoilt-image-ignored") => {}
            // The guest is this node's, on record.
            Phase::Locking => self.lose_guest(why),
            Phase::Deciding => self.exit(Ending::ImageFailed(format!(
                "{why}; it had asked for the guest, and if the arbiter gives it the guest all the same, that is lost"
            ))),
            _ => self.exit(Ending::ImageFailed(why)),
        }
    }

    /// The guest could not be restored.
    pub(super) fn restore_failed(&mut self, why: String) {
        match self.phase {
            Phase::Promoted if mutant::is("lost-guest-joins-again") => {
                self.phase = Phase::Done;
                self.actions.push_back(Action::Rejoin { after: self.config.retry });
            }
            Phase::Promoted => self.lose_guest(why),
            _ => {}
        }
    }

    /// Nobody runs the guest, and nobody can.
    fn lose_guest(&mut self, why: String) {
        let won = self.inheritance.as_ref().map(|inheritance| inheritance.record()).or(self.record);
        let (Some(record), Some(epoch)) = (won, self.committed) else { return };
        self.tell(Event::GuestLost { generation: record.generation, epoch, why: why.clone() });
        self.exit(Ending::NotRestored { record, epoch, why });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::arbitration::ArbiterAnswer;
    use crate::protocol::record::Record;
    use crate::protocol::secondary::Input;
    use crate::protocol::secondary::test_support::{DATA, NEW, OLD, paired, take};
    use crate::protocol::types::{EpochId, Generation};

    const NEWEST: EpochId = EpochId { generation: Generation(1), epoch: 0 };

    /// Loses its primary; the ticket of the question for the guest.
    fn lose_primary(node: &mut Secondary) -> u64 {
        let asked = take(node, Input::Closed { conn: DATA, why: "cut".into() });
        let ticket = asked.iter().find_map(|action| match action {
            Action::Ask(call) => Some(call.ticket),
            _ => None,
        });
        ticket.expect("a question")
    }

    #[test]
    fn a_spoilt_image_ends_a_secondary_without_a_question_to_the_arbiter() {
        let mut node = paired();
        let actions = take(&mut node, Input::ImageFailed { why: "disk full".into() });
        assert_eq!(
            actions.last(),
            Some(&Action::Exit { ending: Ending::ImageFailed("disk full".into()), stamp: None })
        );
        assert!(!actions.iter().any(|action| matches!(action, Action::Ask(_))), "{actions:?}");
        assert_eq!(take(&mut node, Input::Closed { conn: DATA, why: "cut".into() }), []);
    }

    #[test]
    fn a_spoilt_image_ends_the_question_for_the_guest() {
        let mut node = paired();
        let ticket = lose_primary(&mut node);
        let actions = take(&mut node, Input::ImageFailed { why: "disk full".into() });
        let [Action::Exit { ending: Ending::ImageFailed(why), stamp: None }] = &actions[..] else {
            panic!("{actions:?}")
        };
        assert!(why.contains("had asked"), "{why}");
        assert_eq!(take(&mut node, Input::Answer { ticket, answer: ArbiterAnswer::Won }), []);
    }

    #[test]
    fn a_guest_that_cannot_be_restored_is_told_to_be_lost() {
        let mut node = paired();
        let ticket = lose_primary(&mut node);
        take(&mut node, Input::RestoreFailed { why: "nobody asked".into() });
        take(&mut node, Input::Answer { ticket, answer: ArbiterAnswer::Won });
        let actions = take(&mut node, Input::RestoreFailed { why: "no memory".into() });
        let record = Record::first(OLD).next_paired(OLD, NEW).next_solo(NEW);
        let (epoch, why) = (NEWEST, "no memory".to_owned());
        let lost = Event::GuestLost { generation: record.generation, epoch, why: why.clone() };
        assert_eq!(
            actions,
            [Action::Tell(lost), Action::Exit { ending: Ending::NotRestored { record, epoch, why }, stamp: None }]
        );
    }
}
