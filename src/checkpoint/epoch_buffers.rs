//! Everything of a primary that belongs to epochs, kept in step: its output, its dirty pages, and
//! the journals of its disks.
//!
//! ```text
//!            output gate   dirty pages   disk journal   shared-disk journal
//!  alone     pass          –             pass           pass, all that is held may go
//!  track     –             forget        keep           hold
//!  cut       hold or seal  take          cut            cut                      (in the pause)
//!  put_back  –             back          back           back
//!  committed –             safe          safe           wait to be written
//!  release   let go        –             –              (write_through)
//!  untrack   –             forget        pass           pass, all that is held may go
//!  fence     discard       –             close          close
//! ```
//!
//! # Threads
//!
//! Two threads may use it at once, each one verb after the other:
//!
//! - one that captures: [`track`](EpochBuffers::track), [`prepare`](EpochBuffers::prepare),
//!   [`cut`](EpochBuffers::cut), [`put_back`](EpochBuffers::put_back),
//!   [`untrack`](EpochBuffers::untrack), and
//!   [`with_dirty_pages`](EpochBuffers::with_dirty_pages);
//! - one that decides, and commits: [`decide`](EpochBuffers::decide),
//!   [`committed`](EpochBuffers::committed), [`release`](EpochBuffers::release),
//!   [`write_through`](EpochBuffers::write_through), [`alone`](EpochBuffers::alone) and
//!   [`fence`](EpochBuffers::fence). Of the last two the parts that may wait for shared storage can
//!   be left to the capturing side ([`pass_output`](EpochBuffers::pass_output), then
//!   [`pass_disks`](EpochBuffers::pass_disks); [`close_output`](EpochBuffers::close_output), then
//!   [`close_disks`](EpochBuffers::close_disks)), as a node does.
//!
//! Every verb of one side may run beside every verb of the other. Dirty pages are locked by the
//! capturing side only, so a commit never makes a pause wait for them: it leaves the number of the
//! committed epoch, which the next cut takes up.
//!
//! # The later decision wins
//!
//! A verb of the capturing side may run long after it was decided on, and while the deciding side
//! decides otherwise. So each takes the number of its decision, and each buffer keeps the number of
//! the newest change of its mode; what was decided before that change is passed over. A cut that
//! was begun before [`alone`](EpochBuffers::alone) or [`fence`](EpochBuffers::fence) and ends after
//! it neither holds output nor makes a journal track. A fence is for good: no decision is later.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use thiserror::Error;

use super::capture::{Capture, CaptureSource};
use super::dirty_pages::DirtyPages;
use super::expected_pages::ExpectedPages;
use super::journal::{DiskJournal, JournalMode};
use super::output::{OutputGate, ReleaseEnd};
use super::shared_journal::SharedJournal;
use crate::protocol::pages::PageSet;
use crate::protocol::primary::OutputCut;
use crate::protocol::types::{ConnId, EpochId, Instant};

/// Most times that room is made for one cut while the guest goes on writing.
const ROUNDS_MAX: u32 = 8;

/// The number of a decision; a later one has a higher number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decision(u64);

/// Later than every decision.
const FENCED: Decision = Decision(u64::MAX);

/// What is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The decision to cut.
    pub decision: Decision,
    /// The epoch that ends.
    pub id: EpochId,
    /// What becomes of its output.
    pub output: OutputCut,
}

/// Why an epoch was not cut.
#[derive(Debug, Error)]
pub enum CutError<E> {
    /// Something was decided since that leaves no place for the epoch.
    #[error("it was decided meanwhile that this node goes on alone, or ends")]
    Superseded,
    /// The machine.
    #[error(transparent)]
    Source(E),
}

/// Devices that may find room again, and so are to be kicked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use = "a device that found no room waits until it is kicked"]
pub struct RoomAgain {
    /// The network device.
    pub net: bool,
    /// The disks.
    pub disks: bool,
}

/// A buffer, and the newest change of its mode.
struct Ordered<T> {
    newest: Mutex<Decision>,
    buffer: T,
}

impl<T> Ordered<T> {
    fn new(buffer: T) -> Ordered<T> {
        Ordered { newest: Mutex::default(), buffer }
    }

    /// Changes the buffer's mode, unless a later decision did already.
    fn change<R>(&self, decision: Decision, change: impl FnOnce(&T) -> R) -> Option<R> {
        let mut newest = self.newest.lock();
        (decision >= *newest).then(|| {
            *newest = decision;
            change(&self.buffer)
        })
    }

    /// Does something in the mode that stood when it was decided on; `None` if that changed since.
    fn within<R>(&self, decision: Decision, act: impl FnOnce(&T) -> R) -> Option<R> {
        let newest = self.newest.lock();
        (decision >= *newest).then(|| act(&self.buffer))
    }
}

/// The capturing side's own.
struct Tracked {
    /// The decision since which pages are tracked; `None` if they are not.
    since: Option<Decision>,
    dirty: DirtyPages,
    expected: ExpectedPages,
}

