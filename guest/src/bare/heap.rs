//! The heap: all RAM behind the image.

use mcd_guest::server::MemoryUse;
use spinning_top::RawSpinlock;
use talc::{TalcLock, source::Manual};

use super::boot_info::BootInfo;

#[global_allocator]
static HEAP: TalcLock<RawSpinlock, Manual> = TalcLock::new(Manual);

// SAFETY: the linker script defines the symbol, and only its address is ever taken.
unsafe extern "C" {
    /// The first byte behind the image; the linker script defines it.
    static __image_end: u8;
}

/// Gives all RAM behind the image to the heap. Touches its edges only.
///
/// # Safety
/// Call once, before anything allocates.
pub unsafe fn set_up(info: &BootInfo) {
    let image_end = (&raw const __image_end) as u64;
    let [(_, low_bytes), (high, high_bytes)] = info.ram();
    let pieces = [(image_end, low_bytes.saturating_sub(image_end)), (high, high_bytes)];
    for (start, bytes) in pieces {
        if bytes > 0 {
            // SAFETY: RAM behind the image belongs to nobody else, is mapped and stays so.
            let claimed = unsafe { HEAP.lock().claim(start as *mut u8, bytes as usize) };
            if claimed.is_none() {
                panic!("{bytes} bytes of RAM are too few for a heap");
            }
        }
    }
}

/// How much of the heap is in use.
pub fn memory_use() -> MemoryUse {
    let heap = HEAP.lock();
    let counters = heap.counters();
    MemoryUse { used_bytes: counters.allocated_bytes as u64, free_bytes: counters.available_bytes as u64 }
}
