//! Guest time from kvmclock: the host keeps one page per vCPU from which the time stamp counter
//! becomes nanoseconds.

use core::arch::x86_64::_rdtsc;
use core::sync::atomic::{AtomicU64, Ordering, fence};

use mcd_guest::clock::scale;

/// Address of vCPU 0's page; 0 until [`set_pages`] ran.
static PAGES: AtomicU64 = AtomicU64::new(0);

/// Bytes between two vCPUs' pages.
const STRIDE: u64 = 64;

/// `struct pvclock_vcpu_time_info` of the KVM API.
#[repr(C)]
struct TimeInfo {
    version: u32,
    reserved: u32,
    tsc_timestamp: u64,
    system_time_ns: u64,
    tsc_to_system_multiplier: u32,
    tsc_shift: i8,
    flags: u8,
    reserved_b: [u8; 2],
}

/// Says where the host keeps the clock pages.
pub fn set_pages(address: u64) {
    PAGES.store(address, Ordering::Relaxed);
}

/// Nanoseconds of guest time as vCPU `cpu` sees it.
pub fn now_ns(cpu: u32) -> u64 {
    let page = (PAGES.load(Ordering::Relaxed) + u64::from(cpu) * STRIDE) as *const TimeInfo;
    loop {
        // SAFETY: the host keeps a TimeInfo there for every vCPU. It rewrites it at any time
        // between two instructions of ours, so reads are volatile and the version, odd while the
        // host writes, is checked before and after.
        unsafe {
            let version = (&raw const (*page).version).read_volatile();
            fence(Ordering::Acquire);
            let stamp = (&raw const (*page).tsc_timestamp).read_volatile();
            let system_ns = (&raw const (*page).system_time_ns).read_volatile();
            let multiplier = (&raw const (*page).tsc_to_system_multiplier).read_volatile();
            let shift = (&raw const (*page).tsc_shift).read_volatile();
            let ticks = _rdtsc().saturating_sub(stamp);
            fence(Ordering::Acquire);
            if version & 1 == 0 && (&raw const (*page).version).read_volatile() == version {
                return system_ns.wrapping_add(scale(ticks, multiplier, shift));
            }
        }
        core::hint::spin_loop();
    }
}

/// Microseconds of guest time as vCPU `cpu` sees it.
pub fn now_us(cpu: u32) -> u64 {
    now_ns(cpu) / 1_000
}