/// The buffers of one machine.
pub struct EpochBuffers {
    decisions: AtomicU64,
    output: Ordered<Arc<OutputGate>>,
    journal: Ordered<Arc<DiskJournal>>,
    shared: Option<Ordered<Arc<SharedJournal>>>,
    tracked: Mutex<Tracked>,
    /// The newest committed epoch that the capturing side has not taken up yet.
    committed: Mutex<Option<EpochId>>,
}

impl EpochBuffers {
    /// The buffers of a machine of `pages` pages; all are closed still.
    pub fn new(
        pages: u64,
        output: Arc<OutputGate>,
        journal: Arc<DiskJournal>,
        shared: Option<Arc<SharedJournal>>,
    ) -> EpochBuffers {
        let (dirty, expected) = (DirtyPages::new(pages), ExpectedPages::default());
        EpochBuffers {
            decisions: AtomicU64::new(0),
            output: Ordered::new(output),
            journal: Ordered::new(journal),
            shared: shared.map(Ordered::new),
            tracked: Mutex::new(Tracked { since: None, dirty, expected }),
            committed: Mutex::new(None),
        }
    }

    /// Numbers a decision that the capturing side is to carry out.
    pub fn decide(&self) -> Decision {
        Decision(self.decisions.fetch_add(1, Ordering::SeqCst) + 1)
    }

    // ---- the capturing side ----

    /// A resync begins, for the newcomer on `conn`: what the guest writes from now on belongs to
    /// epochs. Track the machine's dirty pages first. Waits for disk writes under way.
    pub fn track(&self, decision: Decision, conn: ConnId) -> RoomAgain {
        self.forget_pages(Some(decision));
        self.journal.change(decision, |journal| journal.set_mode(JournalMode::Keep));
        if let Some(shared) = &self.shared {
            shared.change(decision, |shared| shared.hold(conn));
        }
        RoomAgain { net: false, disks: true }
    }

    /// Nobody gets epochs any more.
    pub fn untrack(&self, decision: Decision) -> RoomAgain {
        self.forget_pages(None);
        let _ = self.pass_disks(decision);
        RoomAgain { net: false, disks: true }
    }

    fn forget_pages(&self, since: Option<Decision>) {
        let mut tracked = self.tracked.lock();
        tracked.since = since;
        tracked.dirty.forget();
        tracked.expected = ExpectedPages::default();
        *self.committed.lock() = None;
    }

    /// Makes room in `into` for the epoch that is to be cut next, while the guest runs. It reads
    /// the dirty log for that, unless the last epochs were small and recent: reading makes the
    /// guest fault again on each page that it goes on writing.
    ///
    /// # Errors
    /// The machine's. Nothing is lost: the pages that were read are part of the next cut.
    pub fn prepare<S: CaptureSource>(&self, now: Instant, source: &mut S, into: &mut Capture) -> Result<(), S::Error> {
        let mut tracked = self.tracked.lock();
        if tracked.since.is_none() || tracked.expected.are_few(now, into.room_pages()) {
            return Ok(());
        }
        self.take_up_commit(&mut tracked.dirty);
        let pages_max = usize::try_from(tracked.dirty.pages_max()).unwrap_or(usize::MAX);
        for _ in 0..ROUNDS_MAX {
            tracked.dirty.collect(|set| source.collect_dirty(set))?;
            let pages = usize::try_from(tracked.dirty.pending_max()).unwrap_or(usize::MAX);
            // What the guest writes while room is made, and until the pause.
            if into.room_pages() >= pages.saturating_add(pages / 8 + 512).min(pages_max) {
                break;
            }
            into.make_room(pages.saturating_add(pages / 4 + 1024).min(pages_max));
        }
        Ok(())
    }

    /// Cuts an epoch: copies it out of the paused machine, and closes it in every buffer. The
    /// output is cut even if the copy fails, as the guest goes on in any case. After an error, put
    /// back.
    ///
    /// # Errors
    /// [`CutError`]; the dirty pages that were read are kept.
    pub fn cut<S: CaptureSource>(
        &self,
        now: Instant,
        cut: Cut,
        source: &mut S,
        into: &mut Capture,
    ) -> Result<(), CutError<S::Error>> {
        let copied = into.fill(|into| self.copy(now, cut, source, into));
        let Cut { decision, id, output } = cut;
        let sealed = match output {
            OutputCut::Pass => self.output.within(decision, |_| ()),
            OutputCut::Hold => self.output.change(decision, |gate| gate.hold()),
            OutputCut::Seal => self.output.within(decision, |gate| gate.seal(id.epoch)),
        };
        copied?;
        sealed.ok_or(CutError::Superseded)
    }

