//! The I/O ports of the machine: serial, wait and event.

use core::arch::asm;
use core::fmt;

/// The serial port's data register.
const SERIAL: u16 = 0x3F8;
/// Writing microseconds here says: idle for at most so long.
const WAIT: u16 = 0x600;
/// Writing a code here tells the host what became of the guest.
const EVENT: u16 = 0x604;

/// The longest wait: until a device has something.
pub const WAIT_FOREVER: u32 = u32::MAX;

/// What the guest tells its host.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Event {
    /// It serves.
    Serving = 1,
    /// It is done; the host may switch it off.
    ShutDown = 2,
    /// It failed; why is on the serial port.
    Panic = 3,
}

/// Idles for at most `limit_us` microseconds, [`WAIT_FOREVER`] without limit. May return early:
/// look again, then wait again.
pub fn wait(limit_us: u32) {
    // SAFETY: the wait port has no effect but time; the TSS's bitmap allows it. Not `nomem`:
    // devices change memory meanwhile.
    unsafe { asm!("out dx, eax", in("dx") WAIT, in("eax") limit_us, options(nostack, preserves_flags)) }
}

/// Tells the host `event`.
pub fn tell(event: Event) {
    // SAFETY: the event port changes nothing in the guest; the TSS's bitmap allows it.
    unsafe { asm!("out dx, eax", in("dx") EVENT, in("eax") event as u32, options(nostack, preserves_flags)) }
}

/// The serial port as a place to write text. The host's device takes every byte at once.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the serial data register takes any byte; the TSS's bitmap allows the port.
            unsafe { asm!("out dx, al", in("dx") SERIAL, in("al") byte, options(nomem, nostack, preserves_flags)) }
        }
        Ok(())
    }
}
