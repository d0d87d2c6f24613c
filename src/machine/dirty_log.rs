//! Dirty pages: which pages changed since it was last asked.
//!
//! Two sources must be joined, because neither sees everything: KVM's dirty log knows what vCPUs
//! (and KVM itself, as for kvmclock) wrote; the VMM's bitmap knows what devices wrote through
//! `GuestRam::mmap`.
//!
//! **Reading the log clears it.** `KVM_GET_DIRTY_LOG` returns the bits and write-protects those
//! pages again in one step, and [`DirtyBitmap::drain_into`] swaps its words for zero. From that
//! moment the set handed to the caller is the only record of the dirty pages: a caller whose epoch
//! fails must add the set to the next one (invariant I5), and must not drop it half way. For the
//! same reason the words are ORed into the caller's set, never stored over it: a set that still
//! carries a failed epoch's dirty pages can be passed straight in.
//!
//! The log must be read last in a capture, after everything that may write guest memory on the way.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_bindings::{KVMIO, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::memory::GuestRam;
use crate::protocol::pages::{PAGE_BYTES, PageSet};

mod ioctls {
    #![allow(missing_docs)] // the macro makes an undocumented function of it
    use super::*;
    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
}
use ioctls::KVM_GET_DIRTY_LOG;

/// The VMM's own dirty bitmap of one RAM region: one bit per page, set by device writes.
///
/// vm-memory has such a bitmap too, but its only way to read and clear allocates, and this one is
/// read in every pause. A flag says whether any bit may be set, so that a pause without device
/// writes does not scan the words.
#[derive(Debug, Default)]
pub struct DirtyBitmap {
    words: Vec<AtomicU64>,
    any: AtomicBool,
}

impl DirtyBitmap {
    /// Moves every set bit into `set`, whose page `first_page` (a multiple of 64) is this bitmap's
    /// first.
    pub fn drain_into(&self, first_page: u64, set: &mut PageSet) {
        // The flag is cleared before the words are read: a writer sets its bit first and the flag
        // second, so a bit that this drain misses leaves the flag set for the next.
        if !self.any.swap(false, Ordering::SeqCst) {
            return;
        }
        for (index, word) in self.words.iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::SeqCst);
                set_word(set, first_page + index as u64 * 64, bits);
            }
        }
    }

    /// Forgets every set bit.
    pub fn clear(&self) {
        self.any.store(false, Ordering::SeqCst);
        for word in &self.words {
            word.store(0, Ordering::SeqCst);
        }
    }
}

/// Adds the pages `first..first + 64` whose bits are set, without touching the rest of the set.
fn set_word(set: &mut PageSet, first: u64, mut bits: u64) {
    while bits != 0 {
        set.insert(first + u64::from(bits.trailing_zeros()));
        bits &= bits - 1;
    }
}

impl<'a> WithBitmapSlice<'a> for DirtyBitmap {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for DirtyBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len == 0 {
            return;
        }
        let first = offset / PAGE_BYTES;
        let last = offset.saturating_add(len - 1) / PAGE_BYTES;
        for page in first..=last {
            // Beyond the end only by a mistake of the caller; no page of ours changed then.
            let Some(word) = self.words.get(page / 64) else { break };
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
        self.any.store(true, Ordering::SeqCst);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset / PAGE_BYTES;
        self.words.get(page / 64).is_some_and(|word| word.load(Ordering::SeqCst) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> <Self as WithBitmapSlice<'_>>::S {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for DirtyBitmap {
    fn with_len(len: usize) -> Self {
        let words = len.div_ceil(PAGE_BYTES).div_ceil(64);
        DirtyBitmap { words: (0..words).map(|_| AtomicU64::new(0)).collect(), any: AtomicBool::new(false) }
    }
}

/// Reads KVM's dirty log into a buffer that is allocated once.
pub(super) struct DirtyLog {
    words: Vec<u64>,
}

impl DirtyLog {
    /// A reader for the slots of `ram`; slot n is region n.
    pub(super) fn new(ram: &GuestRam) -> DirtyLog {
        let words = ram.regions().iter().map(|r| r.pages.div_ceil(64) as usize).max().unwrap_or(0);
        DirtyLog { words: vec![0; words] }
    }

    /// ORs KVM's log and the VMM's bitmap into `set`, and clears both.
    pub(super) fn collect(&mut self, vm: &VmFd, ram: &GuestRam, set: &mut PageSet) -> Result<(), Errno> {
        for (slot, region) in ram.regions().iter().enumerate() {
            let words = region.pages.div_ceil(64) as usize;
            let buffer = self.words.get_mut(..words).ok_or(Errno::EINVAL)?;
            let log = kvm_dirty_log {
                slot: u32::try_from(slot).map_err(|_| Errno::EINVAL)?,
                padding1: 0,
                __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: buffer.as_mut_ptr().cast() },
            };
            // SAFETY: the ioctl writes one bit per page of the slot, rounded up to 64, into
            // `dirty_bitmap`; the buffer holds that many words (taken from the same region that
            // made the slot) and lives until the call returns.
            let result = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) };
            Errno::result(result)?;
            set.union_words(region.first_page, buffer);
        }
        drain_bitmaps(ram, set);
        Ok(())
    }
}

/// Moves the VMM's own dirty pages into `set`.
pub(super) fn drain_bitmaps(ram: &GuestRam, set: &mut PageSet) {
    use vm_memory::{GuestMemoryBackend, MmapRegion};
    for (region, mapping) in ram.regions().iter().zip(ram.mmap().iter()) {
        let mapping: &MmapRegion<DirtyBitmap> = mapping;
        mapping.bitmap().drain_into(region.first_page, set);
    }
}

/// Forgets the VMM's own dirty pages: tracking begins now.
pub(super) fn clear_bitmaps(ram: &GuestRam) {
    use vm_memory::{GuestMemoryBackend, MmapRegion};
    for mapping in ram.mmap().iter() {
        let mapping: &MmapRegion<DirtyBitmap> = mapping;
        mapping.bitmap().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_writes_are_dirty_once() {
        let ram = GuestRam::new(200 * 4096).expect("map");
        ram.write(70 * 4096 - 1, &[1, 2]).expect("write");
        ram.write_page(3, &[9; PAGE_BYTES]).expect("apply");
        let mut set = PageSet::empty(ram.pages());
        drain_bitmaps(&ram, &mut set);
        assert_eq!(set.iter().collect::<Vec<_>>(), vec![69, 70], "an applied page is no dirty");
        let mut again = PageSet::empty(ram.pages());
        drain_bitmaps(&ram, &mut again);
        assert!(again.is_empty());
    }

    #[test]
    fn draining_adds_to_what_is_there() {
        let ram = GuestRam::new(200 * 4096).expect("map");
        let mut set = PageSet::empty(ram.pages());
        set.insert(1);
        ram.write(0, &[1]).expect("write");
        drain_bitmaps(&ram, &mut set);
        assert_eq!(set.iter().collect::<Vec<_>>(), vec![0, 1]);
        ram.write(0, &[1]).expect("write");
        clear_bitmaps(&ram);
        set.clear();
        drain_bitmaps(&ram, &mut set);
        assert!(set.is_empty());
    }
}
