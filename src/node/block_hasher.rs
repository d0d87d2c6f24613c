//! Hashes of a primary's own blocks: made by threads of their own, because storage may be slow and
//! the driver must not wait for it.

use std::ops::Range;
use std::sync::Arc;

use crossbeam::channel::{Sender, unbounded};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::priority;
use crate::checkpoint::block_hashes::hash_run;
use crate::checkpoint::image::GuestImage;
use crate::checkpoint::journal::DiskJournal;
use crate::control::verify::{DiskVerify, VerifyReport, VerifyState};
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::types::EpochId;
use crate::protocol::verify::{Outcome, Verify};

/// Most holes that are told at once; what is behind them is asked for again.
const HOLES_MAX: usize = 65_536;

/// A question.
struct Job {
    ticket: u64,
    run: Range<u64>,
    what: What,
}

/// What is asked of blocks.
enum What {
    /// Their hashes, as they were when the epoch was cut, or as they are.
    Hashes(Option<EpochId>),
    /// Which are holes.
    Holes,
}

/// Two threads, of which one at a time has something to do. They end with this handle, which does
/// not wait for them.
pub(crate) struct BlockHasher {
    /// For a resync: the guest is unprotected until it is done, so it goes beside the guest.
    resync: Sender<Job>,
    /// For a verify: nobody waits for it, so the guest goes first.
    verify: Sender<Job>,
}

impl BlockHasher {
    /// Starts the threads for `image`, whose writes go through `journal`; answers go to `events`.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub(crate) fn start(
        image: GuestImage,
        journal: Arc<DiskJournal>,
        events: InboxSender,
    ) -> std::io::Result<BlockHasher> {
        let worker = Worker { image, journal, events };
        let resync = worker.clone().start("mcd-hash", || {})?;
        let verify = worker.start("mcd-verify", priority::lower)?;
        Ok(BlockHasher { resync, verify })
    }

    /// Hashes these blocks, as they were when epoch `as_of` was cut, or as they are.
    pub(crate) fn hash_blocks(&self, ticket: u64, run: Range<u64>, as_of: Option<EpochId>) {
        let thread = if as_of.is_some() { &self.verify } else { &self.resync };
        // The thread ends only after this handle.
        let _ = thread.send(Job { ticket, run, what: What::Hashes(as_of) });
    }

    /// Finds the holes among these blocks of a disk.
    pub(crate) fn find_holes(&self, ticket: u64, run: Range<u64>) {
        // The thread ends only after this handle.
        let _ = self.resync.send(Job { ticket, run, what: What::Holes });
    }
}

/// What a thread works with.
#[derive(Clone)]
struct Worker {
    image: GuestImage,
    journal: Arc<DiskJournal>,
    events: InboxSender,
}

impl Worker {
    fn start(self, name: &str, begin: impl FnOnce() + Send + 'static) -> std::io::Result<Sender<Job>> {
        // The protocol asks one question at a time.
        let (jobs, queue) = unbounded::<Job>();
        std::thread::Builder::new().name(name.into()).spawn(move || {
            begin();
            for Job { ticket, run, what } in queue {
                let answer = match what {
                    What::Hashes(as_of) => NodeEvent::OwnHashes { ticket, hashes: self.hash_blocks(run, as_of) },
                    What::Holes => self.find_holes(ticket, &run),
                };
                if self.events.report(answer).is_err() {
                    return;
                }
            }
        })?;
        Ok(jobs)
    }

    fn find_holes(&self, ticket: u64, run: &Range<u64>) -> NodeEvent {
        let found = self.image.holes(run, HOLES_MAX);
        let (holes, through) = found.unwrap_or_else(|error| {
            tracing::warn!(%error, "holes are not looked for: the whole disk is sent");
            (Vec::new(), run.start)
        });
        NodeEvent::Holes { ticket, through, holes }
    }

    fn hash_blocks(&self, run: Range<u64>, as_of: Option<EpochId>) -> Result<Vec<BlockHash>, String> {
        let reader = self.image.reader(&run);
        let hashes = hash_run(run, |index, block| {
            reader.read(index, block).map_err(|error| error.to_string())?;
            match as_of {
                Some(epoch) => {
                    self.journal.copy_before_write().as_it_was(index, epoch, block).map_err(|error| error.to_string())
                }
                None => Ok(()),
            }
        });
        if let Some(epoch) = as_of {
            self.journal.copy_before_write().release_of(epoch);
        }
        hashes
    }
}

/// Notices when the report on a verify has changed.
#[derive(Default)]
pub(crate) struct VerifyWatch {
    /// The verify as of the last report.
    reported: Option<Verify>,
}

impl VerifyWatch {
    /// The report, if it is another than last time.
    pub(crate) fn news(&mut self, verify: Option<&Verify>) -> Option<VerifyReport> {
        if verify == self.reported.as_ref() {
            return None;
        }
        self.reported = verify.cloned();
        verify.map(report)
    }
}

fn report(verify: &Verify) -> VerifyReport {
    let disks: Vec<DiskVerify> = verify
        .disks()
        .iter()
        .map(|disk| DiskVerify {
            disk: disk.disk as u64,
            blocks: disk.blocks,
            compared: disk.compared,
            different: disk.different,
            ranges: disk.ranges.iter().map(|range| (range.start, range.end)).collect(),
        })
        .collect();
    let (state, why) = match verify.outcome() {
        Outcome::Running => (VerifyState::Running, None),
        Outcome::Done if disks.iter().any(|disk| disk.different > 0) => (VerifyState::Different, None),
        Outcome::Done => (VerifyState::Equal, None),
        Outcome::Failed(why) => (VerifyState::Failed, Some(why.clone())),
    };
    let epochs = verify.epochs().map(|(first, last)| (first.to_string(), last.to_string()));
    VerifyReport { state, why, block_bytes: PAGE_BYTES as u64, epochs, disks }
}
