//! Stopping the guest, within a limit.
//!
//! A pause asks in this order, and each step begins when the one before is complete:
//!
//! 1. **Disks**, while the vCPUs run and the network works: a disk may take long to answer, and
//!    nothing else of the guest stops for that. What vCPUs do meanwhile is of the epoch that ends.
//! 2. **The network card, and input of the serial port**: at most the frame they are at. What a
//!    vCPU does on a device's behalf (transmitting, filling buffers with random bytes) is part of
//!    running that vCPU; after the chain it is at it leaves the rest of the queue for after the
//!    pause.
//! 3. **vCPUs**: out of the guest with their I/O complete.
//! 4. All is quiet: only now do vCPUs harvest what others could have changed (see `vcpu::thread`).
//!
//! So a write to a disk, a frame in either direction and an interrupt each belong completely to the
//! epoch before the pause or to the one after it.
//!
//! A pause that meets its limit, or is aborted, undoes what it has done, in no order: the guest
//! runs on, and the next pause begins from nothing. Nothing in here waits but
//! [`PauseSignal::wait`], which both can end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::vcpu::Vcpu;
use super::vcpu::gate::{Order, spin};
use super::{Machine, MachineError, PauseTimes, elapsed_us, futex};

/// The limit of [`Machine::pause`].
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// No pause waits.
const IDLE: u32 = 0;
/// A pause waits.
const WAITING: u32 = 1;
/// The pause that waits is to give up.
const ABORTED: u32 = 2;

/// What a pause sleeps on: device threads and vCPUs that have stopped say so here.
#[derive(Default)]
pub(super) struct PauseSignal {
    /// Goes up with each of them, and with an abort.
    count: AtomicU32,
    controller_sleeps: AtomicBool,
    phase: AtomicU32,
}

/// Why a pause gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum GaveUp {
    TimedOut,
    Aborted,
}

impl PauseSignal {
    /// Something has stopped: a pause that waits looks again. Never blocks.
    pub(super) fn notify(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
        if self.controller_sleeps.load(Ordering::SeqCst) {
            futex::wake_all(&self.count);
        }
    }

    /// Waits until `done`, first awake for `spin_max` and then asleep.
    fn wait(&self, deadline: Instant, spin_max: Duration, done: impl Fn() -> bool) -> Result<(), GaveUp> {
        if spin(spin_max, &done) {
            return Ok(());
        }
        loop {
            // Read before `done`: what stops after that has changed it.
            let count = self.count.load(Ordering::SeqCst);
            if done() {
                return Ok(());
            }
            if self.phase.load(Ordering::SeqCst) == ABORTED {
                return Err(GaveUp::Aborted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(GaveUp::TimedOut);
            }
            self.controller_sleeps.store(true, Ordering::SeqCst);
            futex::wait(&self.count, count, Some(left));
            self.controller_sleeps.store(false, Ordering::SeqCst);
        }
    }
}

/// Makes a pause that waits give up; see [`Machine::pause_abort`].
#[derive(Clone)]
pub struct PauseAbort {
    signal: Arc<PauseSignal>,
}

impl PauseAbort {
    /// A pause that waits at this moment gives up at once, with [`MachineError::PauseAborted`];
    /// without one nothing happens, and later pauses are not affected. Never blocks.
    pub fn abort(&self) {
        let waiting = &self.signal.phase;
        if waiting.compare_exchange(WAITING, ABORTED, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            self.signal.notify();
        }
    }
}

impl Machine {
    /// Stops the guest, within ten seconds: see [`Machine::pause_within`].
    ///
    /// # Errors
    /// As [`Machine::pause_within`].
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.pause_within(PAUSE_MAX)
    }

