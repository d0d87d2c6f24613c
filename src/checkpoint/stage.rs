//! Staging: an epoch is collected whole and checked before anyone hears that it is committed (I2).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use crate::protocol::mutant;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::EpochId;
use crate::wire::{PageDecoder, PageError, PageKind};

/// What is wrong with a stream of epochs.
#[derive(Debug, Error)]
pub enum StageError {
    /// A frame came where it has no place.
    #[error("the primary sent {what} outside an epoch; both nodes must run the same mcd")]
    OutOfPlace {
        /// The frame.
        what: &'static str,
    },
    /// A frame without content: it spends nothing of the budget, so nothing would bound how many
    /// of them there are.
    #[error("the primary sent an empty frame of {what}")]
    Empty {
        /// What there should have been in it.
        what: &'static str,
    },
    /// The figures at the end do not agree with what came.
    #[error("epoch {id} is not whole: {what} is {came}, announced as {announced}")]
    NotWhole {
        /// The epoch.
        id: EpochId,
        /// Which figure.
        what: &'static str,
        /// What came.
        came: u64,
        /// What was announced.
        announced: u64,
    },
    /// More came than this node promised to stage.
    #[error("epoch {id} is larger than the {budget_bytes} bytes this node stages; raise --staging-max on this node")]
    TooLarge {
        /// The epoch.
        id: EpochId,
        /// The budget.
        budget_bytes: u64,
    },
    /// The pages make no sense.
    #[error("epoch pages are damaged: {0}")]
    Pages(#[from] PageError),
}

/// Staging memory of a node that was not told how much: more than one epoch of a small guest, so
/// that a short delay in applying does not hold its output.
pub const STAGING_BYTES_DEFAULT: u64 = 512 << 20;

/// A whole epoch, checked.
#[derive(Debug, Default)]
pub struct StagedEpoch {
    /// Its name.
    pub id: EpochId,
    /// The image is whole with it.
    pub completes_resync: bool,
    /// Encoded pages, in order.
    pub chunks: Vec<Vec<u8>>,
    /// The machine's saved state.
    pub state: Vec<u8>,
    /// Staging bytes it takes.
    pub bytes: u64,
}

/// Staging memory: spent as frames arrive, given back as epochs are applied.
#[derive(Debug)]
pub struct StagingBudget {
    /// If it follows the guest, it is raised when that is known, before anything is spent.
    bytes_max: AtomicU64,
    follows_guest: bool,
    spent: Mutex<Spent>,
    given_back: Condvar,
}

#[derive(Debug, Default)]
struct Spent {
    bytes: u64,
    closed: bool,
}

impl StagingBudget {
    /// A budget of `bytes_max` bytes.
    pub fn new(bytes_max: u64) -> Arc<StagingBudget> {
        StagingBudget::with(bytes_max, false)
    }

    /// A budget for a guest that is not known yet: [`STAGING_BYTES_DEFAULT`], or one epoch of the
    /// guest if that is more.
    pub fn following() -> Arc<StagingBudget> {
        StagingBudget::with(STAGING_BYTES_DEFAULT, true)
    }

    fn with(bytes_max: u64, follows_guest: bool) -> Arc<StagingBudget> {
        let (spent, given_back) = (Mutex::default(), Condvar::new());
        Arc::new(StagingBudget { bytes_max: AtomicU64::new(bytes_max), follows_guest, spent, given_back })
    }

    /// The guest is known: an epoch of it has at most so many bytes.
    pub fn fit(&self, epoch_bytes_max: u64) {
        if self.follows_guest {
            self.bytes_max.store(epoch_bytes_max.max(STAGING_BYTES_DEFAULT), Ordering::Release);
        }
    }

    /// The whole budget.
    pub fn bytes_max(&self) -> u64 {
        self.bytes_max.load(Ordering::Acquire)
    }

    /// Bytes spent now.
    pub fn used(&self) -> u64 {
        self.spent.lock().bytes
    }

    /// Spends `bytes`, waiting until earlier epochs gave theirs back; `own` of what is spent
    /// belongs to the caller. False if they can never fit beside what the caller holds already, or
    /// if the budget is closed.
    pub fn spend(&self, bytes: u64, own: u64) -> bool {
        if own.saturating_add(bytes) > self.bytes_max() {
            return false;
        }
        let mut spent = self.spent.lock();
        while !spent.closed && spent.bytes.saturating_add(bytes) > self.bytes_max() {
            self.given_back.wait(&mut spent);
        }
        if spent.closed {
            return false;
        }
        spent.bytes += bytes;
        true
    }

    /// Gives `bytes` back.
    pub fn give_back(&self, bytes: u64) {
        if mutant::is("staging-not-given-back") {
            return;
        }
        let mut spent = self.spent.lock();
        spent.bytes = spent.bytes.saturating_sub(bytes);
        self.given_back.notify_all();
    }

    /// Nothing is staged any more: whoever waits for room wakes and gives up, or it would wait for
    /// ever for epochs that nobody applies.
    pub fn close(&self) {
        self.spent.lock().closed = true;
        self.given_back.notify_all();
    }
}

/// Collects the frames of one connection into epochs.
pub struct Stager {
    budget: Arc<StagingBudget>,
    pages_total: u64,
    open: Option<Open>,
}

struct Open {
    epoch: StagedEpoch,
    pages: u64,
    digest: u32,
}

impl Stager {
    /// A stager for a guest of `pages_total` pages.
    pub fn new(budget: Arc<StagingBudget>, pages_total: u64) -> Stager {
        Stager { budget, pages_total, open: None }
    }

