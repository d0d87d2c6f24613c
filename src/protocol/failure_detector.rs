//! Heartbeats: when to vouch for this node again, when the peer's silence is too long, and how long
//! this node was asleep itself.

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

/// Says when the heartbeat thread has to be fed again.
///
/// Heartbeats leave from a thread of their own, which repeats the newest one it was given every
/// interval until a deadline: so neither a capture nor a full disk queue delays them, and an engine
/// that hangs is not vouched for much longer than `stall_max`.
#[derive(Clone, Debug)]
pub struct HeartbeatTimer {
    interval: Duration,
    due: Instant,
}

impl HeartbeatTimer {
    /// A timer whose first heartbeat is due at once.
    pub fn new(interval: Duration, now: Instant) -> HeartbeatTimer {
        HeartbeatTimer { interval, due: now }
    }

    /// The heartbeat thread is to be fed at `now`: there is something new to say.
    pub fn feed_at(&mut self, now: Instant) {
        self.due = self.due.min(now);
    }

    /// When the heartbeat thread is to be fed next.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// True if the heartbeat thread is to be fed now.
    pub fn is_due(&mut self, now: Instant) -> bool {
        let due = now >= self.due;
        if due {
            self.due = now + self.interval;
        }
        due
    }

    /// Adds the state to a model checker's digest (see
    /// [`Primary::digest`](super::primary::Primary::digest)).
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let HeartbeatTimer { interval, due } = self;
        (interval, due.since(now)).hash(into);
    }
}

/// Suspects the peer when it is silent for too long. Suspicion decides nothing; the arbiter does.
#[derive(Clone, Debug)]
pub struct FailureDetector {
    timeout: Duration,
    heard: Instant,
    moved: Instant,
    /// Whole epochs that came since the last heartbeat, as far as they count.
    overtaken: u32,
}

/// So many timeouts may pass without a heartbeat while the data connection moves.
const LATE_TIMEOUTS_MAX: u32 = 10;

/// So many whole epochs without a heartbeat between them say that heartbeats are lost, not late:
/// bytes then extend the timeout once and no more. On a slow link a heartbeat waits behind the
/// bytes that were sent before it, never behind an epoch that was captured after it; and each epoch
/// waits for the ack of the one before, so it takes a round trip at least, while a heartbeat that
/// was dropped is there again within two or three, or a few more if it is dropped again. (Four
/// broke pairs on a link of 1 MB/s, whose queue drops what does not fit.)
const OVERTAKEN_MAX: u32 = 16;

impl FailureDetector {
    /// A detector that counts silence from `now`.
    pub fn new(timeout: Duration, now: Instant) -> FailureDetector {
        FailureDetector { timeout, heard: now, moved: now, overtaken: 0 }
    }

    /// A heartbeat arrived.
    pub fn heard(&mut self, now: Instant) {
        self.heard = self.heard.max(now);
        self.overtaken = 0;
    }

    /// A whole epoch arrived on the peer's other connection. After many of them without a heartbeat
    /// bytes extend the timeout only once.
    pub fn overtaken(&mut self) {
        if !mutant::is("overtaken-heartbeats-not-missed") {
            self.overtaken = (self.overtaken + 1).min(OVERTAKEN_MAX);
        }
    }

    /// Bulk arrived on the peer's other connection: a heartbeat may be late then, though not for
    /// ever.
    pub fn moved(&mut self, at: Instant) {
        if !mutant::is("bytes-extend-nothing") {
            self.moved = self.moved.max(at);
        }
    }

    /// This node was asleep: the silence of that time proves nothing, and after a stall nothing
    /// that was heard before it does.
    pub fn slept(&mut self, now: Instant, slept: Slept) {
        if mutant::is("own-sleep-counts") {
            return;
        }
        if slept.stall.is_some() {
            return self.heard(now);
        }
        self.heard = self.heard + slept.unheard;
        self.moved = self.moved + slept.unheard;
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

/// Notices that this node itself was asleep (SIGSTOP, steal time, a frozen host). What it did not
/// hear meanwhile proves nothing, however short the sleep was, so that time is taken off every
/// judgement about others; after a long sleep this node's own right to run the guest is in doubt.
#[derive(Clone, Debug)]
pub struct SleepGuard {
    tick: Duration,
    limit: Duration,
    awake: Instant,
}

/// How long a node was asleep when it should have been awake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slept {
    /// Time in which this node should have looked at its sockets and did not.
    pub unheard: Duration,
    /// The whole gap, if it is as long as the time after which the peer suspects this node.
    pub stall: Option<Duration>,
}

impl SleepGuard {
    /// A guard of a node that is awake at least every `tick`; a gap of `limit` or more between two
    /// looks is a stall.
    pub fn new(tick: Duration, limit: Duration, now: Instant) -> SleepGuard {
        SleepGuard { tick, limit, awake: now }
    }

    /// Looks at the clock: how long the node was asleep, if it was.
    pub fn look(&mut self, now: Instant) -> Option<Slept> {
        let gap = now.since(self.awake);
        self.awake = self.awake.max(now);
        let unheard = gap.checked_sub(self.tick).filter(|unheard| !unheard.is_zero())?;
        Some(Slept { unheard, stall: (gap >= self.limit).then_some(gap) })
    }

    /// Tells a checker the state. How much longer than the limit a stall was changes nothing.
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let SleepGuard { tick, limit, awake } = self;
        (tick, limit, now.since(*awake).min(*limit)).hash(into);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_detector_waits_for_the_whole_timeout() {
        let mut detector = FailureDetector::new(30 * MS, Instant::from_us(0));
        detector.heard(Instant::from_us(10_000));
        detector.heard(Instant::from_us(5_000)); // an older look never shortens the silence allowed
        assert_eq!(detector.suspects(Instant::from_us(39_999)), None);
        assert_eq!(detector.suspects(Instant::from_us(40_000)), Some(30 * MS));
    }

    #[test]
    fn a_link_that_moves_allows_late_heartbeats_for_a_while() {
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
    fn epochs_that_overtake_heartbeats_end_the_allowance() {
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
    fn the_heartbeat_thread_is_fed_once_per_interval() {
        let mut timer = HeartbeatTimer::new(10 * MS, Instant::from_us(0));
        let fed = [0, 9_999, 10_000].map(|us| timer.is_due(Instant::from_us(us)));
        assert_eq!(fed, [true, false, true]);
    }

    #[test]
    fn own_sleep_is_noticed_once_and_a_long_one_is_a_stall() {
        let mut guard = SleepGuard::new(10 * MS, 30 * MS, Instant::from_us(0));
        assert_eq!(guard.look(Instant::from_us(10_000)), None, "it need not be awake more often");
        assert_eq!(guard.look(Instant::from_us(39_000)), Some(Slept { unheard: 19 * MS, stall: None }));
        let long = Slept { unheard: 50 * MS, stall: Some(60 * MS) };
        assert_eq!(guard.look(Instant::from_us(99_000)), Some(long));
        assert_eq!(guard.look(Instant::from_us(99_001)), None);
    }

    #[test]
    fn a_sleep_shorter_than_the_time_out_is_taken_off_the_silence() {
        let mut detector = FailureDetector::new(30 * MS, Instant::from_us(0));
        detector.slept(Instant::from_us(29_000), Slept { unheard: 25 * MS, stall: None });
        assert_eq!(detector.suspects(Instant::from_us(54_999)), None);
        assert!(detector.suspects(Instant::from_us(55_000)).is_some());
    }
}
