//! The memory functions that the compiler calls by name. There is no C library here to bring them.
//!
//! Written in assembly so that the compiler cannot turn a loop in `memcpy` into a call of `memcpy`.

use core::arch::asm;

/// Copies `count` bytes from `from` to `to`; the two must not overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: the caller owns `count` readable bytes at `from` and writable bytes at `to`. Short
    // copies use two moves that may overlap each other inside the same `count` bytes; both loads
    // happen before the stores.
    unsafe {
        match count {
            0 => {}
            1..8 => asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags)),
            8..=16 => {
                let head = from.cast::<u64>().read_unaligned();
                let tail = from.add(count - 8).cast::<u64>().read_unaligned();
                to.cast::<u64>().write_unaligned(head);
                to.add(count - 8).cast::<u64>().write_unaligned(tail);
            }
            _ => asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags)),
        }
    }
    to
}

/// Copies `count` bytes from `from` to `to`, which may overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= count {
        // SAFETY: a copy in rising order never overwrites a byte it has yet to read when `to` is
        // below `from` or behind its end.
        unsafe {
            asm!("rep movsb", inout("rcx") count => _, inout("rdi") to => _, inout("rsi") from => _,
                options(nostack, preserves_flags));
        }
    } else {
        // SAFETY: `to` lies inside [from, from + count), so `count` is at least 1 and falling order
        // is the safe one. The direction flag is cleared again before anything else runs.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") count => _, inout("rdi") to.add(count - 1) => _,
                inout("rsi") from.add(count - 1) => _, options(nostack));
        }
    }
    to
}

/// Fills `count` bytes at `to` with the low byte of `value`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, value: i32, count: usize) -> *mut u8 {
    // SAFETY: the caller owns `count` writable bytes at `to`.
    unsafe {
        asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("al") value as u8,
            options(nostack, preserves_flags));
    }
    to
}

/// Compares `count` bytes as unsigned numbers: below 0, 0 or above 0 as `left` is less than, equal
/// to or greater than `right`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    let mut at = 0;
    // SAFETY: the caller owns `count` readable bytes at both places; `at` stays below `count`.
    // Volatile reads keep the compiler from seeing a memcmp in the byte loop.
    unsafe {
        while at + 8 <= count {
            let (a, b) = (left.add(at).cast::<u64>().read_unaligned(), right.add(at).cast::<u64>().read_unaligned());
            if a != b {
                break;
            }
            at += 8;
        }
        while at < count {
            let (a, b) = (left.add(at).read_volatile(), right.add(at).read_volatile());
            if a != b {
                return i32::from(a) - i32::from(b);
            }
            at += 1;
        }
    }
    0
}

/// Zero if `count` bytes are equal.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, count: usize) -> i32 {
    // SAFETY: the caller's promise is memcmp's.
    unsafe { memcmp(left, right, count) }
}
