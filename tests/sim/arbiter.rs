//! The arbiter: a record and its history. It never fails; the way to it does.

use std::collections::BTreeMap;

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use mcd::protocol::local_record::{LocalRecord, Step};
use mcd::protocol::record::{Record, Swap};
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

    /// Carries out a request of a node that writes its record down itself: the answer, whether the
    /// record changed, and whether the script has to switch the other host off first.
    pub fn serve_recordless(&mut self, book: &mut LocalRecord, request: ArbiterRequest) -> (ArbiterAnswer, bool, bool) {
        let ArbiterRequest::Swap { expected, new } = request else {
            return (ArbiterAnswer::Record(book.record()), false, false);
        };
        let fences = match book.consider(expected.as_ref(), &new) {
            Step::Known(Swap::Won) => return (ArbiterAnswer::Won, false, false),
            Step::Known(Swap::Lost(record)) => return (ArbiterAnswer::Record(record), false, false),
            Step::Ask(..) => true,
            Step::Note => false,
        };
        book.note(new);
        self.set(new);
        (ArbiterAnswer::Won, expected != Some(new), fences)
    }

    /// Carries out a request; true beside the answer if the record changed.
    pub fn serve(&mut self, request: ArbiterRequest) -> (ArbiterAnswer, bool) {
        match request {
            ArbiterRequest::Read => (ArbiterAnswer::Record(self.record), false),
            ArbiterRequest::Swap { expected, new } if self.record == expected => {
                self.set(new);
                // A record in its own place: asked to learn whether the arbiter can write.
                (ArbiterAnswer::Won, expected != Some(new))
            }
            ArbiterRequest::Swap { .. } => (ArbiterAnswer::Record(self.record), false),
        }
    }
}
