//! The boot info page: what the host tells the guest about itself. The host writes it once, before
//! the guest starts.

/// The page's first word.
const MAGIC: u64 = 0x6d63_645f_626f_6f74;
/// The layout this guest understands.
const VERSION: u32 = 1;

/// Where RAM ends below the device window, and where it goes on above.
pub const HOLE_START: u64 = 0xC000_0000;
/// See [`HOLE_START`].
pub const HOLE_END: u64 = 0x1_0000_0000;

/// The boot info page, little-endian, as the host lays it out.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct BootInfo {
    magic: u64,
    version: u32,
    /// How many vCPUs run this image.
    pub cpus: u32,
    /// How much RAM there is, in bytes, without the hole.
    pub memory_bytes: u64,
    /// The Ethernet address.
    pub mac: [u8; 6],
    reserved_a: [u8; 2],
    /// The IPv4 address.
    pub ipv4: [u8; 4],
    /// Bits of its network's prefix.
    pub prefix_len: u8,
    reserved_b: [u8; 3],
    /// The default router; all zero if there is none.
    pub gateway: [u8; 4],
    /// Guest-physical address of vCPU 0's kvmclock page; the others' follow 64 bytes apart.
    pub kvmclock_gpa: u64,
    /// A random number, fixed at boot.
    pub seed: u64,
}

impl BootInfo {
    /// Reads the page at `address`, if it is one this guest understands.
    ///
    /// # Safety
    /// `address` must be what the host passed at entry.
    pub unsafe fn read(address: u64) -> Option<BootInfo> {
        // SAFETY: the host maps a whole readable page there (the caller's promise); every bit
        // pattern is a BootInfo.
        let info = unsafe { core::ptr::read_volatile(address as *const BootInfo) };
        (info.magic == MAGIC && info.version == VERSION).then_some(info)
    }

    /// The pieces of RAM as (first address, length in bytes); the second is empty unless RAM
    /// reaches beyond the hole.
    pub fn ram(&self) -> [(u64, u64); 2] {
        let low = self.memory_bytes.min(HOLE_START);
        [(0, low), (HOLE_END, self.memory_bytes - low)]
    }
}
