//! A second view of a vCPU's `kvm_run` page, for the one field another thread must write:
//! `immediate_exit`.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use nix::errno::Errno;

/// A mapping of the first page of a vCPU's `kvm_run`.
pub(super) struct RunPage {
    run: *mut kvm_run,
}

// SAFETY: the mapping is shared with the kernel and with the vCPU thread by design; the only access
// made through it is one atomic byte.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the page of the vCPU behind `fd`. The mapping keeps the vCPU alive, not the other way
    /// round.
    pub(super) fn map(fd: BorrowedFd<'_>) -> Result<RunPage, Errno> {
        // SAFETY: a fresh shared mapping at an address the kernel picks; it overlaps nothing of
        // ours.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<kvm_run>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(RunPage { run: address.cast() })
    }

    /// Makes KVM_RUN return EINTR as soon as pending I/O is complete (true), or run the guest
    /// (false).
    pub(super) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: `run` is a live mapping of at least one kvm_run; the field is one byte, which
        // atomics may access in place, and the kernel expects it to be written by other threads.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.run).immediate_exit) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by map() with this length and nothing else points into it.
        unsafe { libc::munmap(self.run.cast(), size_of::<kvm_run>()) };
    }
}
