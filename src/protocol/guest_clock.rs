//! What a takeover does to the guest's clocks.
//!
//! Between the capture of the epoch a guest goes on from and its first instruction elsewhere lies
//! time in which it did not run. Its clocks may count that time or not. If they do, its wall clock
//! stays right, and its timers fire when they were due, as after any time without a CPU; if they do
//! not, it is behind by so much, at each takeover a little more, until the guest asks a time
//! server. They never go back.
//!
//! The new node counts from when the epoch began to arrive, by its own clock: no two hosts' clocks
//! need to agree. Its first word leaves the old node right after the pause; the time that word was
//! on its way, well under a millisecond on a quiet link, is not counted, so that the guest is never
//! ahead.

use std::time::Duration;

use super::types::Instant;

/// What the operator wants of the guest's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum ClockPolicy {
    /// They count the time of the takeover.
    #[default]
    Correct,
    /// They go on from where they stood.
    Continue,
}

/// The most that clocks are set forward. A takeover that had to wait longer for its arbiter would
/// end more of what watches time in the guest (leases, watchdogs, sessions) than it would put
/// right; its wall clock is left to the guest's time server.
pub const FORWARD_MAX: Duration = Duration::from_secs(10);

/// What a takeover does to the clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockStep {
    /// How far they are set forward.
    pub forward: Duration,
    /// How far they are behind after that, by this takeover.
    pub behind: Duration,
}

/// The step for a guest that goes on at `now` from an epoch that began to arrive at `began`.
pub fn step(policy: ClockPolicy, began: Instant, now: Instant) -> ClockStep {
    let lost = now.since(began);
    match policy {
        ClockPolicy::Correct if lost <= FORWARD_MAX => ClockStep { forward: lost, behind: Duration::ZERO },
        ClockPolicy::Correct | ClockPolicy::Continue => ClockStep { forward: Duration::ZERO, behind: lost },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGAN: Instant = Instant::from_us(7_000_000);

    #[test]
    fn clocks_count_the_takeover_unless_they_shall_not_or_it_took_too_long() {
        let after = |lost| BEGAN + lost;
        let lost = Duration::from_millis(150);
        let forward = ClockStep { forward: lost, behind: Duration::ZERO };
        let left = |lost| ClockStep { forward: Duration::ZERO, behind: lost };
        assert_eq!(step(ClockPolicy::Correct, BEGAN, after(lost)), forward);
        assert_eq!(step(ClockPolicy::Continue, BEGAN, after(lost)), left(lost));
        assert_eq!(step(ClockPolicy::Correct, BEGAN, after(FORWARD_MAX)).forward, FORWARD_MAX);
        let long = FORWARD_MAX + Duration::from_micros(1);
        assert_eq!(step(ClockPolicy::Correct, BEGAN, after(long)), left(long));
    }

    #[test]
    fn clocks_never_go_back() {
        for policy in [ClockPolicy::Correct, ClockPolicy::Continue] {
            let nothing = ClockStep { forward: Duration::ZERO, behind: Duration::ZERO };
            assert_eq!(step(policy, BEGAN, BEGAN.before(Duration::from_secs(1))), nothing);
        }
    }
}
