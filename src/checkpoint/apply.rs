//! Applying committed epochs to the image, in order, on a thread of its own.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use thiserror::Error;

use super::block_hashes::hash_run;
use super::image::{GuestImage, ImagePageError};
use super::stage::{StagedEpoch, StagingBudget};
use crate::protocol::block_hashes::BlockHash;
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::shared_disk::KeptWrites;
use crate::protocol::types::EpochId;
use crate::wire::{PageDecoder, PageError, PageKind};

/// Why the image cannot be activated. Staged epochs were checked, so the first is a bug, and the
/// second is one or a disk's storage that failed.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// Pages that were checked do not decode.
    #[error("a committed epoch does not decode ({0}); the image is unusable, please report this with the log")]
    Pages(#[from] PageError),
    /// Pages that were checked do not fit, or a disk's storage does not take them.
    #[error("a committed epoch could not be put into the image, or not be read there ({0}); the image is unusable")]
    Image(#[from] ImagePageError),
    /// Another epoch than asked for is the newest.
    #[error("the image holds epoch {newest:?}, not the committed epoch {wanted}; it is not activated")]
    NotNewest {
        /// The epoch asked for.
        wanted: EpochId,
        /// The newest in the image.
        newest: Option<EpochId>,
    },
    /// The thread is gone.
    #[error("the applying thread ended early; the image is not activated")]
    Gone,
}

/// What the thread tells of itself.
#[derive(Debug)]
pub enum ApplyNews {
    /// The epoch that makes the image whole is in it.
    Whole(EpochId),
    /// The hashes asked for.
    BlocksHashed {
        /// The index of the first block.
        first: u64,
        /// The hashes.
        hashes: Vec<BlockHash>,
    },
    /// The image is spoilt.
    Failed(String),
}

enum Job {
    Background(Vec<u8>),
    Epoch(Box<StagedEpoch>),
    HashBlocks(Range<u64>),
    Finish(EpochId, Sender<Result<Vec<u8>, ApplyError>>),
    Forget(EpochId),
    WriteKept(Box<dyn FnOnce(Result<(), ApplyError>) + Send>),
}

/// The applying thread. Dropping it ends the thread once its queue is empty.
pub struct Applier {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    /// The image is wanted: nobody waits for hashes any more.
    abort: Arc<AtomicBool>,
}

impl Applier {
    /// Starts the thread for `image`; applied bytes go back to `budget`. `tell` is called from the
    /// thread.
    pub fn start(
        image: GuestImage,
        budget: Arc<StagingBudget>,
        tell: impl Fn(ApplyNews) + Send + 'static,
    ) -> std::io::Result<Applier> {
        let (jobs, queue) = unbounded();
        let abort = Arc::new(AtomicBool::new(false));
        let (newest, state, failed, tell) = (None, Vec::new(), None, Box::new(tell));
        let kept = KeptWrites::default();
        let image = Image { image, budget, newest, state, kept, failed, tell, abort: Arc::clone(&abort) };
        let thread = std::thread::Builder::new().name("mcd-apply".into()).spawn(move || image.run(&queue))?;
        Ok(Applier { jobs: Some(jobs), thread: Some(thread), abort })
    }

    /// Applies background pages. The queue is bounded by the staging budget they were taken from.
    pub fn background(&self, payload: Vec<u8>) {
        self.submit(Job::Background(payload));
    }

    /// Applies a committed epoch.
    pub fn epoch(&self, epoch: Box<StagedEpoch>) {
        self.submit(Job::Epoch(epoch));
    }

    /// Hashes these blocks, as they are with all that was handed over before and nothing that is
    /// handed over later.
    pub fn hash_blocks(&self, run: Range<u64>) {
        self.submit(Job::HashBlocks(run));
    }

    /// Applies what is queued and gives the machine state of `epoch`, which must be the newest.
    pub fn finish(&self, epoch: EpochId) -> Result<Vec<u8>, ApplyError> {
        self.abort.store(true, Ordering::Relaxed);
        let (reply, result) = bounded(1);
        self.submit(Job::Finish(epoch, reply));
        result.recv().map_err(|_| ApplyError::Gone)?
    }

    /// Shared storage has the writes of every epoch up to `through`.
    pub fn forget(&self, through: EpochId) {
        self.submit(Job::Forget(through));
    }

    /// Begins to write what is kept of committed epochs to shared storage; calls `done` from the
    /// applying thread when the storage has it for good. It stays kept, so this can be done again.
    pub fn write_kept(&self, done: impl FnOnce(Result<(), ApplyError>) + Send + 'static) {
        self.submit(Job::WriteKept(Box::new(done)));
    }

    fn submit(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // The thread lives as long as this handle; if it died, `finish` says so.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Applier {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Which pages of a chunk are in their places.
enum Placed {
    /// All of them.
    All,
    /// Those of shared storage are not: they wait for a takeover, or to be forgotten.
    AllButShared,
}

struct Image {
    image: GuestImage,
    budget: Arc<StagingBudget>,
    newest: Option<EpochId>,
    state: Vec<u8>,
    /// Encoded pages with what goes to shared storage. They count as staged until they are
    /// forgotten.
    kept: KeptWrites<Vec<Vec<u8>>>,
    failed: Option<ApplyError>,
    tell: Box<dyn Fn(ApplyNews) + Send>,
    abort: Arc<AtomicBool>,
}

impl Image {
    fn run(mut self, queue: &Receiver<Job>) {
        for job in queue {
            match job {
                Job::Background(payload) => {
                    let applied = self.write(&payload).map(drop);
                    self.note(applied);
                    self.budget.give_back(payload.len() as u64);
                }
                Job::Epoch(epoch) => self.apply(*epoch),
                Job::HashBlocks(run) => self.hash_blocks(run),
                Job::Finish(wanted, reply) => {
                    // The node that asked may have given up.
                    let _ = reply.send(self.finish(wanted));
                }
                Job::Forget(through) => {
                    let bytes: usize = self.kept.forget(through).flatten().map(|chunk| chunk.len()).sum();
                    self.budget.give_back(bytes as u64);
                }
                Job::WriteKept(done) => done(self.write_kept()),
            }
        }
    }

    fn apply(&mut self, epoch: StagedEpoch) {
        let (mut kept, mut kept_bytes) = (Vec::new(), 0);
        for chunk in epoch.chunks {
            match self.write(&chunk) {
                Ok(Placed::AllButShared) => {
                    kept_bytes += chunk.len() as u64;
                    kept.push(chunk);
                }
                done => self.note(done.map(drop)),
            }
        }
        if !kept.is_empty() {
            self.kept.keep(epoch.id, kept);
        }
        self.newest = Some(epoch.id);
        self.state = epoch.state;
        if epoch.completes_resync && self.failed.is_none() {
            (self.tell)(ApplyNews::Whole(epoch.id));
        }
        self.budget.give_back(epoch.bytes.saturating_sub(kept_bytes));
    }

    fn hash_blocks(&mut self, run: Range<u64>) {
        /// Why there are no hashes.
        enum NoHashes {
            Aborted,
            Unreadable(ImagePageError),
        }
        let first = run.start;
        let reader = self.image.reader(&run);
        let hashes = hash_run(run, |index, block| match self.abort.load(Ordering::Relaxed) {
            true => Err(NoHashes::Aborted),
            false => reader.read(index, block).map_err(NoHashes::Unreadable),
        });
        match hashes {
            Ok(hashes) => (self.tell)(ApplyNews::BlocksHashed { first, hashes }),
            Err(NoHashes::Unreadable(error)) => self.note(Err(error.into())),
            Err(NoHashes::Aborted) => {}
        }
    }

    fn note(&mut self, applied: Result<(), ApplyError>) {
        if let Err(error) = applied {
            if self.failed.is_none() {
                tracing::error!(%error, "the image cannot be updated");
                (self.tell)(ApplyNews::Failed(error.to_string()));
            }
            self.failed.get_or_insert(error);
        }
    }

    /// Writes pages to their places, but for those of shared storage.
    fn write(&self, payload: &[u8]) -> Result<Placed, ApplyError> {
        let mut image_only = true;
        self.put(payload, |index| {
            let shared = self.image.is_shared(index);
            image_only &= !shared;
            !shared
        })?;
        Ok(if image_only { Placed::All } else { Placed::AllButShared })
    }

    /// Newest first, and of each block only the newest: see [`KeptWrites::newest_first`].
    fn write_kept(&self) -> Result<(), ApplyError> {
        let mut seen = BTreeSet::new();
        for chunk in self.kept.newest_first().flatten() {
            self.put(chunk, |index| self.image.is_shared(index) && seen.insert(index))?;
        }
        Ok(self.image.flush()?)
    }

    /// Writes those pages that `wanted` wants.
    fn put(&self, payload: &[u8], mut wanted: impl FnMut(u64) -> bool) -> Result<(), ApplyError> {
        let mut scratch = [0; PAGE_BYTES];
        let mut writer = self.image.writer();
        for record in PageDecoder::new(payload, self.image.pages()) {
            let record = record?;
            if !wanted(record.index) {
                continue;
            }
            match (record.kind, record.raw()) {
                (PageKind::Zero, _) => writer.put(record.index, None)?,
                (_, Some(page)) => writer.put(record.index, Some(page))?,
                (_, None) => {
                    record.expand(&mut scratch)?;
                    writer.put(record.index, Some(&scratch))?;
                }
            }
        }
        Ok(writer.finish()?)
    }

    fn finish(&mut self, wanted: EpochId) -> Result<Vec<u8>, ApplyError> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.newest != Some(wanted) {
            return Err(ApplyError::NotNewest { wanted, newest: self.newest });
        }
        Ok(std::mem::take(&mut self.state))
    }
}
