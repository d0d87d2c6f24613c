//! The guest's image as one row of pages: its memory and the blocks of its disks, read and written
//! by index.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use thiserror::Error;

use super::disk::read_block;
use crate::device::block::{BlockBackend, Stored};
use crate::machine::memory::{GuestRam, MemoryError};
use crate::protocol::layout::{ImageLayout, Place};
use crate::protocol::pages::PAGE_BYTES;

/// Most bytes gathered before they are written to a disk.
const RUN_BYTES_MAX: usize = 1 << 20;

/// Why a page of the image cannot be read or written.
#[derive(Debug, Error)]
pub enum ImagePageError {
    /// It is of memory, and memory says why.
    #[error("{0}")]
    Memory(#[from] MemoryError),
    /// It is of a disk, and its storage says why.
    #[error("disk {disk}: {reason}: look after its image and the storage under it")]
    Disk {
        /// The disk's number.
        disk: usize,
        /// What the storage said.
        reason: io::Error,
    },
    /// There is no such page.
    #[error("page {index} is beyond the image's {pages} pages")]
    NoSuchPage {
        /// Its index.
        index: u64,
        /// How many there are.
        pages: u64,
    },
}

/// The image. Clones share it.
#[derive(Clone)]
pub struct GuestImage {
    memory: GuestRam,
    layout: Arc<ImageLayout>,
    disks: Arc<[Arc<dyn BlockBackend>]>,
}

impl GuestImage {
    /// The image in `memory` and `disks`, which are those of `layout`, in the same order.
    pub fn new(memory: GuestRam, layout: Arc<ImageLayout>, disks: Vec<Arc<dyn BlockBackend>>) -> GuestImage {
        GuestImage { memory, layout, disks: disks.into() }
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.layout.pages()
    }

    fn place(&self, index: u64) -> Result<Place, ImagePageError> {
        self.layout.place(index).ok_or(ImagePageError::NoSuchPage { index, pages: self.layout.pages() })
    }

    fn disk(&self, disk: usize) -> Result<&dyn BlockBackend, ImagePageError> {
        let missing = || ImagePageError::Disk { disk, reason: io::Error::other("the machine has no such disk") };
        self.disks.get(disk).map(|image| &**image).ok_or_else(missing)
    }

    /// Reads page `index`. While the guest runs the copy may be torn.
    ///
    /// # Errors
    /// [`ImagePageError`].
    pub fn read(&self, index: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), ImagePageError> {
        match self.place(index)? {
            Place::Memory(page) => Ok(self.memory.read_page(page, into)?),
            Place::Block { disk, block } => {
                read_block(self.disk(disk)?, block, into).map_err(|reason| ImagePageError::Disk { disk, reason })
            }
        }
    }

    /// The blocks among `run`, of one disk, that are in holes, rising, at most `holes_max` ranges;
    /// and the first block that was not looked at.
    ///
    /// # Errors
    /// [`ImagePageError`].
    pub fn holes(&self, run: &Range<u64>, holes_max: usize) -> Result<(Vec<Range<u64>>, u64), ImagePageError> {
        const BLOCK: u64 = PAGE_BYTES as u64;
        let Place::Block { disk, block } = self.place(run.start)? else { return Ok((Vec::new(), run.start)) };
        let (image, first) = (self.disk(disk)?, run.start - block);
        let failed = |reason| ImagePageError::Disk { disk, reason };
        let (mut holes, mut at) = (Vec::new(), run.start);
        while at < run.end && holes.len() < holes_max {
            let offset = (at - first) * BLOCK;
            let data = image.next_data(offset).map_err(failed)?;
            // The last block of a disk may be a part of one.
            let end = if data >= image.bytes() { run.end } else { (first + data / BLOCK).min(run.end) };
            if end > at {
                holes.push(at..end);
            }
            if end >= run.end {
                return Ok((holes, run.end));
            }
            let hole = image.next_hole(data).map_err(failed)?;
            at = (first + hole.div_ceil(BLOCK)).clamp(end + 1, run.end);
        }
        Ok((holes, at))
    }

    /// A way to read the blocks among `run`, of one disk, that reads none which is in a hole now.
    pub fn reader(&self, run: &Range<u64>) -> RunReader<'_> {
        // Storage that fails here fails where it is read, and is reported there.
        let holes = self.holes(run, READER_HOLES_MAX).map(|(holes, _)| holes).unwrap_or_default();
        RunReader { image: self, holes }
    }

    /// A way to write pages; blocks that lie together on a disk are written together.
    pub fn writer(&self) -> ImageWriter<'_> {
        ImageWriter { image: self, disks: DiskWriter::new(&self.disks) }
    }

    /// True if page `index` is of a disk whose storage both nodes share.
    pub fn is_shared(&self, index: u64) -> bool {
        self.layout.is_shared(index)
    }

    /// Returns when everything written to the disks before outlives a loss of power.
    ///
    /// # Errors
    /// [`ImagePageError::Disk`].
    pub fn flush(&self) -> Result<(), ImagePageError> {
        for (disk, image) in self.disks.iter().enumerate() {
            image.flush().map_err(|reason| ImagePageError::Disk { disk, reason })?;
        }
        Ok(())
    }
}

