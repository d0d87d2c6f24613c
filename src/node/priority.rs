//! Threads on the way of a commit go first: the driver, the sender, the receivers. They block
//! whenever they have nothing to do.

use std::mem::MaybeUninit;

/// The lowest real-time priority: before every ordinary thread, after whatever the operator ranks
/// above mcd.
const PRIORITY: libc::c_int = 1;

/// Lets this thread run as soon as it has something to do, if this process may decide that
/// (CAP_SYS_NICE or a limit). Threads it starts are ordinary ones.
pub(crate) fn raise() {
    // SAFETY: an all-zero sched_param is a valid one.
    let mut param: libc::sched_param = unsafe { MaybeUninit::zeroed().assume_init() };
    param.sched_priority = PRIORITY;
    // SAFETY: `param` is valid for the call's duration; 0 means this thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, &raw const param) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!(%error, "this thread stays an ordinary one: pauses and commits may take longer on a busy host");
    }
}

/// How much nicer a thread is that nobody waits for.
const NICER: libc::c_int = 10;

/// Lets ordinary threads, the guest's above all, go before this one.
pub(crate) fn lower() {
    // SAFETY: the call takes numbers only; 0 means this thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICER) };
    if result != 0 {
        let error = std::io::Error::last_os_error();
        // It is one only where this process is nicer than that already.
        tracing::debug!(%error, "this thread keeps its priority");
    }
}
