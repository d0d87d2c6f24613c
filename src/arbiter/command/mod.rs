//! The arbiter `command:`: a fencing script of the operator's, asked before this node runs a guest that its peer may be running.
//!
//! There is no shared record. What keeps two nodes from running one guest is that the script, before it says yes, makes sure that the peer
//! is down and stays down. So:
//!
//! | swap | who is asked |
//! |---|---|
//! | no record → solo: a primary starts | the script, `start` (a cold start is the operator's own word, and asks nobody) |
//! | paired → solo, by the node that runs the guest | the script, `alone` |
//! | solo → solo, by the node that runs the guest: it lost a newcomer whose image may be whole | the script, `alone` |
//! | paired or solo → solo, by the other node | the script, `takeover` |
//! | solo → paired, anything → stopped, a record in its own place | nobody: no guest starts anywhere |
//!
//! Exit status 0 wins the swap, 1 loses it, and anything else, or none in time, is no answer. A read gives what this node last won. Where
//! nobody is asked there is no answer either while the script cannot be run, so that no pair forms that could not be parted again.
//!
//! `docs/arbiters.md` is the contract for people who write scripts.

mod script;

use super::{Arbiter, ArbiterError, Canceller, Swap};
use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::{GuestName, InstanceId};
use script::{End, Script};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a script may take unless said otherwise: power switches are slow.
pub const PATIENCE_DEFAULT: Duration = Duration::from_secs(30);

/// What the script is asked, in the word it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// May a primary start the guest?
    Start,
    /// May the node that runs the guest go on without its peer?
    Alone,
    /// May the node that holds the image run the guest?
    Takeover,
}

impl Question {
    fn word(self) -> &'static str {
        match self {
            Question::Start => "start",
            Question::Alone => "alone",
            Question::Takeover => "takeover",
        }
    }
}

/// The arbiter `command:` for one guest, on one node.
pub struct CommandArbiter {
    script: Script,
    guest: GuestName,
    patience: Duration,
    /// The operator's word, given with a cold start, that the first claim needs no script.
    peer_is_dead: bool,
    record: Option<Record>,
}

impl CommandArbiter {
    /// The arbiter of `guest` that asks `script`, for no longer than `patience`. Runs nothing yet.
    ///
    /// # Errors
    /// The kernel's, if it gives no file descriptor.
    pub fn new(script: impl AsRef<Path>, guest: &GuestName, patience: Duration) -> std::io::Result<CommandArbiter> {
        let script = Script::new(script.as_ref())?;
        Ok(CommandArbiter { script, guest: guest.clone(), patience, peer_is_dead: false, record: None })
    }

    /// Takes the operator's word that no node of the guest runs: the first claim asks no script.
    #[must_use]
    pub fn with_dead_peer(mut self) -> CommandArbiter {
        self.peer_is_dead = true;
        self
    }

    /// The script.
    pub fn script(&self) -> PathBuf {
        self.script.path().to_owned()
    }

    /// What has to be asked before `new` follows `expected`, and about which peer.
    fn question(&self, expected: Option<&Record>, new: &Record) -> Option<(Question, Option<InstanceId>)> {
        // A record in its own place starts nothing: so a primary finds out whether its arbiter works.
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
            // The newcomer is not on record yet, but it too may ask to take over.
            Some(alone) if alone.owner == new.owner => Some((Question::Alone, None)),
            Some(before) => Some((Question::Takeover, Some(before.owner))),
        }
    }

    fn ask(
        &mut self,
        question: Question,
        peer: Option<InstanceId>,
        expected: Option<&Record>,
        new: &Record,
    ) -> Result<Swap, ArbiterError> {
        let peer_text = peer.map_or_else(|| "none".to_owned(), |peer| peer.to_string());
        let environment = [
            ("MCD_QUESTION", question.word().to_owned()),
            ("MCD_GUEST", self.guest.to_string()),
            ("MCD_GENERATION", new.generation.0.to_string()),
            ("MCD_INSTANCE", new.owner.to_string()),
            ("MCD_PEER", peer_text),
            ("MCD_TIMEOUT_MS", self.patience.as_millis().to_string()),
        ];
        let arguments = [question.word(), self.guest.as_str()];
        tracing::debug!(script = %self.script.path().display(), question = question.word(), "asking the fencing script");
        match self.script.run(&arguments, &environment, self.patience) {
            End::Exit { status: 0, .. } => {
                self.record = Some(*new);
                Ok(Swap::Won)
            }
            // Nobody keeps the winner's record here, so it is written down as the peer would have: the guest is the peer's.
            End::Exit { status: 1, .. } => {
                Ok(Swap::Lost(expected.zip(peer).map(|(before, peer)| before.next_solo(peer))))
            }
            other => Err(self.unreachable(other.explain(question.word(), self.patience))),
        }
    }

    fn unreachable(&self, why: String) -> ArbiterError {
        ArbiterError::Unreachable { arbiter: self.describe(), why }
    }
}

