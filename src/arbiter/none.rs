//! The arbiter `none`: nobody decides. What a node then does alone is the operator's choice, made
//! beforehand.

use super::{Arbiter, ArbiterError, Swap};
use crate::protocol::record::{Record, RecordState};

/// What a node without arbiter does when its peer is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPeerLoss {
    /// Nothing, until the peer is back or a person decides: never two nodes that run the guest, and
    /// no takeover by itself.
    Wait,
    /// Goes on alone. If only the link is cut, both nodes run the guest.
    Continue,
}

/// Remembers the record for this node alone; with `Wait` it never parts a pair.
#[derive(Debug)]
pub struct NoArbiter {
    on_peer_loss: OnPeerLoss,
    record: Option<Record>,
}

impl NoArbiter {
    /// No arbiter, with no record yet.
    pub fn new(on_peer_loss: OnPeerLoss) -> NoArbiter {
        NoArbiter { on_peer_loss, record: None }
    }
}

/// True for a swap by which one node of a pair goes on without the other, or a newcomer without the
/// primary that was about to record it. That primary itself may go on: nobody takes over from it
/// then.
fn parts_a_pair(expected: Option<&Record>, new: &Record) -> bool {
    let parts = |record: &Record| match record.state {
        RecordState::Paired => true,
        RecordState::Solo => record.owner != new.owner,
        RecordState::Stopped => false,
    };
    new.state == RecordState::Solo && expected.is_some_and(parts)
}

impl Arbiter for NoArbiter {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        Ok(self.record)
    }

    fn swap(&mut self, expected: Option<&Record>, new: &Record) -> Result<Swap, ArbiterError> {
        if self.on_peer_loss == OnPeerLoss::Wait && parts_a_pair(expected, new) {
            return Err(ArbiterError::Unreachable {
                arbiter: self.describe(),
                why: "the peer is lost and this node was told to wait; bring the peer back, or, if it is surely dead, \
                      start anew with --on-peer-loss continue or with --arbiter file:/DIRECTORY"
                    .to_owned(),
            });
        }
        // Nobody else keeps a record, so what this node expects is all there is.
        self.record = Some(*new);
        Ok(Swap::Won)
    }

    fn describe(&self) -> String {
        match self.on_peer_loss {
            OnPeerLoss::Wait => "none (on peer loss: wait)".to_owned(),
            OnPeerLoss::Continue => "none (on peer loss: continue)".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::types::InstanceId;

    const P: InstanceId = InstanceId(1);
    const S: InstanceId = InstanceId(2);

    #[test]
    fn a_primary_told_to_wait_starts_and_pairs_and_does_not_go_on_alone() {
        let mut arbiter = NoArbiter::new(OnPeerLoss::Wait);
        let solo = Record::first(P);
        let paired = solo.next_paired(P, S);
        assert_eq!(arbiter.read().unwrap(), None);
        assert_eq!(arbiter.swap(None, &solo).unwrap(), Swap::Won);
        assert_eq!(arbiter.swap(Some(&solo), &paired).unwrap(), Swap::Won);
        let error = arbiter.swap(Some(&paired), &paired.next_solo(P)).unwrap_err();
        assert!(matches!(error, ArbiterError::Unreachable { .. }));
        assert!(error.to_string().contains("--on-peer-loss continue"));
        assert_eq!(arbiter.read().unwrap(), Some(paired));
        assert_eq!(arbiter.swap(Some(&paired), &paired.next_stopped()).unwrap(), Swap::Won);
    }

    #[test]
    fn a_secondary_takes_over_only_where_it_was_told_to_continue() {
        let paired = Record::first(P).next_paired(P, S);
        let mine = paired.next_solo(S);
        assert!(NoArbiter::new(OnPeerLoss::Wait).swap(Some(&paired), &mine).is_err());
        let solo = Record::first(P);
        assert!(NoArbiter::new(OnPeerLoss::Wait).swap(Some(&solo), &solo.next_solo(S)).is_err());
        assert_eq!(NoArbiter::new(OnPeerLoss::Wait).swap(Some(&solo), &solo.next_solo(P)).unwrap(), Swap::Won);
        let mut arbiter = NoArbiter::new(OnPeerLoss::Continue);
        assert_eq!(arbiter.swap(Some(&paired), &mine).unwrap(), Swap::Won);
        assert_eq!(arbiter.read().unwrap(), Some(mine));
    }
}
