//! The arbiter: a record and its history. It never fails; the way to it does.

use std::collections::BTreeMap;

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use mcd::protocol::record::Record;
use mcd::protocol::types::{Generation, InstanceId};

#[derive(Debug, Default)]
pub struct Arbiter {
    pub record: Option<Record>,
    /// Who owned which generation.
    pub owners: BTreeMap<Generation, InstanceId>,
}

impl Arbiter {
    /// Puts `new` in place, whatever was there.
    pub fn set(&mut self, new: Record) {
        self.record = Some(new);
        self.owners.insert(new.generation, new.owner);
    }

    /// Carries out a request; true beside the answer if the record changed.
    pub fn serve(&mut self, request: ArbiterRequest) -> (ArbiterAnswer, bool) {
        match request {
            ArbiterRequest::Read => (ArbiterAnswer::Record(self.record), false),
            ArbiterRequest::Swap { expected, new } if self.record == Some(expected) => {
                self.set(new);
                // A record in its own place: asked to learn whether the arbiter can write.
                (ArbiterAnswer::Won, expected != new)
            }
            ArbiterRequest::Swap { .. } => (ArbiterAnswer::Record(self.record), false),
        }
    }
}