    fn copy<S: CaptureSource>(
        &self,
        now: Instant,
        Cut { decision, id, .. }: Cut,
        source: &mut S,
        into: &mut Capture,
    ) -> Result<(), CutError<S::Error>> {
        let cut_journal = |journal: &Arc<DiskJournal>| {
            journal.cut(id);
            journal.taken()
        };
        into.id = id;
        into.blocks = Some(self.journal.within(decision, cut_journal).ok_or(CutError::Superseded)?);
        if let Some(shared) = &self.shared {
            into.shared = Some(shared.within(decision, |shared| shared.cut(id)).ok_or(CutError::Superseded)?);
        }
        // The guest is paused, while the vCPU threads go on reading their own state: copying memory
        // meanwhile costs nothing, and no part of saving writes guest memory.
        let mut tracked = self.tracked.lock();
        let Tracked { since, dirty, expected } = &mut *tracked;
        if since.is_none_or(|since| since > decision) {
            return Err(CutError::Superseded);
        }
        self.take_up_commit(dirty);
        let taken = dirty.take(id, |set| source.collect_dirty(set)).map_err(CutError::Source)?;
        into.reserve(usize::try_from(taken.count()).unwrap_or(usize::MAX));
        into.pages.extend(taken.iter());
        source.copy_pages(taken, &mut into.bytes);
        expected.note(now, into.pages.len());
        drop(tracked);
        source.save(&mut into.state).map_err(CutError::Source)
    }

    /// The epoch that was cut will not arrive: what it held is part of the next.
    pub fn put_back(&self, decision: Decision) {
        let mut tracked = self.tracked.lock();
        self.take_up_commit(&mut tracked.dirty);
        tracked.dirty.put_back();
        drop(tracked);
        self.journal.within(decision, |journal| journal.put_back());
        if let Some(shared) = &self.shared {
            shared.within(decision, |shared| shared.put_back());
        }
    }

    /// The dirty pages of the epoch cut last.
    pub fn with_dirty_pages<R>(&self, look: impl FnOnce(&PageSet) -> R) -> R {
        look(self.tracked.lock().dirty.taken())
    }

    fn take_up_commit(&self, dirty: &mut DirtyPages) {
        let committed = self.committed.lock().take();
        committed.into_iter().for_each(|id| dirty.committed(id));
    }

    // ---- the committing side ----

    /// Epoch `id` is committed: what it held is safe elsewhere.
    pub fn committed(&self, id: EpochId) -> RoomAgain {
        *self.committed.lock() = Some(id);
        let journal = &self.journal.buffer;
        journal.committed(id);
        self.shared.iter().for_each(|shared| shared.buffer.committed(id));
        RoomAgain { net: false, disks: journal.take_was_full() }
    }

    /// Lets the output of epochs up to `through` go, as long as `may` says so before each frame.
    pub fn release(&self, through: u64, may: impl FnMut() -> bool) -> (ReleaseEnd, RoomAgain) {
        let gate = &self.output.buffer;
        let end = gate.release(through, may);
        (end, RoomAgain { net: gate.take_was_full(), disks: false })
    }

    /// Writes to shared disks of epochs up to `through` may go out.
    pub fn write_through(&self, through: EpochId) {
        self.shared.iter().for_each(|shared| shared.buffer.write_through(through));
    }

    /// This node runs the guest, and nobody else can: all output and all writes go, those held
    /// first. It waits for nothing but writes to shared storage that are under way, and does so
    /// last.
    pub fn alone(&self) -> RoomAgain {
        let decision = self.decide();
        self.pass_output(decision);
        self.pass_disks(decision)
    }

    /// The part of [`alone`](EpochBuffers::alone) that waits for nothing.
    pub fn pass_output(&self, decision: Decision) {
        self.output.change(decision, |gate| gate.pass());
    }

    /// Another node runs the guest: nothing leaves any more, what is held is thrown away, and so it
    /// stays. It waits for nothing but writes to shared storage that are under way, and does so
    /// last; a write to a replicated disk that is under way still ends.
    pub fn fence(&self) {
        self.close_output();
        self.close_disks();
    }

    /// The part of [`fence`](EpochBuffers::fence) that waits for nothing.
    pub fn close_output(&self) {
        self.output.change(FENCED, |gate| gate.close());
    }

    /// The part of [`fence`](EpochBuffers::fence) that may wait for shared storage.
    pub fn close_disks(&self) {
        self.journal.change(FENCED, |journal| journal.stop(JournalMode::Closed));
        if let Some(shared) = &self.shared {
            shared.change(FENCED, |shared| shared.close());
        }
    }

    /// The part of [`alone`](EpochBuffers::alone) that may wait for shared storage.
    pub fn pass_disks(&self, decision: Decision) -> RoomAgain {
        self.journal.change(decision, |journal| journal.stop(JournalMode::Pass));
        if let Some(shared) = &self.shared {
            shared.change(decision, |shared| shared.alone());
        }
        RoomAgain { net: true, disks: true }
    }

    /// The output. Its mode is changed by this type's verbs only.
    pub fn output(&self) -> &Arc<OutputGate> {
        &self.output.buffer
    }
}

#[cfg(test)]
mod tests;
