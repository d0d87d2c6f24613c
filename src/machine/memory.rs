//! Guest memory: where RAM lies, and how its pages are read and written from outside the guest.
//!
//! RAM starts at guest-physical 0. What fits below 3 GiB is contiguous; the rest goes from 4 GiB
//! up, so that devices have the hole between. Everything outside this file numbers pages by *page
//! index*, which skips the hole: index 0 is the first page of RAM, `pages() - 1` the last, whatever
//! the layout.
//!
//! Two kinds of write are kept apart:
//! - devices write through [`GuestRam::mmap`], which marks the VMM's own dirty bitmap (KVM's log
//!   does not see such writes);
//! - the secondary applies an epoch through [`GuestRam::write_page`], which marks nothing: an image
//!   is not dirty pages.

use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use thiserror::Error;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, MmapRegion,
};

use super::dirty_log::DirtyBitmap;
use crate::protocol::pages::{PAGE_BYTES, PageSet};

/// Where the hole begins: RAM below this address is contiguous from 0.
pub const HOLE_START: u64 = 0xC000_0000;
/// Where the hole ends: RAM that does not fit below the hole goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// Most guest memory a machine may have, in bytes (1 TiB).
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;

/// One past the highest guest-physical address of `memory_bytes` bytes of RAM.
pub(super) fn end_of(memory_bytes: u64) -> u64 {
    if memory_bytes > HOLE_START { (memory_bytes - HOLE_START).saturating_add(HOLE_END) } else { memory_bytes }
}

/// Guest memory as vm-memory sees it.
pub type GuestMmap = GuestMemoryMmap<DirtyBitmap>;

/// What can go wrong with guest memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The size is not one a machine can have.
    #[error("guest memory of {bytes} bytes is not possible: give a multiple of 4096, at most {MEMORY_BYTES_MAX}")]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The host did not give the memory.
    #[error("the host gave no {bytes} bytes of guest memory ({reason}): ask for less or free some")]
    Map {
        /// The size asked for.
        bytes: u64,
        /// What the host said.
        reason: String,
    },
    /// A page index at or beyond the end of memory.
    #[error("page {page} is beyond the guest's {pages} pages")]
    NoSuchPage {
        /// The page asked for.
        page: u64,
        /// How many pages there are.
        pages: u64,
    },
    /// A page must be written whole.
    #[error("a page is 4096 bytes, not {bytes}")]
    PageSize {
        /// The length given.
        bytes: usize,
    },
    /// An address range that is not all RAM.
    #[error("guest-physical {address:#x} + {bytes} bytes is not all RAM: {reason}")]
    Range {
        /// First guest-physical address.
        address: u64,
        /// Length in bytes.
        bytes: usize,
        /// What vm-memory said.
        reason: GuestMemoryError,
    },
    /// The host has less memory than the guest is to have.
    #[error(
        "the guest is to have {} MiB of memory and the host has {} MiB available: give the guest less or free some",
        wanted_bytes.div_ceil(1 << 20), available_bytes >> 20
    )]
    HostMemory {
        /// The guest's memory, in bytes.
        wanted_bytes: u64,
        /// What the host has available, in bytes.
        available_bytes: u64,
    },
    /// A control group of this process leaves less memory than the guest is to have.
    #[error(
        "the guest is to have {} MiB of memory and the control group {} leaves {} MiB to this node: give the guest \
            less or raise the limit (memory.max)",
        wanted_bytes.div_ceil(1 << 20), group.display(), available_bytes >> 20
    )]
    GroupMemory {
        /// The guest's memory, in bytes.
        wanted_bytes: u64,
        /// What is left below the limit, in bytes.
        available_bytes: u64,
        /// The directory of the group that sets it.
        group: PathBuf,
    },
    /// Memory could not be touched ahead of use.
    #[error("guest memory could not be populated ({reason}): the host may lack free memory")]
    Prefault {
        /// What the host said.
        reason: Errno,
    },
}

/// One contiguous piece of RAM.
#[derive(Clone, Copy, Debug)]
pub struct RamRegion {
    /// Page index of its first page; a multiple of 64, so that dirty words line up with a
    /// [`PageSet`].
    pub first_page: u64,
    /// How many pages it has.
    pub pages: u64,
    /// Guest-physical address of its first byte.
    pub address: u64,
    /// Where it is mapped in this process.
    pub(super) host: HostAddress,
}

/// The address of a mapping that lives as long as the [`GuestRam`] it belongs to.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostAddress(pub(super) *mut u8);

// SAFETY: the pointer names a mapping shared by design (with the guest's vCPUs to begin with); it
// is only dereferenced by the page copies below, which treat its bytes as changeable by others at
// any time.
unsafe impl Send for HostAddress {}
// SAFETY: as above.
unsafe impl Sync for HostAddress {}