impl Arbiter for CommandArbiter {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        self.script.check().map_err(|why| self.unreachable(why))?;
        Ok(self.record)
    }

    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError> {
        if let Some(known) = self.record.filter(|known| expected != Some(known)) {
            // A secondary learns of its pair from the primary, so it may expect what is newer than what it knows, but never what is older.
            if known == *new {
                return Ok(Swap::Won);
            }
            if expected.is_none_or(|expected| expected.generation <= known.generation) {
                return Ok(Swap::Lost(Some(known)));
            }
        }
        if let Some((question, peer)) = self.question(expected, new) {
            return self.ask(question, peer, expected, new);
        }
        // The end of a guest and a cold start must not fail for a script that nobody asks.
        if expected.is_some() && new.state != RecordState::Stopped {
            self.script.check().map_err(|why| self.unreachable(why))?;
        }
        self.record = Some(*new);
        Ok(Swap::Won)
    }

    fn describe(&self) -> String {
        format!("command:{}", self.script.path().display())
    }

    fn canceller(&self) -> Option<Canceller> {
        Some(self.script.canceller())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const P: InstanceId = InstanceId(1);
    const S: InstanceId = InstanceId(2);

    fn arbiter() -> CommandArbiter {
        // Can be run, and never says that anybody is down.
        CommandArbiter::new("/bin/false", &GuestName::new("web").unwrap(), PATIENCE_DEFAULT).unwrap()
    }

    #[test]
    fn the_script_is_asked_before_a_guest_may_run_twice() {
        let arbiter = arbiter();
        let solo = Record::first(P);
        let paired = solo.next_paired(P, S);
        assert_eq!(arbiter.question(None, &solo), Some((Question::Start, None)));
        assert_eq!(arbiter.question(Some(&paired.next_stopped()), &solo), Some((Question::Start, None)));
        assert_eq!(arbiter.question(Some(&paired), &paired.next_solo(P)), Some((Question::Alone, Some(S))));
        assert_eq!(arbiter.question(Some(&paired), &paired.next_solo(S)), Some((Question::Takeover, Some(P))));
        assert_eq!(arbiter.question(Some(&solo), &solo.next_solo(S)), Some((Question::Takeover, Some(P))));
        assert_eq!(arbiter.question(Some(&solo), &solo.next_solo(P)), Some((Question::Alone, None)));
        assert_eq!(arbiter.question(Some(&solo), &paired), None);
        assert_eq!(arbiter.question(Some(&solo), &solo), None);
        assert_eq!(arbiter.question(Some(&paired), &paired.next_stopped()), None);
    }

    #[test]
    fn a_cold_start_is_the_operators_word() {
        let mut arbiter = arbiter().with_dead_peer();
        let solo = Record::first(P);
        assert_eq!(arbiter.swap(None, &solo).unwrap(), Swap::Won);
        // His word was about the start and no more.
        let paired = solo.next_paired(P, S);
        assert_eq!(arbiter.swap(Some(&solo), &paired).unwrap(), Swap::Won);
        let lost = Swap::Lost(Some(paired.next_solo(S)));
        assert_eq!(arbiter.swap(Some(&paired), &paired.next_solo(P)).unwrap(), lost);
    }

    #[test]
    fn what_is_out_of_date_loses() {
        let mut arbiter = arbiter().with_dead_peer();
        let solo = Record::first(P);
        let paired = solo.next_paired(P, S);
        assert_eq!(arbiter.swap(None, &solo).unwrap(), Swap::Won);
        assert_eq!(arbiter.swap(Some(&solo), &paired).unwrap(), Swap::Won);
        assert_eq!(arbiter.swap(Some(&solo), &paired).unwrap(), Swap::Won, "asked again");
        assert_eq!(arbiter.swap(None, &Record::first(S)).unwrap(), Swap::Lost(Some(paired)));
        assert_eq!(arbiter.swap(Some(&solo), &solo.next_solo(S)).unwrap(), Swap::Lost(Some(paired)));
    }
}
