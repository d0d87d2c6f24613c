//! Heartbeats: when to send one, when a silence is too long, and when it was *we* who slept.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::mutant;
use super::types::Instant;

/// How often heartbeats go out and how long a silence may last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeartbeatConfig {
    /// Time between two heartbeats.
    pub interval: Duration,
    /// Silence after which the peer is suspected; also the longest a node may have slept without
    /// asking the arbiter.
    pub timeout: Duration,
}

/// Says when the next heartbeat is due and gives it its number.
#[derive(Clone, Debug)]
pub struct HeartbeatTimer {
    interval: Duration,
    due: Instant,
    sequence: u64,
}

impl HeartbeatTimer {
    /// A pulse whose first heartbeat is due at once.
    pub fn new(interval: Duration, now: Instant) -> HeartbeatTimer {
        HeartbeatTimer { interval, due: now, sequence: 0 }
    }

    /// When the next heartbeat is due.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// The number of the heartbeat to send now, if one is due.
    pub fn beat(&mut self, now: Instant) -> Option<u64> {
        if now < self.due {
            return None;
        }
        self.due = now + self.interval;
        self.sequence += 1;
        Some(self.sequence)
    }

    /// Tells a checker the state (see [`Primary::digest`](super::primary::Primary::digest)). A
    /// heartbeat's number changes nothing.
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let HeartbeatTimer { interval, due, sequence: _ } = self;
        (interval, due.since(now)).hash(into);
    }
}

/// Judges the peer's silence. It only suspects; the arbiter decides.
#[derive(Clone, Debug)]
pub struct FailureDetector {
    timeout: Duration,
    heard: Instant,
    moved: Instant,
    /// Whole epochs that came since the last heartbeat, as far as they count.
    overtaken: u32,
}

/// So many time-outs may pass without a heartbeat while the data connection moves.
const LATE_TIMEOUTS_MAX: u32 = 10;

/// So many whole epochs without a heartbeat between them say that heartbeats are lost, not late:
/// bytes then excuse one time-out and no more. On a slow link a heartbeat waits behind the bytes
/// that were sent before it, never behind an epoch that was captured after it; and each epoch waits
/// for the ack of the one before, so it takes a round trip at least, while a heartbeat that was
/// dropped is there again within two or three, or a few more if it is dropped again. (Four broke
/// pairs on a link of 1 MB/s, whose queue drops what does not fit.)
const OVERTAKEN_MAX: u32 = 16;

impl FailureDetector {
    /// A judge that counts silence from `now`.
    pub fn new(timeout: Duration, now: Instant) -> FailureDetector {
        FailureDetector { timeout, heard: now, moved: now, overtaken: 0 }
    }

    /// A heartbeat arrived.
    pub fn heard(&mut self, now: Instant) {
        self.heard = self.heard.max(now);
        self.overtaken = 0;
    }

    /// A whole epoch arrived on the peer's other connection. After many of them without a heartbeat
    /// bytes excuse little.
    pub fn overtaken(&mut self) {
        if !mutant::is("overtaken-heartbeats-excused") {
            self.overtaken = (self.overtaken + 1).min(OVERTAKEN_MAX);
        }
    }

    /// Bulk arrived on the peer's other connection: it excuses a heartbeat that is late, though not
    /// for ever.
    pub fn moved(&mut self, at: Instant) {
        if !mutant::is("bytes-excuse-nothing") {
            self.moved = self.moved.max(at);
        }
    }

    /// When the peer becomes suspect if nothing more is heard.
    pub fn deadline(&self) -> Instant {
        self.heard.max(self.moved.min(self.late_until())) + self.timeout
    }

    fn late_until(&self) -> Instant {
        match self.overtaken {
            OVERTAKEN_MAX.. => self.heard + self.timeout,
            _ => self.heard + self.timeout * (LATE_TIMEOUTS_MAX - 1),
        }
    }