struct Inner {
    mmap: GuestMmap,
    regions: Vec<RamRegion>,
    pages: u64,
}

/// The guest's memory. Clones share it.
#[derive(Clone)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

impl GuestRam {
    /// Maps `memory_bytes` bytes of zeroed guest memory; the host gives each page when it is first
    /// touched.
    ///
    /// # Errors
    /// [`MemoryError::Size`] if the size is zero, no multiple of 4096 or above the cap,
    /// [`MemoryError::Map`] if the host refuses.
    pub fn new(memory_bytes: u64) -> Result<GuestRam, MemoryError> {
        let size_error = MemoryError::Size { bytes: memory_bytes };
        if memory_bytes == 0 || memory_bytes > MEMORY_BYTES_MAX || !memory_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return Err(size_error);
        }
        let low = memory_bytes.min(HOLE_START);
        let mut ranges = vec![(GuestAddress(0), usize::try_from(low).map_err(|_| size_error)?)];
        if memory_bytes > low {
            let high = usize::try_from(memory_bytes - low).map_err(|_| MemoryError::Size { bytes: memory_bytes })?;
            ranges.push((GuestAddress(HOLE_END), high));
        }
        let mmap = GuestMmap::from_ranges(&ranges)
            .map_err(|reason| MemoryError::Map { bytes: memory_bytes, reason: reason.to_string() })?;
        let mut regions = Vec::new();
        let mut first_page = 0;
        for region in mmap.iter() {
            let pages = region.len() / PAGE_BYTES as u64;
            let mapping: &MmapRegion<DirtyBitmap> = region;
            let host = HostAddress(mapping.as_ptr());
            regions.push(RamRegion { first_page, pages, address: region.start_addr().0, host });
            first_page += pages;
        }
        Ok(GuestRam { inner: Arc::new(Inner { mmap, regions, pages: first_page }) })
    }

    /// How many pages the guest has.
    pub fn pages(&self) -> u64 {
        self.inner.pages
    }

    /// How many bytes the guest has.
    pub fn bytes(&self) -> u64 {
        self.inner.pages * PAGE_BYTES as u64
    }

    /// The memory as devices and loaders use it: writes through it are dirty pages.
    pub fn mmap(&self) -> &GuestMmap {
        &self.inner.mmap
    }

    /// The contiguous pieces of RAM, in rising order.
    pub fn regions(&self) -> &[RamRegion] {
        &self.inner.regions
    }

    /// The guest-physical address of page `page`, if there is such a page.
    pub fn address_of(&self, page: u64) -> Option<u64> {
        let region = self.region_of(page)?;
        Some(region.address + (page - region.first_page) * PAGE_BYTES as u64)
    }

    /// The index of the page that holds guest-physical `address`, if that is RAM.
    pub fn page_of(&self, address: u64) -> Option<u64> {
        let region = self
            .inner
            .regions
            .iter()
            .find(|r| address >= r.address && address - r.address < r.pages * PAGE_BYTES as u64)?;
        Some(region.first_page + (address - region.address) / PAGE_BYTES as u64)
    }

    /// Copies page `page` into `into`. While the guest runs the copy may be torn.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchPage`].
    pub fn read_page(&self, page: u64, into: &mut [u8; PAGE_BYTES]) -> Result<(), MemoryError> {
        let from = self.host_page(page)?;
        // SAFETY: `from` is a whole mapped page of guest memory (checked by host_page), `into` is
        // 4096 bytes of our own, and the two cannot overlap because guest memory is never handed
        // out as a Rust object.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), PAGE_BYTES) };
        Ok(())
    }

    /// Writes page `page` without marking it dirty: for applying an image, not for devices.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchPage`], [`MemoryError::PageSize`] if `bytes` is not one page long.
    pub fn write_page(&self, page: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        if bytes.len() != PAGE_BYTES {
            return Err(MemoryError::PageSize { bytes: bytes.len() });
        }
        let to = self.host_page(page)?;
        // SAFETY: `to` is a whole mapped page of guest memory (checked by host_page), `bytes` is
        // 4096 bytes long (checked above), and the two cannot overlap because guest memory is never
        // handed out as a Rust object.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, PAGE_BYTES) };
        Ok(())
    }

    /// Appends the bytes of every page in `set` to `into`, in rising order of page index; pages
    /// beyond the guest's are left out.
    ///
    /// Give a buffer that was used before: memory touched for the first time costs the host twenty
    /// times the copy itself.
    pub fn copy_pages(&self, set: &PageSet, into: &mut Vec<u8>) {
        into.reserve(usize::try_from(set.count()).unwrap_or(usize::MAX).saturating_mul(PAGE_BYTES));
        for region in &self.inner.regions {
            let first_word = (region.first_page / 64) as usize;
            let words = region.pages.div_ceil(64) as usize;
            for (index, word) in set.words().iter().skip(first_word).take(words).enumerate() {
                let mut rest = *word;
                while rest != 0 {
                    let page = index as u64 * 64 + u64::from(rest.trailing_zeros());
                    rest &= rest - 1;
                    if page < region.pages {
                        append_page(region, page, into);
                    }
                }
            }
        }
    }

    /// Reads `into.len()` bytes at guest-physical `address`.
    ///
    /// # Errors
    /// [`MemoryError::Range`] if not all of it is RAM.
    pub fn read(&self, address: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let bytes = into.len();
        self.inner.mmap.read_slice(into, GuestAddress(address)).map_err(|reason| MemoryError::Range {
            address,
            bytes,
            reason,
        })
    }

    /// Writes `from` at guest-physical `address`, marking it dirty (as a device or a loader does).
    ///
    /// # Errors
    /// [`MemoryError::Range`] if not all of it is RAM.
    pub fn write(&self, address: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.inner.mmap.write_slice(from, GuestAddress(address)).map_err(|reason| MemoryError::Range {
            address,
            bytes: from.len(),
            reason,
        })
    }

    fn region_of(&self, page: u64) -> Option<&RamRegion> {
        self.inner.regions.iter().find(|r| page >= r.first_page && page - r.first_page < r.pages)
    }

    fn host_page(&self, page: u64) -> Result<*mut u8, MemoryError> {
        let region = self.region_of(page).ok_or(MemoryError::NoSuchPage { page, pages: self.inner.pages })?;
        // SAFETY: the page lies inside the region (region_of checked it), so the result stays
        // inside one mapping.
        Ok(unsafe { region.host.0.add((page - region.first_page) as usize * PAGE_BYTES) })
    }
}

