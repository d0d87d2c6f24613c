//! The thread that stamps a node's disk images: neither a takeover nor a commit waits for a disk.

use std::path::PathBuf;
use std::thread::JoinHandle;

use crossbeam::channel::{Sender, unbounded};

use super::shared_disks::NodeImage;
use crate::checkpoint::snapshot::SnapshotId;
use crate::checkpoint::stamp::{Stamp, StampError, StampState};
use crate::protocol::types::{EpochId, GuestName};

/// A way to ask for stamps without waiting.
#[derive(Clone)]
pub(crate) struct Stamper {
    jobs: Option<Sender<Job>>,
}

impl Stamper {
    /// Once everything written so far is durable, the images are stamped so.
    pub(crate) fn stamp(&self, at: EpochId, state: StampState) {
        self.submit(at, state, None);
    }

    /// The same when the guest stopped for good, with this snapshot of its last moment if there is
    /// one.
    pub(crate) fn stamp_last(&self, at: EpochId, snapshot: Option<SnapshotId>) {
        self.submit(at, StampState::Whole, snapshot);
    }

    fn submit(&self, at: EpochId, state: StampState, snapshot: Option<SnapshotId>) {
        if let Some(jobs) = &self.jobs {
            // The thread lives as long as the disks; a stamp that comes later is not needed.
            let _ = jobs.send(Job::Stamp(at, state, snapshot));
        }
    }
}

enum Job {
    Stamp(EpochId, StampState, Option<SnapshotId>),
    End,
}

/// The handle of the stamping thread. Dropping it waits for the last stamp.
pub(super) struct StampWriter {
    guest: GuestName,
    images: Vec<(PathBuf, NodeImage)>,
    /// None if there is nothing to stamp.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl StampWriter {
    /// Starts the thread, unless there are no images.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start(guest: GuestName, images: Vec<(PathBuf, NodeImage)>) -> std::io::Result<StampWriter> {
        if images.is_empty() {
            return Ok(StampWriter { guest, images, jobs: None, thread: None });
        }
        let (jobs, queue) = unbounded();
        let (of, all) = (guest.clone(), images.clone());
        let thread = std::thread::Builder::new().name("mcd-stamp".into()).spawn(move || {
            for job in queue {
                let Job::Stamp(at, state, snapshot) = job else { return };
                let flushed = all.iter().try_for_each(|(path, image)| {
                    image.backend().flush().map_err(|reason| StampError::Io {
                        doing: "flush the image of",
                        path: path.clone(),
                        reason,
                    })
                });
                // An older stamp refuses a start that would have been right, and never allows a
                // wrong one.
                if let Err(error) = flushed.and_then(|()| stamp(&of, &all, (at, state, snapshot))) {
                    tracing::warn!(%error, %at, "disk images keep their old stamp");
                }
            }
        })?;
        Ok(StampWriter { guest, images, jobs: Some(jobs), thread: Some(thread) })
    }
}

impl Drop for StampWriter {
    fn drop(&mut self) {
        self.end();
    }
}

impl StampWriter {
    /// A way to ask for stamps without waiting.
    pub(super) fn stamper(&self) -> Stamper {
        Stamper { jobs: self.jobs.clone() }
    }

    /// Stamps the images that are not shared as a newcomer's, in the caller's thread; returns when
    /// that is durable.
    ///
    /// # Errors
    /// [`StampError`].
    pub(super) fn begin_filling(&self, at: EpochId) -> Result<(), StampError> {
        let own: Vec<_> = self.images.iter().filter(|(_, image)| image.shared().is_none()).cloned().collect();
        stamp(&self.guest, &own, (at, StampState::Filling, None))
    }

    /// Waits for the last stamp.
    pub(super) fn end(&mut self) {
        if let Some(jobs) = self.jobs.take() {
            // If the thread is gone there is nothing to wait for. (Not by closing the queue: a
            // stamper elsewhere may hold it open.)
            let _ = jobs.send(Job::End);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn stamp(
    guest: &GuestName,
    images: &[(PathBuf, NodeImage)],
    (at, state, snapshot): (EpochId, StampState, Option<SnapshotId>),
) -> Result<(), StampError> {
    let stamp = |image: &NodeImage| {
        let disk_bytes = image.is_limited().then(|| image.bytes());
        Stamp { snapshot, disk_bytes, ..Stamp::now(guest, at, state) }
    };
    // The stamp of a shared image is its holder's.
    images.iter().try_for_each(|(path, image)| image.while_ours(|| stamp(image).write(path)).unwrap_or(Ok(())))
}
