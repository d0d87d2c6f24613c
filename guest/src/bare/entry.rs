//! Where a vCPU starts, and where a panic ends.

use core::arch::naked_asm;
use core::fmt::Write;
use core::panic::PanicInfo;

use super::boot_info::BootInfo;
use super::ports::{Event, Serial, WAIT_FOREVER, tell, wait};
use super::{clock, heap, host, writer};

/// The ELF's entry: RDI = vCPU number, RSI = address of the boot info page, RSP = the vCPU's own
/// stack.
#[unsafe(no_mangle)]
#[unsafe(naked)]
unsafe extern "C" fn _start() -> ! {
    naked_asm!("xor ebp, ebp", "and rsp, -16", "call {enter}", "ud2", enter = sym enter)
}

/// The first Rust code of every vCPU.
extern "C" fn enter(cpu: u64, boot_info: u64) -> ! {
    // SAFETY: `boot_info` is what the host passed at entry.
    let Some(info) = (unsafe { BootInfo::read(boot_info) }) else {
        panic!("the boot info page is not one this guest understands");
    };
    clock::set_pages(info.kvmclock_gpa);
    if cpu == 0 {
        // SAFETY: vCPU 0 is the only one that sets up the heap, once, and the writers allocate
        // nothing.
        unsafe { heap::set_up(&info) };
        host::serve(&info)
    } else {
        writer::run(cpu as u32)
    }
}

/// Says on the serial port what went wrong, tells the host and waits for the end.
#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    // Writing to the serial port cannot fail.
    let _ = writeln!(Serial, "mcd guest: {info}");
    tell(Event::Panic);
    loop {
        wait(WAIT_FOREVER);
    }
}

/// Named by precompiled `core`, never called: panics do not unwind here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// Named by precompiled `alloc`, never called: panics do not unwind here.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    panic!("unwinding in a guest that does not unwind")
}
