//! The thread of a device: how it is woken, kept out of guest memory, and ended.
//!
//! **Quiesced.** What a pause must wait for happens inside [`Work`]: the thread touches guest
//! memory or changes a disk only while it holds one. A pause sets *paused*, after which no work
//! begins, and waits until the thread is not *working*; the thread tells the machine of the end of
//! a piece of work ([`Signals::quiesced`]). Both flags are sequentially consistent and each side
//! writes its own before it reads the other's, so that one of the two always sees the other.
//!
//! No lock is needed to quiesce: neither a device's thread nor a vCPU that holds a device's lock
//! can keep the controller from asking, and the controller can stop waiting at any time.
//!
//! **Resting.** A thread with nothing to do says so before it sleeps; whoever gives it something to
//! do wakes it only then. Where what is to be done is behind a device's lock, the thread looks and
//! rests under that lock, so that nothing is put there in between.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::Signals;

/// What a device, its guest and a pause say to the device's thread.
pub(super) struct ThreadControl {
    event: EventFd,
    ending: AtomicBool,
    paused: AtomicBool,
    working: AtomicBool,
    resting: AtomicBool,
    signals: Arc<dyn Signals>,
}

/// A piece of work that a pause waits for; it is over when this is dropped.
pub(super) struct Work<'a> {
    control: &'a ThreadControl,
}

impl Drop for Work<'_> {
    fn drop(&mut self) {
        self.control.end_work();
    }
}

impl ThreadControl {
    /// The control of a thread that begins paused.
    ///
    /// # Errors
    /// If the host gives no eventfd.
    pub(super) fn new(signals: Arc<dyn Signals>) -> io::Result<ThreadControl> {
        Ok(ThreadControl {
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            ending: AtomicBool::new(false),
            paused: AtomicBool::new(true),
            working: AtomicBool::new(false),
            resting: AtomicBool::new(true),
            signals,
        })
    }

    /// Controller: no work begins from now on. Does not wait for what has begun.
    pub(super) fn begin_quiesce(&self) {
        self.paused.store(true, Ordering::SeqCst);
    }

    /// Controller: true when the work that had begun before [`ThreadControl::begin_quiesce`] is
    /// over.
    pub(super) fn is_quiet(&self) -> bool {
        !self.working.load(Ordering::SeqCst)
    }

    /// Controller: work may begin again.
    pub(super) fn unquiesce(&self) {
        self.paused.store(false, Ordering::SeqCst);
        self.wake();
    }

    /// True from [`ThreadControl::begin_quiesce`] to [`ThreadControl::unquiesce`].
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::SeqCst)
    }

    /// True when the device is being dropped.
    pub(super) fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Wakes the thread if it rests.
    pub(super) fn wake(&self) {
        if self.resting.swap(false, Ordering::SeqCst) {
            self.ring();
        }
    }

    /// Makes the thread look again, whether it rests or waits for something else too. Takes no
    /// lock.
    pub(super) fn ring(&self) {
        // It can only fail when the counter is full, and then the thread is being woken already.
        let _ = self.event.write(1);
    }

    /// Thread: begins a piece of work. `None` if the device is paused: the thread is to sleep, and
    /// is woken when the pause ends.
    pub(super) fn begin_work(&self) -> Option<Work<'_>> {
        loop {
            self.working.store(true, Ordering::SeqCst);
            if !self.is_paused() {
                return Some(Work { control: self });
            }
            self.end_work();
            self.rest();
            // The pause may have ended before the thread was marked as resting: it would not be
            // woken then.
            if self.is_paused() {
                return None;
            }
        }
    }

    fn end_work(&self) {
        self.working.store(false, Ordering::SeqCst);
        if self.is_paused() {
            self.signals.quiesced();
        }
    }

    /// Thread: has nothing to do and must be woken when that changes.
    pub(super) fn rest(&self) {
        self.resting.store(true, Ordering::SeqCst);
    }

    /// Thread: sleeps until somebody rings, or `also` is readable, or `timeout` is over.
    pub(super) fn sleep(&self, also: Option<BorrowedFd<'_>>, timeout: PollTimeout) {
        // SAFETY: the eventfd lives as long as `self`.
        let event = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        let watched = |fd| PollFd::new(fd, PollFlags::POLLIN);
        // An interrupted or failed poll is as good as a wake-up: the thread looks again.
        let _ = match also {
            Some(also) => poll(&mut [watched(event), watched(also)], timeout),
            None => poll(&mut [watched(event)], timeout),
        };
        let _ = self.event.read();
    }
}

/// The thread of a device. Dropping it ends the thread and waits for its end.
pub(super) struct DeviceThread {
    control: Arc<ThreadControl>,
    handle: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts a thread that does `work` again and again until the device is dropped.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub(super) fn start(
        name: String,
        control: Arc<ThreadControl>,
        mut work: impl FnMut() + Send + 'static,
    ) -> io::Result<DeviceThread> {
        let handle = std::thread::Builder::new().name(name).spawn({
            let control = Arc::clone(&control);
            move || {
                while !control.is_ending() {
                    work();
                }
            }
        })?;
        Ok(DeviceThread { control, handle: Some(handle) })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.control.ending.store(true, Ordering::SeqCst);
        self.control.ring();
        if let Some(handle) = self.handle.take() {
            let _ = handle.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::device::virtio::test_support::Recorder;

    #[test]
    fn nothing_is_done_in_a_pause_and_no_end_of_a_pause_is_missed() {
        let machine = Arc::new(Recorder::default());
        let control = Arc::new(ThreadControl::new(machine.clone()).expect("control"));
        let done = Arc::new(AtomicU64::new(0));
        let _thread = DeviceThread::start("worker".into(), Arc::clone(&control), {
            let (control, done) = (Arc::clone(&control), Arc::clone(&done));
            move || match control.begin_work() {
                Some(_work) => {
                    done.fetch_add(1, Ordering::SeqCst);
                }
                None => control.sleep(None, PollTimeout::NONE),
            }
        })
        .expect("thread");
        for round in 0..2_000 {
            let before = done.load(Ordering::SeqCst);
            control.unquiesce();
            if round % 3 != 0 {
                while done.load(Ordering::SeqCst) == before {
                    std::thread::yield_now();
                }
            }
            control.begin_quiesce();
            while !control.is_quiet() {
                std::thread::yield_now();
            }
            let quiet = done.load(Ordering::SeqCst);
            (0..20).for_each(|_| std::thread::yield_now());
            assert_eq!(done.load(Ordering::SeqCst), quiet, "work in a pause");
        }
        assert!(*machine.quiesced.lock() > 0, "the machine was told");
    }
}