    /// Stops the guest. When this returns, every vCPU is out of the guest with its I/O complete, no
    /// device thread is in guest memory or changes a disk, and the vCPUs' state is being read by
    /// their own threads ([`Machine::save`] waits for it).
    ///
    /// # Errors
    /// [`MachineError::PauseTimedOut`] if something has not stopped within `limit`,
    /// [`MachineError::PauseAborted`] if [`PauseAbort::abort`] was called meanwhile. The guest runs
    /// on then as if nothing had been asked, and can be paused later. The vCPUs run for as long as
    /// only a disk does not answer.
    pub fn pause_within(&mut self, limit: Duration) -> Result<(), MachineError> {
        if !self.running {
            return Ok(());
        }
        let start = Instant::now();
        self.pause_signal.phase.store(WAITING, Ordering::SeqCst);
        let stopped = self.stop_guest(start + limit);
        self.pause_signal.phase.store(IDLE, Ordering::SeqCst);
        if let Err((what, gave_up)) = stopped {
            self.run_guest();
            let waited_ms = elapsed_us(start) / 1000;
            return Err(match gave_up {
                GaveUp::TimedOut => MachineError::PauseTimedOut { what, waited_ms },
                GaveUp::Aborted => MachineError::PauseAborted { what, waited_ms },
            });
        }
        // Every interrupt on its way has arrived.
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.order(Order::Harvest));
        self.running = false;
        self.times = PauseTimes { stop_us: elapsed_us(start), ..PauseTimes::default() };
        Ok(())
    }

    /// The way for another thread to end a pause that waits for a disk or a vCPU, before its limit.
    /// It does not keep the machine alive.
    pub fn pause_abort(&self) -> PauseAbort {
        PauseAbort { signal: Arc::clone(&self.pause_signal) }
    }

    /// Stops everything, in order; or says what has not stopped, and leaves some of it stopped.
    fn stop_guest(&mut self, deadline: Instant) -> Result<(), (String, GaveUp)> {
        let wait = |done: &dyn Fn() -> bool| self.pause_signal.wait(deadline, Duration::ZERO, done);
        self.bus.begin_quiesce_disks();
        wait(&|| self.bus.busy_disk().is_none())
            .map_err(|gave_up| (format!("disk {}", self.bus.busy_disk().unwrap_or(0)), gave_up))?;
        self.bus.begin_quiesce();
        wait(&|| self.bus.net_is_quiet()).map_err(|gave_up| ("the network card".to_owned(), gave_up))?;
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.order(Order::Park));
        let stopped = |vcpu: &Vcpu| {
            let waited = self.pause_signal.wait(deadline, vcpu.spin_max(), || vcpu.has_stopped());
            waited.map_err(|gave_up| (format!("vCPU {}", vcpu.number()), gave_up))
        };
        self.vcpus.iter().try_for_each(stopped)
    }

    /// Lets vCPUs and devices run, whichever of them were stopped.
    pub(super) fn run_guest(&mut self) {
        self.vcpus.iter_mut().for_each(|vcpu| vcpu.order(Order::Run));
        self.bus.unquiesce();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_abort_ends_a_pause_that_waits_and_no_other() {
        let signal = Arc::new(PauseSignal::default());
        let abort = PauseAbort { signal: Arc::clone(&signal) };
        let deadline = Instant::now() + Duration::from_secs(60);
        for _ in 0..500 {
            abort.abort();
            signal.phase.store(WAITING, Ordering::SeqCst);
            let aborting = std::thread::spawn({
                let abort = abort.clone();
                move || abort.abort()
            });
            assert_eq!(signal.wait(deadline, Duration::ZERO, || false), Err(GaveUp::Aborted));
            aborting.join().expect("thread");
            signal.phase.store(WAITING, Ordering::SeqCst);
            assert_eq!(signal.wait(Instant::now(), Duration::ZERO, || false), Err(GaveUp::TimedOut));
            assert_eq!(signal.wait(deadline, Duration::ZERO, || true), Ok(()));
            signal.phase.store(IDLE, Ordering::SeqCst);
        }
    }

    #[test]
    fn whatever_stops_is_noticed() {
        let signal = Arc::new(PauseSignal::default());
        let deadline = Instant::now() + Duration::from_secs(60);
        for _ in 0..500 {
            let stopped = Arc::new(AtomicBool::new(false));
            let stopping = std::thread::spawn({
                let (signal, stopped) = (Arc::clone(&signal), Arc::clone(&stopped));
                move || {
                    stopped.store(true, Ordering::SeqCst);
                    signal.notify();
                }
            });
            assert_eq!(signal.wait(deadline, Duration::ZERO, || stopped.load(Ordering::SeqCst)), Ok(()));
            stopping.join().expect("thread");
        }
    }
}
