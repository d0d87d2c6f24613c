//! The arbiter `command:`: a fencing script of the operator's, asked before this node runs a guest
//! that its peer may be running.
//!
//! There is no shared record. What keeps two nodes from running one guest is that the script,
//! before it answers yes, makes sure that the peer is down and stays down. So:
//!
//! | swap | who is asked |
//! |---|---|
//! | no record → solo: a primary starts | the script, `start` (a cold start is the operator's own decision, and asks nobody) |
//! | paired → solo, by the node that runs the guest | the script, `alone` |
//! | solo → solo, by the node that runs the guest: it lost a newcomer whose image may be whole | the script, `alone` |
//! | paired or solo → solo, by the other node | the script, `takeover` |
//! | solo → paired, anything → stopped, a record in its own place | nobody: no guest starts anywhere |
//!
//! Exit status 0 wins the swap, 1 loses it, and anything else, or none in time, is no answer. A
//! read gives what this node last won. Where nobody is asked there is no answer either while the
//! script cannot be run, so that no pair forms that could not be parted again.
//!
//! `docs/operating/arbiters.md` is the contract for people who write scripts.

mod script;

use super::{Arbiter, ArbiterError, Canceller, Swap};
use crate::protocol::local_record::{LocalRecord, Question, Step};
use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::{GuestName, InstanceId};
use script::{End, Script};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a script may take by default: power switches are slow.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);

/// The arbiter `command:` for one guest, on one node.
pub struct CommandArbiter {
    script: Script,
    guest: GuestName,
    timeout: Duration,
    local_record: LocalRecord,
}

impl CommandArbiter {
    /// The arbiter of `guest` that asks `script`, for no longer than `timeout`. Runs nothing yet.
    ///
    /// # Errors
    /// The kernel's, if it gives no file descriptor.
    pub fn new(script: impl AsRef<Path>, guest: &GuestName, timeout: Duration) -> std::io::Result<CommandArbiter> {
        let script = Script::new(script.as_ref())?;
        Ok(CommandArbiter { script, guest: guest.clone(), timeout, local_record: LocalRecord::default() })
    }

    /// The operator asserts that no node of the guest runs: the first claim asks no script.
    #[must_use]
    pub fn with_dead_peer(mut self) -> CommandArbiter {
        self.local_record.believe_the_peer_dead();
        self
    }

    /// The script.
    pub fn script(&self) -> PathBuf {
        self.script.path().to_owned()
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
            ("MCD_TIMEOUT_MS", self.timeout.as_millis().to_string()),
        ];
        let arguments = [question.word(), self.guest.as_str()];
        tracing::debug!(
            script = %self.script.path().display(),
            question = question.word(),
            "asking the fencing script"
        );
        match self.script.run(&arguments, &environment, self.timeout) {
            End::Exit { status: 0, .. } => {
                self.local_record.note(*new);
                Ok(Swap::Won)
            }
            // Nobody keeps the winner's record here, so it is written down as the peer would have:
            // the guest is the peer's.
            End::Exit { status: 1, .. } => {
                Ok(Swap::Lost(expected.zip(peer).map(|(before, peer)| before.next_solo(peer))))
            }
            other => Err(self.unreachable(other.explain(question.word(), self.timeout))),
        }
    }

    fn unreachable(&self, why: String) -> ArbiterError {
        ArbiterError::Unreachable { arbiter: self.describe(), why }
    }
}

impl Arbiter for CommandArbiter {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        self.script.check().map_err(|why| self.unreachable(why))?;
        Ok(self.local_record.record())
    }

    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError> {
        match self.local_record.consider(expected, new) {
            Step::Known(swap) => return Ok(swap),
            Step::Ask(question, peer) => return self.ask(question, peer, expected, new),
            Step::Note => {}
        }
        // The end of a guest and a cold start must not fail for a script that nobody asks.
        if expected.is_some() && new.state != RecordState::Stopped {
            self.script.check().map_err(|why| self.unreachable(why))?;
        }
        self.local_record.note(*new);
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
        // Can be run, and never answers that a peer is down.
        CommandArbiter::new("/bin/false", &GuestName::new("web").unwrap(), TIMEOUT_DEFAULT).unwrap()
    }

    #[test]
    fn a_cold_start_is_the_operators_word() {
        let mut arbiter = arbiter().with_dead_peer();
        let solo = Record::first(P);
        assert_eq!(arbiter.swap(None, &solo).unwrap(), Swap::Won);
        // What the operator asserted was about the start and no more.
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
