//! What a new primary does about [shared storage](crate::protocol::shared) before its guest runs.
//!
//! ```text
//!  the guest is ours ─▶ take the lock ─▶ had to wait? ask whether it still is ours ─▶ write what was kept, sync ─▶ run
//!                        ▲     │ held by another node, or the storage fails                 │
//!                        └─────┴──── wait, say so ◀────────────────────────────────────────┘
//! ```
//!
//! Whoever may still write the storage holds its lock: an old primary that is stalled, or one
//! that is cut off. Nothing is lost meanwhile: what was committed is kept here, and no more than
//! that was acknowledged.

use super::{Action, Phase, Secondary};
use crate::protocol::arbitration::ArbiterRequest;
use crate::protocol::event::{Event, RejoinReason};
use crate::protocol::mutant;
use crate::protocol::record::Record;
use crate::protocol::types::{Instant, StorageFault};

/// The wait between two tries doubles so often.
const DOUBLINGS_MAX: u32 = 6;
/// After so many tries in vain people are told.
const TRIES_UNTOLD: u32 = 2;

/// A new primary on its way to shared storage.
#[derive(Clone, Debug)]
pub(super) struct Inheritance {
    /// The record that won.
    record: Record,
    /// How often the storage could not be had. If it ever was, the arbiter has to be asked again:
    /// somebody may have decided otherwise meanwhile.
    tries: u32,
    /// Why it waits, while it does.
    pub(super) fault: Option<StorageFault>,
}

impl Inheritance {
    /// The record that won.
    pub(super) fn record(&self) -> Record {
        self.record
    }

    /// What a checker needs to know of it.
    pub(super) fn digest(&self) -> (Record, u32, bool) {
        (self.record, self.tries.min(DOUBLINGS_MAX), self.fault.is_some())
    }
}

impl Secondary {
    /// Why shared storage cannot be had, while the takeover waits for it.
    pub fn storage_fault(&self) -> Option<&StorageFault> {
        self.inheritance.as_ref().and_then(|inheritance| inheritance.fault.as_ref())
    }

    /// The arbiter gave this node the guest.
    pub(super) fn inherit(&mut self, record: Record) {
        let shares = self.welcome.as_ref().is_some_and(|welcome| welcome.shape.shares_storage());
        if !shares {
            return self.promote(record);
        }
        self.phase = Phase::Locking;
        self.inheritance = Some(Inheritance { record, tries: 0, fault: None });
        if mutant::is("takeover-without-the-lock") {
            return self.actions.push_back(Action::WriteKept);
        }
        self.actions.push_back(Action::TakeStorage);
    }

    /// The lock is ours.
    pub(super) fn storage_locked(&mut self) {
        match &self.inheritance {
            Some(inheritance) if self.phase == Phase::Locking && inheritance.tries > 0 => {
                self.ask(ArbiterRequest::Read)
            }
            Some(_) if self.phase == Phase::Locking => self.actions.push_back(Action::WriteKept),
            _ => {}
        }
    }

    /// The arbiter says what stands, after a wait.
    pub(super) fn still_ours(&mut self, stands: Option<Record>) {
        match &mut self.inheritance {
            Some(inheritance) if stands == Some(inheritance.record) => self.actions.push_back(Action::WriteKept),
            _ => self.rejoin(RejoinReason::GuestElsewhereMeanwhile),
        }
    }

    /// The storage has what was kept.
    pub(super) fn kept_written(&mut self) {
        if self.phase == Phase::Locking
            && let Some(inheritance) = self.inheritance.take()
        {
            self.promote(inheritance.record);
        }
    }

    /// The lock is another node's, or the storage fails: it is tried again.
    pub(super) fn storage_refused(&mut self, now: Instant, fault: StorageFault) {
        let Some(inheritance) = self.inheritance.as_mut().filter(|_| self.phase == Phase::Locking) else { return };
        // An old primary that was just killed may have closed its sockets and not yet its files.
        let doublings = inheritance.tries.min(DOUBLINGS_MAX);
        self.step_at = Some(now + self.config.retry / (1 << (DOUBLINGS_MAX - doublings)));
        inheritance.tries = inheritance.tries.saturating_add(1);
        let kind = std::mem::discriminant(&fault);
        // Told once, not with every try.
        let is_news = inheritance.fault.as_ref().map(std::mem::discriminant) != Some(kind);
        if is_news && inheritance.tries > TRIES_UNTOLD {
            inheritance.fault = Some(fault.clone());
            self.tell(match fault {
                StorageFault::Locked(why) => Event::DiskLocked { why },
                StorageFault::Failing(why) => Event::DiskFailing { why },
            });
        }
    }
}