    /// An epoch begins.
    pub fn begin(&mut self, id: EpochId, completes_resync: bool) -> Result<(), StageError> {
        let completes_resync = completes_resync || mutant::is("first-epoch-taken-for-the-last");
        if self.open.is_some() {
            return Err(StageError::OutOfPlace { what: "the begin of an epoch inside another" });
        }
        let epoch = StagedEpoch { id, completes_resync, ..StagedEpoch::default() };
        self.open = Some(Open { epoch, pages: 0, digest: 0 });
        Ok(())
    }

    /// Encoded pages of the open epoch.
    pub fn pages(&mut self, payload: &[u8]) -> Result<(), StageError> {
        check_not_empty(payload, "pages")?;
        let count = check_pages(payload, self.pages_total)?;
        let open = self.spend(payload, "pages")?;
        open.pages += count;
        open.epoch.chunks.push(payload.to_vec());
        Ok(())
    }

    /// A part of the open epoch's machine state.
    pub fn state(&mut self, payload: &[u8]) -> Result<(), StageError> {
        check_not_empty(payload, "machine state")?;
        let open = self.spend(payload, "machine state")?;
        open.epoch.state.extend_from_slice(payload);
        Ok(())
    }

    fn spend(&mut self, payload: &[u8], what: &'static str) -> Result<&mut Open, StageError> {
        let open = self.open.as_mut().ok_or(StageError::OutOfPlace { what })?;
        let bytes = payload.len() as u64;
        if !self.budget.spend(bytes, open.epoch.bytes) {
            return Err(StageError::TooLarge { id: open.epoch.id, budget_bytes: self.budget.bytes_max() });
        }
        open.epoch.bytes += bytes;
        open.digest = crc32c::crc32c_append(open.digest, payload);
        Ok(open)
    }

    /// Background pages, checked: they may come only between epochs.
    pub fn background(&mut self, payload: &[u8]) -> Result<Vec<u8>, StageError> {
        if self.open.is_some() {
            return Err(StageError::OutOfPlace { what: "background pages inside an epoch" });
        }
        check_not_empty(payload, "background pages")?;
        check_pages(payload, self.pages_total)?;
        if !self.budget.spend(payload.len() as u64, 0) {
            return Err(StageError::TooLarge { id: EpochId::default(), budget_bytes: self.budget.bytes_max() });
        }
        Ok(payload.to_vec())
    }

    /// The open epoch ends: it is whole if the figures agree.
    pub fn end(&mut self, id: EpochId, pages: u64, state_bytes: u64, digest: u32) -> Result<StagedEpoch, StageError> {
        let open = self.open.take().ok_or(StageError::OutOfPlace { what: "the end of an epoch" })?;
        let figures = [
            ("its number", open.epoch.id.epoch, id.epoch),
            ("its generation", open.epoch.id.generation.0, id.generation.0),
            ("its page count", open.pages, pages),
            ("its state's length", open.epoch.state.len() as u64, state_bytes),
            ("its checksum", u64::from(open.digest), u64::from(digest)),
        ];
        for (what, came, announced) in figures {
            if came != announced {
                self.budget.give_back(open.epoch.bytes);
                return Err(StageError::NotWhole { id, what, came, announced });
            }
        }
        Ok(open.epoch)
    }
}

fn check_not_empty(payload: &[u8], what: &'static str) -> Result<(), StageError> {
    if payload.is_empty() { Err(StageError::Empty { what }) } else { Ok(()) }
}

/// Checks that a chunk can be applied, all of it, and counts its pages.
fn check_pages(chunk: &[u8], pages_total: u64) -> Result<u64, PageError> {
    let mut scratch = [0; PAGE_BYTES];
    let mut count = 0;
    for record in PageDecoder::new(chunk, pages_total) {
        let record = record?;
        if record.kind == PageKind::Lz4 {
            record.expand(&mut scratch)?;
        }
        count += 1;
    }
    Ok(count)
}

impl Drop for Stager {
    fn drop(&mut self) {
        if let Some(open) = self.open.take() {
            self.budget.give_back(open.epoch.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::types::Generation;

    fn id(epoch: u64) -> EpochId {
        EpochId { generation: Generation(2), epoch }
    }

    #[test]
    fn only_a_whole_epoch_comes_out() {
        let mut stager = Stager::new(StagingBudget::new(1000), 16);
        assert!(stager.state(b"lost").is_err(), "state outside an epoch");
        stager.begin(id(0), false).unwrap();
        assert!(stager.begin(id(1), false).is_err());
        stager.state(b"abc").unwrap();
        let digest = crc32c::crc32c(b"abc");
        assert!(matches!(stager.end(id(0), 1, 3, digest), Err(StageError::NotWhole { what: "its page count", .. })));
        stager.begin(id(0), false).unwrap();
        stager.state(b"a").unwrap();
        stager.state(b"bc").unwrap();
        assert!(matches!(stager.background(b"pages"), Err(StageError::OutOfPlace { .. })));
        assert!(matches!(stager.state(&[]), Err(StageError::Empty { .. })));
        let epoch = stager.end(id(0), 0, 3, digest).unwrap();
        assert_eq!((epoch.state.as_slice(), epoch.bytes), (b"abc".as_slice(), 3));
    }

    #[test]
    fn the_budget_is_never_exceeded() {
        let budget = StagingBudget::new(10);
        let mut stager = Stager::new(budget.clone(), 16);
        stager.begin(id(0), false).unwrap();
        stager.state(&[0; 8]).unwrap();
        assert!(matches!(stager.state(&[0; 3]), Err(StageError::TooLarge { budget_bytes: 10, .. })));
        assert_eq!(budget.used(), 8);
        drop(stager);
        assert_eq!(budget.used(), 0, "an unfinished epoch gives its memory back");
    }
}