/// Appends page `page` of `region`, counted from the region's start. The caller has checked that it
/// is below `region.pages`.
fn append_page(region: &RamRegion, page: u64, into: &mut Vec<u8>) {
    into.reserve(PAGE_BYTES);
    let length = into.len();
    // SAFETY: the source is a whole page of a live mapping; reserve() made room for PAGE_BYTES
    // bytes behind `length`, and they are written before set_len() makes them part of the vector.
    unsafe {
        let from = region.host.0.add(page as usize * PAGE_BYTES);
        std::ptr::copy_nonoverlapping(from, into.as_mut_ptr().add(length), PAGE_BYTES);
        into.set_len(length + PAGE_BYTES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        for bytes in [0, 1, 4097, MEMORY_BYTES_MAX + 4096] {
            assert!(matches!(GuestRam::new(bytes), Err(MemoryError::Size { .. })), "{bytes}");
        }
    }

    #[test]
    fn the_hole_has_no_page_index() {
        // Mapped without reserve: costs address space only.
        let ram = GuestRam::new(HOLE_START + 3 * 4096).expect("map");
        let low_pages = HOLE_START / 4096;
        assert_eq!(ram.pages(), low_pages + 3);
        assert_eq!(ram.address_of(low_pages - 1), Some(HOLE_START - 4096));
        assert_eq!(ram.address_of(low_pages), Some(HOLE_END));
        assert_eq!(ram.address_of(low_pages + 3), None);
        assert_eq!(ram.page_of(HOLE_END + 4097), Some(low_pages + 1));
        assert_eq!(ram.page_of(HOLE_START), None);
        assert_eq!(end_of(ram.bytes()), HOLE_END + 3 * 4096);
        assert_eq!(end_of(HOLE_START), HOLE_START);
        assert_eq!(ram.page_of(HOLE_END + 3 * 4096), None);
        let page = [7u8; PAGE_BYTES];
        ram.write_page(low_pages + 2, &page).expect("write");
        let mut set = PageSet::empty(ram.pages());
        set.insert(low_pages + 2);
        set.insert(5);
        let mut bytes = Vec::new();
        ram.copy_pages(&set, &mut bytes);
        assert_eq!(bytes.len(), 2 * PAGE_BYTES);
        assert_eq!(&bytes[..PAGE_BYTES], &[0; PAGE_BYTES]);
        assert_eq!(&bytes[PAGE_BYTES..], &page);
    }

    #[test]
    fn pages_are_written_whole_and_inside() {
        let ram = GuestRam::new(3 * 4096).expect("map");
        assert!(matches!(ram.write_page(0, &[1; 100]), Err(MemoryError::PageSize { bytes: 100 })));
        assert!(matches!(ram.write_page(3, &[1; PAGE_BYTES]), Err(MemoryError::NoSuchPage { .. })));
        assert!(ram.write(3 * 4096 - 1, &[1, 2]).is_err());
        ram.write(4096, b"abc").expect("write");
        let mut page = [0; PAGE_BYTES];
        ram.read_page(1, &mut page).expect("read");
        assert_eq!(&page[..4], b"abc\0");
    }
}
