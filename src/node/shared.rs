//! A node's disks on storage that it shares with its peer: who may use it, and what its threads tell the driver.

use std::path::Path;
use std::sync::Arc;

use crossbeam::channel::Sender;

use super::config::{ArbiterConfig, NodeConfig};
use super::disk_error::DiskError;
use super::events::NodeEvent;
use crate::checkpoint::shared::SharedListener;
use crate::device::BlockBackend;
use crate::device::image::{ImageError, RawImage};
use crate::device::shared::{SharedImage, is_block_device};
use crate::protocol::primary::ConnId;
use crate::protocol::secondary::StorageTrouble;
use crate::protocol::types::EpochId;

/// An open image.
#[derive(Clone)]
pub enum NodeImage {
    /// This node's own.
    Own(Arc<RawImage>),
    /// Both nodes'.
    Shared(Arc<SharedImage>),
}

impl NodeImage {
    /// What the guest's disk keeps its bytes in, at the bottom.
    pub fn backend(&self) -> Arc<dyn BlockBackend> {
        match self {
            NodeImage::Own(image) => Arc::clone(image) as Arc<dyn BlockBackend>,
            NodeImage::Shared(image) => Arc::clone(image) as Arc<dyn BlockBackend>,
        }
    }

    /// Its bytes.
    pub fn bytes(&self) -> u64 {
        self.backend().bytes()
    }

    /// The shared image, if it is one.
    pub fn shared(&self) -> Option<&Arc<SharedImage>> {
        match self {
            NodeImage::Own(_) => None,
            NodeImage::Shared(image) => Some(image),
        }
    }

    /// Does what must not be done to an image that another node may write; `None` if this is one.
    pub fn while_ours<T>(&self, what: impl FnOnce() -> T) -> Option<T> {
        match self {
            NodeImage::Own(_) => Some(what()),
            NodeImage::Shared(image) => image.while_ours(what),
        }
    }
}

/// Refuses a shared block device that nothing keeps the other host from writing late.
///
/// # Errors
/// [`DiskError::Unfenced`].
pub fn check_fencing(config: &NodeConfig) -> Result<(), DiskError> {
    // A script that says "the peer is down" made sure of it.
    if matches!(config.arbiter, ArbiterConfig::Command { .. }) {
        return Ok(());
    }
    match config.disks.iter().find(|disk| disk.shared && !disk.fenced && is_block_device(&disk.path)) {
        Some(disk) => Err(DiskError::Unfenced { path: disk.path.clone() }),
        None => Ok(()),
    }
}

/// Takes the locks of shared images, all or none.
///
/// # Errors
/// [`StorageTrouble`], with the image.
pub fn take(images: &[NodeImage]) -> Result<(), StorageTrouble> {
    let shared = || images.iter().filter_map(NodeImage::shared);
    let taken = shared().try_for_each(|image| image.take());
    taken.map_err(|error| {
        shared().for_each(|image| image.give_up());
        match error {
            ImageError::InUse { path } => StorageTrouble::Locked(locked(&path)),
            error => StorageTrouble::Failing(error.to_string()),
        }
    })
}

fn locked(path: &Path) -> String {
    format!(
        "another node has shared image {} locked; it gives it up when it hears that it lost the guest, or ends",
        path.display()
    )
}

/// Turns the calls of shared images' threads into events.
pub struct SharedEars {
    /// Where they go.
    pub events: Sender<NodeEvent>,
}

impl SharedListener for SharedEars {
    fn cut_wanted(&self) {
        // A node that is ending does not mind, here and below.
        let _ = self.events.send(NodeEvent::JournalFull);
    }

    fn written(&self, through: EpochId) {
        let _ = self.events.send(NodeEvent::Written { through });
    }

    fn synced(&self, conn: ConnId) {
        let _ = self.events.send(NodeEvent::StorageSynced { conn });
    }

    fn has_room(&self) {
        let _ = self.events.send(NodeEvent::DisksHaveRoom);
    }

    fn trouble(&self, why: Option<String>) {
        match &why {
            Some(why) => tracing::warn!(why, "shared storage fails, its writes are held and tried again"),
            None => tracing::info!("shared storage works again"),
        }
        let _ = self.events.send(NodeEvent::StorageTrouble(why));
    }
}