/// Most holes in a run that a reader knows of; more would cost more to find than to read.
const READER_HOLES_MAX: usize = 8;

/// Reads blocks of a run.
pub struct RunReader<'a> {
    image: &'a GuestImage,
    holes: Vec<Range<u64>>,
}

impl RunReader<'_> {
    /// Reads page `index`, which may be of the run or not.
    ///
    /// # Errors
    /// [`ImagePageError`].
    pub fn read(&self, index: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), ImagePageError> {
        match self.holes.iter().any(|hole| hole.contains(&index)) {
            true => {
                into.fill(0);
                Ok(())
            }
            false => self.image.read(index, into),
        }
    }
}

/// Blocks that lie together and are not written yet.
#[derive(Clone, Copy)]
struct Run {
    disk: usize,
    first_block: u64,
    blocks: u64,
    /// All of them are zeros; else their content is in the writer's `bytes`.
    zeros: bool,
}

/// Writes pages of an image. What was put is there after [`ImageWriter::finish`].
pub struct ImageWriter<'a> {
    image: &'a GuestImage,
    disks: DiskWriter<'a>,
}

impl ImageWriter<'_> {
    /// Puts page `index`; `None` is zeros.
    ///
    /// # Errors
    /// [`ImagePageError`], also for blocks put before.
    pub fn put(&mut self, index: u64, content: Option<&[u8; PAGE_BYTES]>) -> Result<(), ImagePageError> {
        match self.image.place(index)? {
            Place::Memory(page) => Ok(self.image.memory.write_page(page, content.unwrap_or(&[0; PAGE_BYTES]))?),
            Place::Block { disk, block } => self.disks.put(disk, block, content),
        }
    }

    /// Writes what was put and is not written yet.
    ///
    /// # Errors
    /// [`ImagePageError`].
    pub fn finish(&mut self) -> Result<(), ImagePageError> {
        self.disks.finish()
    }
}

/// Writes blocks of disks; those that lie together are written together. What was put is there
/// after [`DiskWriter::finish`].
pub struct DiskWriter<'a> {
    disks: &'a [Arc<dyn BlockBackend>],
    run: Option<Run>,
    bytes: Vec<u8>,
}

impl<'a> DiskWriter<'a> {
    /// A writer to these disks.
    pub fn new(disks: &'a [Arc<dyn BlockBackend>]) -> DiskWriter<'a> {
        DiskWriter { disks, run: None, bytes: Vec::new() }
    }

    /// Puts the block with `index` in the row of `layout`; what is no block there is passed over.
    ///
    /// # Errors
    /// [`ImagePageError::Disk`], also for blocks put before.
    pub fn put_at(
        &mut self,
        layout: &ImageLayout,
        index: u64,
        content: Option<&[u8; PAGE_BYTES]>,
    ) -> Result<(), ImagePageError> {
        match layout.place(index) {
            Some(Place::Block { disk, block }) => self.put(disk, block, content),
            _ => Ok(()),
        }
    }

    /// Puts a block; `None` is zeros.
    ///
    /// # Errors
    /// [`ImagePageError::Disk`], also for blocks put before.
    pub fn put(&mut self, disk: usize, block: u64, content: Option<&[u8; PAGE_BYTES]>) -> Result<(), ImagePageError> {
        let zeros = content.is_none();
        let goes_on = self.run.is_some_and(|run| {
            (run.disk, run.zeros, run.first_block + run.blocks) == (disk, zeros, block)
                && self.bytes.len() < RUN_BYTES_MAX
        });
        if !goes_on {
            self.finish()?;
        }
        self.run.get_or_insert(Run { disk, first_block: block, blocks: 0, zeros }).blocks += 1;
        self.bytes.extend_from_slice(content.map_or(&[], |content| &content[..]));
        Ok(())
    }

    /// Writes what was put and is not written yet.
    ///
    /// # Errors
    /// [`ImagePageError::Disk`].
    pub fn finish(&mut self) -> Result<(), ImagePageError> {
        let Some(run) = self.run.take() else { return Ok(()) };
        let missing =
            || ImagePageError::Disk { disk: run.disk, reason: io::Error::other("the machine has no such disk") };
        let image = self.disks.get(run.disk).ok_or_else(missing)?;
        let offset = run.first_block.saturating_mul(PAGE_BYTES as u64);
        // The last block of a disk may be longer than what is left of the disk.
        let length = (run.blocks * PAGE_BYTES as u64).min(image.bytes().saturating_sub(offset));
        let written = if run.zeros {
            image.discard(offset, length)
        } else {
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(self.bytes.len());
            image.write(offset, self.bytes.get(..length).unwrap_or_default())
        };
        self.bytes.clear();
        let reason = match written {
            Ok(Stored::Accepted) => return Ok(()),
            Ok(Stored::Full) => io::Error::other("its storage takes nothing now"),
            Err(reason) => reason,
        };
        Err(ImagePageError::Disk { disk: run.disk, reason })
    }
}