    /// The silence so far, if it is longer than allowed.
    pub fn suspects(&self, now: Instant) -> Option<Duration> {
        (now >= self.deadline()).then(|| now.since(self.heard))
    }

    /// Tells a checker the state. How long ago the silence became too long changes nothing.
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let FailureDetector { timeout, heard: _, moved: _, overtaken } = self;
        (timeout, self.deadline().since(now), self.late_until().since(now), overtaken).hash(into);
    }
}

/// Notices that this node itself stood still (SIGSTOP, a frozen host): then what it remembers
/// hearing proves nothing.
#[derive(Clone, Debug)]
pub struct SleepGuard {
    limit: Duration,
    awake: Instant,
}

impl SleepGuard {
    /// A guard that calls a gap of `limit` or more between two looks a stall. The driver looks at
    /// least every heartbeat interval.
    pub fn new(limit: Duration, now: Instant) -> SleepGuard {
        SleepGuard { limit, awake: now }
    }

    /// Looks at the clock; the length of the stall that just ended, if there was one.
    pub fn look(&mut self, now: Instant) -> Option<Duration> {
        let gap = now.since(self.awake);
        self.awake = self.awake.max(now);
        (gap >= self.limit).then_some(gap)
    }

    /// Tells a checker the state. How much longer than the limit a stall was changes nothing.
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let SleepGuard { limit, awake } = self;
        (limit, now.since(*awake).min(*limit)).hash(into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_judge_waits_for_the_whole_time_out() {
        let mut detector = FailureDetector::new(30 * MS, Instant::from_us(0));
        detector.heard(Instant::from_us(10_000));
        detector.heard(Instant::from_us(5_000)); // an older look never shortens the silence allowed
        assert_eq!(detector.suspects(Instant::from_us(39_999)), None);
        assert_eq!(detector.suspects(Instant::from_us(40_000)), Some(30 * MS));
    }

    #[test]
    fn a_link_that_moves_excuses_late_heartbeats_for_a_while() {
        let at = |ms: u64| Instant::from_us(ms * 1000);
        let mut detector = FailureDetector::new(30 * MS, at(0));
        detector.moved(at(20));
        assert_eq!((detector.suspects(at(49)), detector.suspects(at(50))), (None, Some(50 * MS)));
        detector.moved(at(10));
        detector.moved(at(1000));
        assert_eq!((detector.suspects(at(299)), detector.suspects(at(300))), (None, Some(300 * MS)));
        detector.heard(at(301));
        assert_eq!(detector.suspects(at(600)), None);
    }

    #[test]
    fn epochs_that_overtake_heartbeats_end_the_excuse() {
        let at = |ms: u64| Instant::from_us(ms * 1000);
        let mut detector = FailureDetector::new(30 * MS, at(0));
        for _ in 1..OVERTAKEN_MAX {
            detector.overtaken();
        }
        detector.moved(at(70));
        assert_eq!(detector.suspects(at(99)), None);
        detector.overtaken();
        assert_eq!((detector.suspects(at(59)), detector.suspects(at(60))), (None, Some(60 * MS)));
        detector.heard(at(71));
        detector.moved(at(160));
        assert_eq!(detector.suspects(at(189)), None, "a heartbeat begins the count anew");
    }

    #[test]
    fn a_pulse_beats_once_per_interval() {
        let mut timer = HeartbeatTimer::new(10 * MS, Instant::from_us(0));
        assert_eq!(timer.beat(Instant::from_us(0)), Some(1));
        assert_eq!(timer.beat(Instant::from_us(9_999)), None);
        assert_eq!(timer.beat(Instant::from_us(10_000)), Some(2));
    }

    #[test]
    fn a_stall_is_noticed_once() {
        let mut guard = SleepGuard::new(30 * MS, Instant::from_us(0));
        assert_eq!(guard.look(Instant::from_us(29_000)), None);
        assert_eq!(guard.look(Instant::from_us(89_000)), Some(60 * MS));
        assert_eq!(guard.look(Instant::from_us(89_001)), None);
    }
}
