//! A node's disk images: opened, checked against their stamps, and stamped as the node's part in
//! the guest changes.

use std::sync::Arc;

use super::config::{DiskConfig, NodeConfig};
pub use super::disk_error::DiskError;
use super::inbox::{Flag, InboxSender};
use super::shared_disks::{self, NodeImage, SharedDiskForwarder, SharedError};
use super::stamp_writer::{StampWriter, Stamper};
use crate::checkpoint::disk::DiskGate;
use crate::checkpoint::image::GuestImage;
use crate::checkpoint::journal::{DiskJournal, JournalListener};
use crate::checkpoint::shared_journal::{SharedGate, SharedJournal};
use crate::checkpoint::shared_writer::SharedWriter;
use crate::checkpoint::snapshot::SnapshotHead;
use crate::checkpoint::stamp::{Stamp, StampError, StampState};
use crate::device::block::BlockBackend;
use crate::device::image::{ImageError, RawImage};
use crate::device::image_format::{self, ImageFormat};
use crate::machine::GuestRam;
use crate::protocol::layout::ImageLayout;
use crate::protocol::machine_shape::{DiskShape, JOURNAL_BYTES_MAX, MachineShape};
use crate::protocol::types::StorageFault;
use crate::protocol::types::{EpochId, Generation};

/// Opens the images of a guest that starts here; the shapes of its disks.
///
/// # Errors
/// [`DiskError::Image`].
pub(crate) fn open_images(config: &NodeConfig) -> Result<(Vec<NodeImage>, Vec<DiskShape>), DiskError> {
    shared_disks::check_fencing(config)?;
    let (mut images, mut shapes) = (Vec::new(), Vec::new());
    for disk in &config.disks {
        check_format(disk)?;
        let disk_bytes = known_bytes(config, disk)?;
        let image = shared_disks::open_image(disk, disk_bytes)?;
        if image.is_limited() {
            let (path, bytes) = (disk.path.display(), image.bytes());
            tracing::info!(image = %path, bytes, "the guest's disk is smaller than its device, whose rest is not used");
        }
        let DiskConfig { read_only, shared, serial, .. } = *disk;
        shapes.push(DiskShape { bytes: image.bytes(), read_only, shared, serial });
        images.push(image);
    }
    shared_disks::take(&images).map_err(|fault| match fault {
        StorageFault::Locked(why) | StorageFault::Failing(why) => SharedError::NotOurs(why),
    })?;
    Ok((images, shapes))
}

/// The size of the guest's disk, if the stamp beside a device says that it is smaller.
fn known_bytes(config: &NodeConfig, disk: &DiskConfig) -> Result<Option<u64>, DiskError> {
    if config.force_disk || disk.read_only || disk.shared {
        return Ok(None);
    }
    Ok(Stamp::read(&disk.path)?.and_then(|stamp| stamp.disk_bytes))
}

/// Checks at once what a newcomer will need later: that the images which are there can be opened
/// and may be written over.
///
/// # Errors
/// [`DiskError`].
pub(crate) fn check_images_open(config: &NodeConfig) -> Result<(), DiskError> {
    shared_disks::check_fencing(config)?;
    for disk in &config.disks {
        check_format(disk)?;
        match shared_disks::open_image(disk, None) {
            Err(ImageError::Missing { .. }) if !disk.read_only && !disk.shared => {}
            opened => check_overwritable(config, disk, &opened?)?,
        }
    }
    Ok(())
}

/// Refuses to write over what no node of this guest has written: another guest's image, or
/// something that was never one of mcd's.
fn check_overwritable(config: &NodeConfig, disk: &DiskConfig, image: &NodeImage) -> Result<(), DiskError> {
    let path = || disk.path.clone();
    if disk.read_only || config.force_disk {
        return Ok(());
    }
    match (Stamp::read(&disk.path)?, image) {
        (Some(stamp), _) if stamp.guest != config.guest => {
            Err(DiskError::OtherGuest { path: path(), guest: stamp.guest })
        }
        (None, NodeImage::Own(image)) => match image.is_blank() {
            Ok(true) => Ok(()),
            Ok(false) => Err(DiskError::Unknown { path: path() }),
            Err(reason) => Err(ImageError::Io { path: path(), reason }.into()),
        },
        // What is shared is not written over.
        (Some(_), _) | (None, NodeImage::Shared(_)) => Ok(()),
    }
}

