//! What an arbiter keeps: who may run the guest, in which generation, and with whom.

use super::types::{Generation, InstanceId};

/// The state of a guest as the arbiter knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RecordState {
    /// `owner` runs the guest, `peer` holds its newest committed epoch.
    Paired,
    /// `owner` runs the guest and nobody else has it.
    Solo,
    /// The guest was shut down; anyone may start it.
    Stopped,
}

/// The record an arbiter swaps, one per guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Record {
    /// Goes up by one with every swap.
    pub generation: Generation,
    /// What the guest's nodes are to each other.
    pub state: RecordState,
    /// The node that runs the guest (or ran it last, when stopped).
    pub owner: InstanceId,
    /// The node that may take over; only in `Paired`.
    pub peer: Option<InstanceId>,
}

/// What became of a swap that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swap {
    /// The new record stands.
    Won,
    /// Another record stands (or none), and nothing was changed.
    Lost(Option<Record>),
}

impl Record {
    /// The record of a guest that `owner` runs alone, in the generation after `self`.
    pub fn next_solo(&self, owner: InstanceId) -> Record {
        Record::solo(self.generation.next(), owner)
    }

    /// The record of a pair, in the generation after `self`.
    pub fn next_paired(&self, owner: InstanceId, peer: InstanceId) -> Record {
        Record { generation: self.generation.next(), state: RecordState::Paired, owner, peer: Some(peer) }
    }

    /// The record of a guest that was shut down by its owner.
    pub fn next_stopped(&self) -> Record {
        Record { generation: self.generation.next(), state: RecordState::Stopped, owner: self.owner, peer: None }
    }

    /// The first record of a guest: `owner` runs it alone.
    pub fn first(owner: InstanceId) -> Record {
        Record::solo(Generation(1), owner)
    }

    /// The record of a guest that `owner` runs alone in `generation`.
    pub fn solo(generation: Generation, owner: InstanceId) -> Record {
        Record { generation, state: RecordState::Solo, owner, peer: None }
    }
}
