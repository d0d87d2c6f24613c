//! A node's disks on storage that it shares with its peer: who may use it, and what its threads
//! tell the driver.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::config::{ArbiterConfig, DiskConfig, NodeConfig};
use super::events::NodeEvent;
use super::inbox::{Flag, InboxSender};
use crate::checkpoint::shared_journal::SharedListener;
use crate::device::BlockBackend;
use crate::device::image::{ImageError, RawImage};
use crate::device::shared_image::{SharedImage, is_block_device};
use crate::protocol::shared_disk::Fencing;
use crate::protocol::types::ConnId;
use crate::protocol::types::EpochId;
use crate::protocol::types::StorageFault;

/// Why a node cannot use shared storage.
#[derive(Debug, Error)]
pub enum SharedError {
    /// One node shares its storage and the other does not.
    #[error("disk image {} is {here} here and {there} at the primary: give both nodes mode=shared and the same \
        storage, or neither", path.display())]
    Mode {
        /// The image.
        path: PathBuf,
        /// How it is here.
        here: &'static str,
        /// How it is there.
        there: &'static str,
    },
    /// Locks on a block device do not reach the other host.
    #[error("shared disk {} is a block device, and its lock keeps only programs of this host out: use --arbiter \
        command:SCRIPT, whose script fences the other host, or add `,fenced` if something else does", path.display())]
    Unfenced {
        /// The device.
        path: PathBuf,
    },
    /// A shared image cannot be had.
    #[error("{0}")]
    NotOurs(String),
}

/// An open image.
#[derive(Clone)]
pub(crate) enum NodeImage {
    /// This node's own.
    Own(Arc<RawImage>),
    /// Both nodes'.
    Shared(Arc<SharedImage>),
}

impl NodeImage {
    /// What the guest's disk keeps its bytes in, at the bottom.
    pub(crate) fn backend(&self) -> Arc<dyn BlockBackend> {
        match self {
            NodeImage::Own(image) => Arc::clone(image) as Arc<dyn BlockBackend>,
            NodeImage::Shared(image) => Arc::clone(image) as Arc<dyn BlockBackend>,
        }
    }

    /// Its bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.backend().bytes()
    }

    /// True if its device has more than the guest's disk.
    pub(crate) fn is_limited(&self) -> bool {
        matches!(self, NodeImage::Own(image) if image.is_limited())
    }

    /// The shared image, if it is one.
    pub(crate) fn shared(&self) -> Option<&Arc<SharedImage>> {
        match self {
            NodeImage::Own(_) => None,
            NodeImage::Shared(image) => Some(image),
        }
    }

    /// Does what must not be done to an image that another node may write; `None` if this is one.
    pub(crate) fn while_ours<T>(&self, what: impl FnOnce() -> T) -> Option<T> {
        match self {
            NodeImage::Own(_) => Some(what()),
            NodeImage::Shared(image) => image.while_ours(what),
        }
    }
}

/// Opens an image; of a shared one the lock is left alone. Of a device that is one node's own only
/// the first `disk_bytes` are used, if it is known how many the guest's disk has.
///
/// # Errors
/// [`ImageError`].
pub(crate) fn open_image(disk: &DiskConfig, disk_bytes: Option<u64>) -> Result<NodeImage, ImageError> {
    if disk.shared {
        return Ok(NodeImage::Shared(Arc::new(SharedImage::open(&disk.path)?)));
    }
    let image = RawImage::open(&disk.path, disk.read_only)?;
    Ok(NodeImage::Own(Arc::new(match disk_bytes {
        Some(bytes) if image.is_device() => image.limited_to(bytes),
        _ => image,
    })))
}

/// Refuses a shared block device that nothing keeps the other host from writing late.
///
/// # Errors
/// [`SharedError::Unfenced`].
pub(crate) fn check_fencing(config: &NodeConfig) -> Result<(), SharedError> {
    unfenced(&config.disks, &config.arbiter, is_block_device)
}

fn unfenced(
    disks: &[DiskConfig],
    arbiter: &ArbiterConfig,
    is_device: impl Fn(&Path) -> bool,
) -> Result<(), SharedError> {
    // A script whose answer is "the peer is down" made sure of it.
    let by_arbiter = matches!(arbiter, ArbiterConfig::Command { .. });
    let is_unfenced = |disk: &&DiskConfig| {
        let lock_reaches_hosts = !is_device(&disk.path);
        disk.shared && !Fencing { lock_reaches_hosts, by_arbiter, by_operator: disk.fenced }.is_enough()
    };
    match disks.iter().find(is_unfenced) {
        Some(disk) => Err(SharedError::Unfenced { path: disk.path.clone() }),
        None => Ok(()),
    }
}

/// Takes the locks of shared images, all or none.
///
/// # Errors
/// [`StorageFault`], with the image.
pub(crate) fn take(images: &[NodeImage]) -> Result<(), StorageFault> {
    let shared = || images.iter().filter_map(NodeImage::shared);
    let taken = shared().try_for_each(|image| image.take());
    taken.map_err(|error| {
        shared().for_each(|image| image.give_up());
        match error {
            ImageError::InUse { path } => StorageFault::Locked(locked(&path)),
            error => StorageFault::Failing(error.to_string()),
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
pub(crate) struct SharedDiskForwarder {
    /// Where they go.
    pub events: InboxSender,
}

impl SharedListener for SharedDiskForwarder {
    fn cut_wanted(&self) {
        self.events.raise(Flag::JournalFull);
    }

    fn written(&self, through: EpochId) {
        self.events.written(through);
    }

    fn synced(&self, conn: ConnId) {
        // A node that is ending needs no report.
        let _ = self.events.report(NodeEvent::StorageSynced { conn });
    }

    fn has_room(&self) {
        self.events.raise(Flag::DisksHaveRoom);
    }

    fn fault(&self, why: Option<String>) {
        match &why {
            Some(why) => tracing::warn!(why, "shared storage fails, its writes are held and tried again"),
            None => tracing::info!("shared storage works again"),
        }
        self.events.storage_fault(why);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::node::config::OnPeerLoss;

    #[test]
    fn a_shared_block_device_needs_something_that_fences() {
        let disk = |shared, fenced| DiskConfig {
            path: "/dev/san".into(),
            is_raw: false,
            read_only: false,
            shared,
            fenced,
            serial: [0; 20],
        };
        let none = ArbiterConfig::None { on_peer_loss: OnPeerLoss::Continue };
        let script = ArbiterConfig::Command { script: "/etc/fence".into(), timeout: Duration::from_secs(1) };
        let check = |shared, fenced, arbiter: &ArbiterConfig, device| {
            unfenced(&[disk(shared, fenced)], arbiter, |_| device).map_err(|error| error.to_string())
        };
        let error = check(true, false, &none, true).expect_err("nothing fences");
        assert!(error.contains("/dev/san is a block device") && error.contains("command:SCRIPT"), "{error}");
        assert_eq!(check(true, false, &script, true), Ok(()));
        assert_eq!(check(true, true, &none, true), Ok(()));
        assert_eq!(check(false, false, &none, true), Ok(()));
        assert_eq!(check(true, false, &none, false), Ok(()));
    }
}