/// Refuses an image that is visibly not raw, unless the operator says that it is. Asked at a node's
/// start only: what its guest writes to a disk later must not be able to end the node.
fn check_format(disk: &DiskConfig) -> Result<(), DiskError> {
    let path = || disk.path.clone();
    match image_format::format_of(&disk.path) {
        Ok(Some(ImageFormat::Compressed(unpack))) if !disk.is_raw => {
            Err(DiskError::Compressed { path: path(), unpack })
        }
        Ok(Some(format)) if !disk.is_raw => Err(DiskError::NotRaw { path: path(), format }),
        // Why it cannot be read is told by who opens it.
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Checks by their stamps that a guest may start from its images, and stamps those that have no
/// stamp; `newest` is the newest generation on record.
///
/// # Errors
/// [`DiskError::Refused`], [`DiskError::Stamp`].
pub(crate) fn check_and_stamp_images(config: &NodeConfig, newest: Option<Generation>) -> Result<(), DiskError> {
    for disk in config.disks.iter().filter(|disk| !disk.read_only) {
        let path = disk.path.clone();
        let old = match Stamp::read(&path) {
            Err(error @ StampError::Malformed { .. }) if config.force_disk => {
                tracing::warn!("--force-disk: {error}");
                None
            }
            old => old?,
        };
        // Of a shared image there is no newer one elsewhere: a stamp that is behind was only
        // written late.
        let newest_elsewhere = newest.filter(|_| !disk.shared);
        match old.as_ref().map(|stamp| stamp.may_start(&config.guest, newest_elsewhere)) {
            Some(Err(why)) if config.force_disk => {
                tracing::warn!(image = %path.display(), "--force-disk: the guest starts from an image although {why}");
            }
            Some(Err(why)) => return Err(DiskError::Refused { path, why }),
            Some(Ok(())) | None => {
                let at = old.as_ref().map(|stamp| stamp.at.to_string()).unwrap_or_else(|| "no stamp yet".into());
                tracing::info!(image = %path.display(), at, "the guest may start from this disk image");
            }
        }
        // What cannot be written now could not be after the claim either, and then the guest would
        // be on record as ours.
        if old.is_none() {
            let at = EpochId { generation: newest.unwrap_or_default(), epoch: 0 };
            Stamp::now(&config.guest, at, StampState::Whole).write(&path)?;
        }
    }
    Ok(())
}

/// Checks that images are those of a snapshot's disks: as many, as large, and of the snapshot's
/// very moment. Gives the disks' shapes.
///
/// # Errors
/// [`DiskError`].
pub(crate) fn check_images_of_snapshot(
    configs: &[DiskConfig],
    given: &[DiskShape],
    head: &SnapshotHead,
) -> Result<Vec<DiskShape>, DiskError> {
    let wanted = &head.shape.disks;
    if wanted.len() != given.len() {
        return Err(DiskError::Count { wanted: wanted.len(), given: given.len() });
    }
    for ((disk, given), wanted) in configs.iter().zip(given).zip(wanted) {
        let path = || disk.path.clone();
        if given.read_only != wanted.read_only {
            let mode = |read_only| if read_only { "read-only" } else { "writable" };
            let (here, there) = (mode(given.read_only), mode(wanted.read_only));
            return Err(DiskError::ReadOnlySnapshot { path: path(), here, there });
        }
        if given.bytes != wanted.bytes {
            return Err(DiskError::Size { path: path(), wanted: wanted.bytes, given: given.bytes });
        }
        if given.serial != [0; 20] && given.serial != wanted.serial {
            return Err(DiskError::Serial { path: path() });
        }
        if !disk.read_only {
            let is = match Stamp::read(&disk.path)? {
                Some(stamp) if stamp.snapshot == Some(head.id) => continue,
                Some(stamp) => format!("is of {} of guest '{}'", stamp.at, stamp.guest),
                None => "has no stamp".to_owned(),
            };
            return Err(DiskError::NotOfSnapshot { path: path(), is, at: head.at });
        }
    }
    // Whether both nodes use one image is a flag of this node, not of the snapshot.
    Ok(wanted.iter().zip(given).map(|(of, here)| DiskShape { shared: here.shared, ..of.clone() }).collect())
}

/// Opens a newcomer's images for a guest of `shape`, and makes those that are lacking; for each
/// also whether it was made.
///
/// # Errors
/// [`DiskError`] if they are not those of the shape, or belong to another guest.
pub(crate) fn open_or_create_images(
    config: &NodeConfig,
    shape: &MachineShape,
) -> Result<(Vec<NodeImage>, Vec<bool>), DiskError> {
    let (wanted, given) = (shape.disks.len(), config.disks.len());
    if wanted != given {
        return Err(DiskError::Count { wanted, given });
    }
    let (mut images, mut made) = (Vec::new(), Vec::new());
    for (disk, wanted) in config.disks.iter().zip(&shape.disks) {
        let path = || disk.path.clone();
        if disk.read_only != wanted.read_only {
            let mode = |read_only| if read_only { "read-only" } else { "writable" };
            let (here, there) = (mode(disk.read_only), mode(wanted.read_only));
            return Err(DiskError::ReadOnly { path: path(), here, there });
        }
        if disk.shared != wanted.shared {
            let mode = |shared| if shared { "shared" } else { "replicated" };
            return Err(SharedError::Mode { path: path(), here: mode(disk.shared), there: mode(wanted.shared) }.into());
        }
        let (image, is_made) = match shared_disks::open_image(disk, Some(wanted.bytes)) {
            Err(ImageError::Missing { .. }) if !disk.read_only && !disk.shared => {
                (NodeImage::Own(Arc::new(RawImage::create(&disk.path, wanted.bytes)?)), true)
            }
            opened => (opened?, false),
        };
        if !is_made {
            check_overwritable(config, disk, &image)?;
        }
        let (wanted, given) = (wanted.bytes, image.bytes());
        if given != wanted {
            return Err(match image_is_device(&image) {
                true => DiskError::SmallDevice { path: path(), wanted, given },
                false => DiskError::Size { path: path(), wanted, given },
            });
        }
        images.push(image);
        made.push(is_made);
    }
    Ok((images, made))
}

/// True if `truncate` does not make it larger.
fn image_is_device(image: &NodeImage) -> bool {
    matches!(image, NodeImage::Own(image) if image.is_device())
}

/// The disks of one machine.
pub(crate) struct NodeDisks {
    layout: Arc<ImageLayout>,
    journal: Arc<DiskJournal>,
    images: Vec<NodeImage>,
    backends: Vec<Arc<dyn BlockBackend>>,
    gates: Vec<Arc<dyn BlockBackend>>,
    stamps: StampWriter,
    stamped: Option<Generation>,
    /// What is held for shared images. Its thread gives them up, so it ends after the stamps'.
    shared: Option<(Arc<SharedJournal>, SharedWriter)>,
}

impl NodeDisks {
    /// The disks of a machine of `shape`, in `images`. The gates are closed.
    ///
    /// # Errors
    /// [`DiskError::Thread`].
    pub(crate) fn new(
        config: &NodeConfig,
        shape: &MachineShape,
        images: Vec<NodeImage>,
        events: &InboxSender,
    ) -> Result<NodeDisks, DiskError> {
        let layout = Arc::new(ImageLayout::of(shape));
        let journal = DiskJournal::new(JOURNAL_BYTES_MAX, Box::new(JournalForwarder { events: events.clone() }));
        let held = SharedJournal::new(JOURNAL_BYTES_MAX, Box::new(SharedDiskForwarder { events: events.clone() }));
        let backends: Vec<_> = images.iter().map(NodeImage::backend).collect();
        let gate = |(disk, image): (usize, &NodeImage)| -> Arc<dyn BlockBackend> {
            let blocks = layout.blocks_of(disk);
            match image.shared() {
                Some(image) => Arc::new(SharedGate::new(Arc::clone(image), Arc::clone(&held), blocks.start)),
                None => Arc::new(DiskGate::new(image.backend(), Arc::clone(&journal), blocks)),
            }
        };
        let gates = images.iter().enumerate().map(gate).collect();
        let stamped = config.disks.iter().zip(&images).filter(|(disk, _)| !disk.read_only);
        let stamped = stamped.map(|(disk, image)| (disk.path.clone(), image.clone())).collect();
        let stamps = StampWriter::start(config.guest.clone(), stamped)?;
        let shared_images: Vec<_> = images.iter().filter_map(NodeImage::shared).map(Arc::clone).collect();
        let shared = match shared_images.is_empty() {
            true => None,
            false => {
                let (held, layout) = (Arc::clone(&held), Arc::clone(&layout));
                let writer = SharedWriter::start(Arc::clone(&held), layout, backends.clone(), shared_images)?;
                Some((held, writer))
            }
        };
        Ok(NodeDisks { layout, journal, images, backends, gates, stamps, stamped: None, shared })
    }

    /// The journal.
    pub(crate) fn journal(&self) -> &Arc<DiskJournal> {
        &self.journal
    }

    /// What is held for shared images, if there are any.
    pub(super) fn shared(&self) -> Option<&Arc<SharedJournal>> {
        self.shared.as_ref().map(|(held, _)| held)
    }

    /// Takes the locks of shared images, all or none.
    ///
    /// # Errors
    /// Why they cannot be had yet.
    pub(crate) fn take_shared(&self) -> Result<(), StorageFault> {
        shared_disks::take(&self.images)
    }

    /// What the machine's disks keep their bytes in.
    pub(crate) fn gates(&self) -> Vec<Arc<dyn BlockBackend>> {
        self.gates.clone()
    }

    /// The whole image, with this memory.
    pub(crate) fn image(&self, memory: GuestRam) -> GuestImage {
        GuestImage::new(memory, Arc::clone(&self.layout), self.backends.clone())
    }

    /// Stamps the images as a newcomer's, before the first block is written over; returns when that
    /// is durable.
    ///
    /// # Errors
    /// [`DiskError::Stamp`].
    pub(crate) fn begin_filling(&self, generation: Generation) -> Result<(), DiskError> {
        let at = EpochId { generation, epoch: 0 };
        Ok(self.stamps.begin_filling(at)?)
    }

    /// What stamps the images from a thread of its own.
    pub(crate) fn stamper(&self) -> Stamper {
        self.stamps.stamper()
    }

    /// Ends what the images' threads do: the last stamps are written, what is held for shared
    /// images is forgotten, and these are given up.
    pub(crate) fn end(&mut self) {
        self.stamps.end();
        self.shared().into_iter().for_each(|shared| shared.close());
    }

    /// The guest runs here in this generation: stamps the images if that is news.
    pub(crate) fn runs_in(&mut self, generation: Generation) {
        if self.stamped.replace(generation) != Some(generation) {
            self.stamper().stamp(EpochId { generation, epoch: 0 }, StampState::Whole);
        }
    }
}

/// Turns the journal's calls (from disks' threads) into events.
struct JournalForwarder {
    events: InboxSender,
}

impl JournalListener for JournalForwarder {
    fn journal_full(&self) {
        self.events.raise(Flag::JournalFull);
    }
}
