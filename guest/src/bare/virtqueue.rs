//! A split virtqueue that is polled: the driver's side, one descriptor per buffer, no interrupts.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicU16, Ordering, fence};

/// In `Available::flags`: the driver polls, do not interrupt.
const AVAILABLE_NO_INTERRUPT: u16 = 1;
/// In `Used::flags`: the device looks by itself, do not notify.
const USED_NO_NOTIFY: u16 = 1;
/// In `Descriptor::flags`: another one follows.
const DESCRIPTOR_NEXT: u16 = 1;
/// In `Descriptor::flags`: the device writes the buffer.
pub const DESCRIPTOR_WRITE: u16 = 2;

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    bytes: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
struct Available<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [u16; N],
    used_event: u16,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct UsedElement {
    id: u32,
    bytes: u32,
}

#[repr(C, align(4))]
struct Used<const N: usize> {
    flags: AtomicU16,
    index: AtomicU16,
    ring: [UsedElement; N],
    available_event: u16,
}

/// The three rings in one page, so that a busy queue dirties one page.
#[repr(C, align(4096))]
struct Rings<const N: usize> {
    descriptors: [Descriptor; N],
    available: Available<N>,
    used: Used<N>,
}

/// The driver's end of one queue of `N` descriptors; `N` is a power of two.
pub struct Virtqueue<const N: usize> {
    rings: &'static mut Rings<N>,
    /// Buffers published to the device so far.
    published: u16,
    /// Value of `published` when the device was last told.
    told: u16,
    /// Used elements taken so far.
    taken: u16,
}

impl<const N: usize> Virtqueue<N> {
    /// An empty queue.
    pub fn new() -> Virtqueue<N> {
        let rings = Box::leak(Box::new(Rings {
            descriptors: [Descriptor { address: 0, bytes: 0, flags: 0, next: 0 }; N],
            available: Available {
                flags: AtomicU16::new(AVAILABLE_NO_INTERRUPT),
                index: AtomicU16::new(0),
                ring: [0; N],
                used_event: 0,
            },
            used: Used {
                flags: AtomicU16::new(0),
                index: AtomicU16::new(0),
                ring: [UsedElement { id: 0, bytes: 0 }; N],
                available_event: 0,
            },
        }));
        Virtqueue { rings, published: 0, told: 0, taken: 0 }
    }

    /// Guest-physical addresses of the descriptor table, the available ring and the used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [
            (&raw const self.rings.descriptors) as u64,
            (&raw const self.rings.available) as u64,
            (&raw const self.rings.used) as u64,
        ]
    }

    /// Gives the device the buffer at `address` under number `id`, which must not be with the
    /// device already.
    pub fn publish(&mut self, id: u16, address: u64, bytes: u32, flags: u16) {
        let slot = usize::from(id) % N;
        // SAFETY: both places lie inside our own rings. The device reads them only after the index
        // below says so, hence volatile writes and a releasing store.
        unsafe {
            let descriptor = &raw mut self.rings.descriptors[slot];
            descriptor.write_volatile(Descriptor { address, bytes, flags, next: 0 });
            (&raw mut self.rings.available.ring[usize::from(self.published) % N]).write_volatile(id);
        }
        self.published = self.published.wrapping_add(1);
        self.rings.available.index.store(self.published, Ordering::Release);
    }

    /// Gives the device one request of several buffers, each with its address, length and flags,
    /// under number 0. Nothing else may be with the device, and there must be a descriptor for
    /// each.
    pub fn publish_chain<const M: usize>(&mut self, buffers: [(u64, u32, u16); M]) {
        const { assert!(M >= 1 && M <= N, "a descriptor for each") };
        for (index, (address, bytes, flags)) in buffers.into_iter().enumerate() {
            let next = index as u16 + 1;
            let flags = if usize::from(next) < M { flags | DESCRIPTOR_NEXT } else { flags };
            // SAFETY: a descriptor of our own (M is at most N). The device reads it only after the
            // index below says so, hence a volatile write and a releasing store.
            unsafe {
                (&raw mut self.rings.descriptors[index]).write_volatile(Descriptor { address, bytes, flags, next });
            }
        }
        // SAFETY: a place in our own ring, as above.
        unsafe { (&raw mut self.rings.available.ring[usize::from(self.published) % N]).write_volatile(0) };
        self.published = self.published.wrapping_add(1);
        self.rings.available.index.store(self.published, Ordering::Release);
    }

    /// Whether the device has returned a buffer that was not taken yet.
    pub fn has_used(&self) -> bool {
        self.rings.used.index.load(Ordering::Acquire) != self.taken
    }

    /// Takes one buffer back: its number and how many bytes the device wrote. Numbers the device
    /// cannot mean are skipped.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        while self.has_used() {
            let slot = usize::from(self.taken) % N;
            // SAFETY: the element lies inside our own ring; the acquiring load of the index ordered
            // the device's write before.
            let element = unsafe { (&raw const self.rings.used.ring[slot]).read_volatile() };
            self.taken = self.taken.wrapping_add(1);
            if (element.id as usize) < N {
                return Some((element.id as u16, element.bytes));
            }
        }
        None
    }

    /// Whether the device has to be told of buffers published since it last was. Counts as telling
    /// it.
    pub fn wants_notice(&mut self) -> bool {
        if self.told == self.published {
            return false;
        }
        self.told = self.published;
        // The device clears its flag and then looks at the index once more; we wrote the index and
        // now look at its flag.
        fence(Ordering::SeqCst);
        self.rings.used.flags.load(Ordering::Relaxed) & USED_NO_NOTIFY == 0
    }
}
