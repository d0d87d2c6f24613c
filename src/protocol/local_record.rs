//! What a node whose arbiter keeps no record writes down itself, and when that is not enough and
//! the script must be asked. Pure, so that the simulator drives the same rules.

use super::mutant;
use super::record::{Record, RecordState, Swap};
use super::types::InstanceId;

/// What the script is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// May a primary start the guest?
    Start,
    /// May the node that runs the guest go on without its peer?
    Alone,
    /// May the node that holds the image run the guest?
    Takeover,
}

impl Question {
    /// The word the script is given.
    pub fn word(self) -> &'static str {
        match self {
            Question::Start => "start",
            Question::Alone => "alone",
            Question::Takeover => "takeover",
        }
    }
}

/// What becomes of a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The local_record has the answer.
    Known(Swap),
    /// The script must say that this peer is down (`None`: whoever the other node is). If it does,
    /// the swap is won and to be noted.
    Ask(Question, Option<InstanceId>),
    /// No guest starts anywhere by it: it is won, and to be noted.
    Note,
}

/// One node's local_record, for one guest.
#[derive(Clone, Debug, Default)]
pub struct LocalRecord {
    /// The operator's word, given with a cold start, that the first claim needs no script.
    peer_is_dead: bool,
    record: Option<Record>,
}

impl LocalRecord {
    /// Takes the operator's word that no node of the guest runs.
    pub fn believe_the_peer_dead(&mut self) {
        self.peer_is_dead = true;
    }

    /// What this node last won.
    pub fn record(&self) -> Option<Record> {
        self.record
    }

    /// Writes down what was won.
    pub fn note(&mut self, new: Record) {
        self.record = Some(new);
    }

    /// What becomes of putting `new` in place of `expected`.
    pub fn consider(&self, expected: Option<&Record>, new: &Record) -> Step {
        if let Some(known) = self.record.filter(|known| expected != Some(known)) {
            // A secondary learns of its pair from the primary, so it may expect what is newer than
            // what it knows, but never what is older.
            if known == *new {
                return Step::Known(Swap::Won);
            }
            if expected.is_none_or(|expected| expected.generation <= known.generation) {
                return Step::Known(Swap::Lost(Some(known)));
            }
        }
        self.question(expected, new).map_or(Step::Note, |(question, peer)| Step::Ask(question, peer))
    }

    /// What has to be asked before `new` follows `expected`, and about which peer.
    fn question(&self, expected: Option<&Record>, new: &Record) -> Option<(Question, Option<InstanceId>)> {
        // A record in its own place starts nothing: so a primary finds out whether its arbiter
        // works.
        if new.state != RecordState::Solo || expected == Some(new) {
            return None;
        }
        match expected {
            None if self.peer_is_dead => None,
            None => Some((Question::Start, None)),
            Some(pair) if pair.state == RecordState::Paired && pair.owner == new.owner => {
                Some((Question::Alone, pair.peer))
            }
            Some(before) if before.state == RecordState::Stopped => Some((Question::Start, None)),
            Some(alone) if alone.owner == new.owner && mutant::is("newcomer-not-fenced") => None,
            // The newcomer is not on record yet, but it too may ask to take over.
            Some(alone) if alone.owner == new.owner => Some((Question::Alone, None)),
            Some(before) => Some((Question::Takeover, Some(before.owner))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: InstanceId = InstanceId(1);
    const S: InstanceId = InstanceId(2);

    #[test]
    fn the_script_is_asked_before_a_guest_may_run_twice() {
        let book = LocalRecord::default();
        let solo = Record::first(P);
        let paired = solo.next_paired(P, S);
        let step = |expected: Option<&Record>, new: &Record| book.consider(expected, new);
        assert_eq!(step(None, &solo), Step::Ask(Question::Start, None));
        assert_eq!(step(Some(&paired.next_stopped()), &solo), Step::Ask(Question::Start, None));
        assert_eq!(step(Some(&paired), &paired.next_solo(P)), Step::Ask(Question::Alone, Some(S)));
        assert_eq!(step(Some(&paired), &paired.next_solo(S)), Step::Ask(Question::Takeover, Some(P)));
        assert_eq!(step(Some(&solo), &solo.next_solo(S)), Step::Ask(Question::Takeover, Some(P)));
        assert_eq!(step(Some(&solo), &solo.next_solo(P)), Step::Ask(Question::Alone, None));
        assert_eq!(step(Some(&solo), &paired), Step::Note);
        assert_eq!(step(Some(&solo), &solo), Step::Note);
        assert_eq!(step(Some(&paired), &paired.next_stopped()), Step::Note);
    }
}
