//! The thread that brings held writes into shared images, once they may go out, and gives the
//! images up when its node lost the guest.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::image::{DiskWriter, ImagePageError};
use super::journal::BlockSet;
use super::shared_journal::SharedJournal;
use crate::device::block::BlockBackend;
use crate::device::shared_image::SharedImage;
use crate::protocol::layout::ImageLayout;
use crate::protocol::types::ConnId;

/// Time between two tries to write to storage that failed.
const RETRY: Duration = Duration::from_millis(500);

/// What is to be done at once.
pub(super) struct Batch {
    /// Oldest first.
    layers: Vec<Arc<BlockSet>>,
    /// The newest layer's number, if there is one.
    through: Option<u64>,
    /// Whoever waits for the image to have what was written before these.
    sync_for: Option<ConnId>,
}

/// The thread's handle. Dropping it closes the journal and waits for the write under way.
pub struct SharedWriter {
    journal: Arc<SharedJournal>,
    thread: Option<JoinHandle<()>>,
}

impl SharedWriter {
    /// Starts the thread for `journal`. `disks` are those of `layout`; `images` are the shared ones
    /// among them, which are given up when the journal is closed.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub fn start(
        journal: Arc<SharedJournal>,
        layout: Arc<ImageLayout>,
        disks: Vec<Arc<dyn BlockBackend>>,
        images: Vec<Arc<SharedImage>>,
    ) -> std::io::Result<SharedWriter> {
        let work = Work { journal: Arc::clone(&journal), layout, disks, images };
        let thread = std::thread::Builder::new().name("mcd-shared".into()).spawn(move || work.run())?;
        Ok(SharedWriter { journal, thread: Some(thread) })
    }
}

impl Drop for SharedWriter {
    fn drop(&mut self) {
        self.journal.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(super) struct Work {
    pub(super) journal: Arc<SharedJournal>,
    pub(super) layout: Arc<ImageLayout>,
    pub(super) disks: Vec<Arc<dyn BlockBackend>>,
    pub(super) images: Vec<Arc<SharedImage>>,
}

impl Work {
    fn run(self) {
        let mut failing = false;
        while let Some(batch) = self.next() {
            match self.write(&batch) {
                Ok(()) => {
                    if std::mem::take(&mut failing) {
                        self.journal.listener.fault(None);
                    }
                    self.done(&batch);
                }
                // The writes were answered, so they are not given up: until the storage takes them,
                // or the guest goes on elsewhere, flushes and further writes wait.
                Err(error) => {
                    failing = true;
                    self.journal.listener.fault(Some(error.to_string()));
                    let mut held = self.journal.held.lock();
                    if !held.closed {
                        self.journal.work.wait_for(&mut held, RETRY);
                    }
                }
            }
        }
        // Whatever was under way has ended.
        self.images.iter().for_each(|image| image.give_up());
    }

    /// What is to be done next; `None` if it is over.
    pub(super) fn next(&self) -> Option<Batch> {
        let mut held = self.journal.held.lock();
        loop {
            if held.closed {
                return None;
            }
            let due: Vec<_> = held.writes.due().map(|(number, layer)| (number, Arc::clone(layer))).collect();
            let through = due.last().map(|(number, _)| *number);
            if through.is_some() || held.sync_for.is_some() {
                let layers = due.into_iter().map(|(_, layer)| layer).collect();
                return Some(Batch { layers, through, sync_for: held.sync_for });
            }
            self.journal.work.wait(&mut held);
        }
    }

    pub(super) fn write(&self, batch: &Batch) -> Result<(), ImagePageError> {
        let mut writer = DiskWriter::new(&self.disks);
        for layer in &batch.layers {
            for (index, content) in layer.slots() {
                writer.put_at(&self.layout, index, content)?;
            }
            writer.finish()?;
        }
        for (disk, image) in self.disks.iter().enumerate().filter(|(disk, _)| self.is_shared(*disk)) {
            image.flush().map_err(|reason| ImagePageError::Disk { disk, reason })?;
        }
        Ok(())
    }

    fn is_shared(&self, disk: usize) -> bool {
        self.layout.shared().contains(&self.layout.blocks_of(disk))
    }

    pub(super) fn done(&self, batch: &Batch) {
        let mut held = self.journal.held.lock();
        let forgotten = batch.through.and_then(|through| held.writes.written(through));
        let was_full = held.take_was_full();
        let synced = held.sync_for.take_if(|conn| Some(*conn) == batch.sync_for);
        self.journal.done.notify_all();
        drop(held);
        forgotten.into_iter().for_each(|through| self.journal.listener.written(through));
        synced.into_iter().for_each(|conn| self.journal.listener.synced(conn));
        if was_full {
            self.journal.listener.has_room();
        }
    }
}
