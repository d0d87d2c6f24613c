//! The clocks a node reads, and the only place where it reads them.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::protocol::types::Instant;

/// Now, for the protocol: boot time, which also counts while the host sleeps, so that a suspended
/// host is a stalled one.
pub fn now() -> Instant {
    Instant::from_us(read_us(ClockId::CLOCK_BOOTTIME))
}

/// Now on `CLOCK_MONOTONIC`, in microseconds: what reports carry, so that other processes of this
/// host can compare.
pub fn monotonic_us() -> u64 {
    read_us(ClockId::CLOCK_MONOTONIC)
}

/// How long until `deadline`; zero if it passed.
pub fn until(deadline: Instant) -> Duration {
    deadline.since(now())
}

fn read_us(clock: ClockId) -> u64 {
    // Reading a clock that every supported kernel has cannot fail; a zero here would look like a
    // stall and be checked.
    clock_gettime(clock).map_or(0, |time| u64::try_from(Duration::from(time).as_micros()).unwrap_or(u64::MAX))
}

/// Lets this thread's timed waits end on time (75 µs late becomes 25 µs late).
pub fn sharpen_timers() {
    if let Err(error) = nix::sys::prctl::set_timerslack(1) {
        tracing::debug!(%error, "timer slack stays as it is");
    }
}
