//! Why a node cannot use its disks.

use std::path::PathBuf;

use thiserror::Error;

use super::shared_disks::SharedError;
use crate::checkpoint::stamp::{StampError, StampRefusal};
use crate::device::image::ImageError;
use crate::device::image_format::ImageFormat;
use crate::protocol::types::{EpochId, GuestName};

/// Why a node cannot use its disks.
#[derive(Debug, Error)]
pub enum DiskError {
    /// An image cannot be opened or made.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// A stamp cannot be read or written.
    #[error("{0}")]
    Stamp(#[from] StampError),
    /// An image is in a format that is not raw.
    #[error("disk image {} is {format} and would be taken byte for byte: convert it \
        (qemu-img convert -O raw {} {}.raw), or insist with `,format=raw`",
        path.display(), path.display(), path.display())]
    NotRaw {
        /// The image.
        path: PathBuf,
        /// What it is.
        format: ImageFormat,
    },
    /// An image is compressed as a whole.
    #[error("disk image {} is a compressed file and would be taken byte for byte: unpack it ({unpack}), or insist \
        with `,format=raw`", path.display())]
    Compressed {
        /// The image.
        path: PathBuf,
        /// The program that unpacks it.
        unpack: &'static str,
    },
    /// The guest must not start from this image.
    #[error(
        "disk image {} is not started from: {why}; start the guest where its newest image is, or insist with \
            --force-disk and lose what is missing here", path.display()
    )]
    Refused {
        /// The image.
        path: PathBuf,
        /// Why.
        why: StampRefusal,
    },
    /// A newcomer would write over another guest's image.
    #[error("disk image {} belongs to guest '{guest}': it would be overwritten; name another, or insist with \
        --force-disk", path.display())]
    OtherGuest {
        /// The image.
        path: PathBuf,
        /// Its guest.
        guest: GuestName,
    },
    /// A newcomer would write over something that was never one of mcd's images.
    #[error("disk image {} has no stamp and is not empty: it would be overwritten; name another (one that is not there \
        is made), or insist with --force-disk", path.display())]
    Unknown {
        /// The image.
        path: PathBuf,
    },
    /// The nodes disagree on how many there are.
    #[error(
        "the guest has {wanted} disks, and --disk is given {given} times here: name an image for each, \
            in the primary's order"
    )]
    Count {
        /// How many the primary has.
        wanted: usize,
        /// What is given here.
        given: usize,
    },
    /// The nodes disagree on what one is.
    #[error("disk image {} has {given} bytes, the guest's disk {wanted}: remove it to have it made anew, or resize it \
        (truncate -s {wanted})", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// The primary's size.
        wanted: u64,
        /// This one's.
        given: u64,
    },
    /// A newcomer's device has no room for the guest's disk.
    #[error("disk {} is a device of {given} bytes, and the guest's disk has {wanted}: name a device of at least that \
        many (the rest of a larger one is not used), or a file", path.display())]
    SmallDevice {
        /// The device.
        path: PathBuf,
        /// The primary's size.
        wanted: u64,
        /// This one's.
        given: u64,
    },
    /// The disk is read-only on one node only.
    #[error("disk image {} is {here} here and {there} at the primary: give both nodes the same word `ro`, \
        or neither", path.display())]
    ReadOnly {
        /// The image.
        path: PathBuf,
        /// How it is here.
        here: &'static str,
        /// How it is there.
        there: &'static str,
    },
    /// Something is wrong with shared storage.
    #[error("{0}")]
    Shared(#[from] SharedError),
    /// A snapshot's disk is read-only and the image is not, or the other way round.
    #[error("disk image {} is {here} here and the snapshot's disk {there}: name it with the word `ro`, \
        or without", path.display())]
    ReadOnlySnapshot {
        /// The image.
        path: PathBuf,
        /// How it is here.
        here: &'static str,
        /// How it is in the snapshot.
        there: &'static str,
    },
    /// A snapshot's disk has another serial number.
    #[error("disk image {} is given another serial than the snapshot's disk has: leave it out", path.display())]
    Serial {
        /// The image.
        path: PathBuf,
    },
    /// The image is not of the snapshot's moment.
    #[error(
        "disk image {} {is}, and not what it was when the snapshot was taken, at {at}: bring back the image with its \
         stamp as `mcd snapshot save --stop` left them; with any other the guest would find its files changed under \
         it", path.display()
    )]
    NotOfSnapshot {
        /// The image.
        path: PathBuf,
        /// What its stamp shows.
        is: String,
        /// The snapshot's epoch.
        at: EpochId,
    },
    /// The thread cannot be started.
    #[error("the host gives no more threads ({0}); lower its load or raise its limits")]
    Thread(#[from] std::io::Error),
}
