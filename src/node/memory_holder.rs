//! Dying fast: when a node is killed, its peer must hear of it at once, however much memory the
//! guest has.
//!
//! The kernel ends a process in this order: it frees the memory, and only then closes the files. A
//! guest's memory takes a while to free (about 0.2 ms per MiB here, so 4 GiB take most of a
//! second), and for that long the dead node's sockets stand open and its secondary hears nothing.
//! So a second process, the *memory holder process*, shares this one's memory and nothing else:
//! while it lives, this process' memory is not freed when this process ends, its sockets close at
//! once, and the memory holder process, which is killed by its parent's death, frees the memory
//! afterwards.

use std::io;
use std::ptr::without_provenance_mut;

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};

/// The memory holder process's stack: it calls nothing but the kernel.
const STACK_BYTES: usize = 16 << 10;

/// Starts the memory holder process. Call it from the main thread (whose death ends the memory
/// holder process) and before there is any file the memory holder process should not have: it
/// closes all it inherits.
///
/// # Errors
/// The kernel's, if it allows no further process. A node works without a memory holder process;
/// only its death is heard of later.
pub(crate) fn start() -> io::Result<()> {
    let pid = start_for(std::process::id())?;
    tracing::debug!(pid, "memory holder process started: this node's sockets close at once when it is killed");
    Ok(())
}

/// Starts a memory holder process that ends at once unless `parent` is its parent. Returns its
/// process id.
fn start_for(parent: u32) -> io::Result<libc::pid_t> {
    let length = std::num::NonZeroUsize::new(STACK_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a new private mapping, placed by the kernel; nothing else refers to it.
    let stack = unsafe {
        mmap_anonymous(
            None,
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE | MapFlags::MAP_STACK,
        )
    }?;
    // SAFETY: the offset is inside the mapping's bounds (one past its end, where a stack that grows
    // down begins, and page aligned).
    let top = unsafe { stack.as_ptr().cast::<u8>().add(STACK_BYTES) };
    // SAFETY: `keep` runs on a stack of its own that is never freed or reused, takes a number as
    // its argument, and touches no memory of this process beside that stack (see there), so sharing
    // the address space cannot disturb it. Without an exit signal nobody has to wait for it.
    let pid = unsafe { libc::clone(keep, top.cast(), libc::CLONE_VM, without_provenance_mut(parent as usize)) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pid)
}

/// The memory holder process's whole life: die with the parent, keep no file open, wait.
extern "C" fn keep(parent: *mut libc::c_void) -> libc::c_int {
    system_call(libc::SYS_prctl, libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0);
    // A parent that died before that request, as a node that cannot start soon does, sends no
    // signal any more: nobody would ever end us.
    if system_call(libc::SYS_getppid, 0, 0, 0) != parent.addr() as u64 {
        loop {
            system_call(libc::SYS_exit_group, 0, 0, 0);
        }
    }
    system_call(libc::SYS_close_range, 0, u64::from(u32::MAX), 0);
    // SIGINT and SIGTERM of a terminal or a service manager are for the parent, which ends us by
    // ending: all signals but SIGKILL are blocked.
    let all = u64::MAX;
    system_call4(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK as u64, (&raw const all) as u64, 0, 8);
    loop {
        system_call(libc::SYS_pause, 0, 0, 0);
    }
}

fn system_call(number: libc::c_long, a: u64, b: u64, c: u64) -> u64 {
    system_call4(number, a, b, c, 0)
}

/// A system call without libc, which would write `errno` into the thread-local memory of the
/// parent's main thread.
fn system_call4(number: libc::c_long, a: u64, b: u64, c: u64, d: u64) -> u64 {
    let result;
    // SAFETY: the calls above read at most the eight bytes whose address they are given and write
    // no memory of ours; the kernel clobbers rcx and r11 and returns in rax.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number as u64 => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, FromRawFd, OwnedFd};
    use std::ptr::null_mut;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;

    /// Waits for the end of a memory holder process for `timeout_ms`; then ends it, if it lives,
    /// and collects it. True if it ended by itself.
    fn ends_by_itself(pid: libc::pid_t, timeout_ms: u16) -> bool {
        // SAFETY: plain system calls on a child of ours that is collected below only, so that its
        // process id is its own until then.
        let pidfd = unsafe {
            let raw = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            assert!(raw >= 0, "pidfd_open: {}", io::Error::last_os_error());
            OwnedFd::from_raw_fd(i32::try_from(raw).expect("a file descriptor"))
        };
        let ended = poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(timeout_ms));
        // SAFETY: as above; `__WALL` because a memory holder process has no exit signal.
        unsafe {
            libc::kill(pid, libc::SIGKILL);
            assert_eq!(libc::waitpid(pid, null_mut(), libc::__WALL), pid);
        }
        ended.expect("poll") == 1
    }

    #[test]
    fn a_memory_holder_process_whose_parent_died_first_ends() {
        // What it finds then: a parent that is not the one that started it.
        let pid = start_for(u32::MAX).expect("a memory holder process");
        assert!(ends_by_itself(pid, 20_000), "it would wait for ever");
    }
}
