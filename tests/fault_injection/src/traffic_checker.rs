//! The traffic checker: checks every frame that left either host in the guest's name. It knows
//! nothing of mcd.
//!
//! - **I3, one releaser.** Every frame is known by the port it came through. The stream of frames
//!   is cut into *releaser intervals*, in which all come from one host. A takeover is one change;
//!   any other change is two releasers at one time.
//! - **I1, output commit.** What the guest said and acknowledged may never be taken back. The
//!   payload at one TCP sequence number is the same in every transmission, whoever sends it, and an
//!   acknowledgement never goes back. A guest that went on from an older state than one that was
//!   shown would break at least one of these. (A gap is no fault: what was committed and still held
//!   when the host died is a packet the network lost, which the guest sends again.)

use std::collections::{HashMap, VecDeque};

use mcd::testbed::namespaces::HostName;

use crate::packet::{Packet, Segment, flags, parse};

/// Bytes of each flow that are remembered to compare retransmissions with: more than a window of
/// the guest.
const HISTORY_BYTES_MAX: usize = 1 << 18;
/// Violations kept in words.
const WORDS_MAX: usize = 20;

/// Consecutive frames from one host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReleaserInterval {
    /// Through whose port they came.
    pub host: HostName,
    /// How many.
    pub frames: u64,
    /// When the first came, in µs of the monotonic clock.
    pub first_us: u64,
    /// When the last came.
    pub last_us: u64,
}

/// Stands in a history for a byte that was not seen yet.
const UNSEEN: u16 = 0x100;

/// One direction of a TCP connection, as the guest sent it.
#[derive(Debug)]
struct Flow {
    /// The newest bytes, or [`UNSEEN`].
    history: VecDeque<u16>,
    /// The sequence number after the last of them.
    end: u32,
    acknowledged: Option<u32>,
}

/// Checks frames as they come, and counts what is wrong.
#[derive(Debug, Default)]
pub struct TrafficChecker {
    flows: HashMap<(u32, u16), Flow>,
    intervals: Vec<ReleaserInterval>,
    /// Longest time without a frame since the last mark, in µs, and the last frame.
    longest_silence_us: u64,
    last_us: u64,
    frames: u64,
    bytes_compared: u64,
    resets: u64,
    violations: u64,
    words: Vec<String>,
}

/// What was seen since the last mark.
#[derive(Clone, Debug, Default)]
pub struct TrafficReport {
    /// The releaser intervals, the one that lasted at the mark first.
    pub intervals: Vec<ReleaserInterval>,
    /// The longest time without a frame, in µs.
    pub longest_silence_us: u64,
    /// Connections the guest reset.
    pub resets: u64,
    /// How often something was taken back.
    pub violations: u64,
    /// The first few of them.
    pub words: Vec<String>,
}

impl TrafficChecker {
    /// Forgets what was said of the time before `now_us`, not the flows.
    pub fn mark(&mut self, now_us: u64) {
        let last = self.intervals.last().copied();
        self.intervals = last.into_iter().collect();
        (self.longest_silence_us, self.resets, self.violations) = (0, 0, 0);
        self.last_us = now_us;
        self.words.clear();
    }

    /// Forgets every connection: the guest that had them is gone for good.
    pub fn forget_flows(&mut self) {
        self.flows.clear();
        self.intervals.clear();
    }

    /// What was seen since the last mark, up to `now_us`.
    pub fn report(&self, now_us: u64) -> TrafficReport {
        TrafficReport {
            intervals: self.intervals.clone(),
            longest_silence_us: self.longest_silence_us.max(now_us.saturating_sub(self.last_us)),
            resets: self.resets,
            violations: self.violations,
            words: self.words.clone(),
        }
    }

    /// Frames seen and payload bytes that were sent again and compared, since the start.
    pub fn totals(&self) -> (u64, u64) {
        (self.frames, self.bytes_compared)
    }

    /// Takes a frame with the guest's source address that came through the port of `host` at
    /// `at_us`.
    pub fn frame(&mut self, host: HostName, at_us: u64, frame: &[u8]) {
        self.frames += 1;
        self.longest_silence_us = self.longest_silence_us.max(at_us.saturating_sub(self.last_us));
        self.last_us = self.last_us.max(at_us);
        match self.intervals.last_mut() {
            Some(interval) if interval.host == host => {
                interval.frames += 1;
                interval.last_us = at_us;
            }
            _ => self.intervals.push(ReleaserInterval { host, frames: 1, first_us: at_us, last_us: at_us }),
        }
        match parse(frame) {
            Some(Packet::Tcp(segment)) => self.segment(host, &segment),
            Some(Packet::Other(_)) => {}
            None => self.violation(format!("host {host} sent a frame that is none ({} bytes)", frame.len())),
        }
    }

    fn violation(&mut self, what: String) {
        self.violations += 1;
        if self.words.len() < WORDS_MAX {
            self.words.push(what);
        }
    }

    fn segment(&mut self, host: HostName, segment: &Segment<'_>) {
        let key = (u32::from(segment.target.0), segment.target.1);
        if segment.has(flags::RST) {
            // Connections of a guest that is gone are rightly refused by the one that was started
            // in its place.
            self.resets += u64::from(self.flows.remove(&key).is_some());
            return;
        }
        if segment.has(flags::SYN) {
            let end = segment.sequence.wrapping_add(1);
            let repeated = self.flows.get(&key).is_some_and(|flow| flow.end == end);
            if !repeated {
                let (history, acknowledged) = (VecDeque::new(), Some(segment.acknowledged));
                self.flows.insert(key, Flow { history, end, acknowledged });
            }
            return;
        }
        let flow = self.flows.entry(key).or_insert_with(|| Flow {
            // Its beginning was before our time.
            history: VecDeque::new(),
            end: segment.sequence,
            acknowledged: None,
        });
        let (wrongs, compared) = flow.take(segment);
        self.bytes_compared += compared;
        let port = segment.target.1;
        wrongs.into_iter().for_each(|wrong| self.violation(format!("host {host} to port {port}: {wrong}")));
    }
}

/// How far `to` is after `from`, in TCP's wrapping numbers.
fn distance(from: u32, to: u32) -> i32 {
    to.wrapping_sub(from) as i32
}

impl Flow {
    /// What is wrong with a segment, and how many of its bytes had been sent before.
    fn take(&mut self, segment: &Segment<'_>) -> (Vec<String>, u64) {
        let mut wrongs = Vec::new();
        if segment.has(flags::ACK) {
            match self.acknowledged {
                Some(before) if distance(before, segment.acknowledged) < 0 => {
                    let back = -distance(before, segment.acknowledged);
                    wrongs.push(format!("{back} bytes that had been acknowledged are not any more"));
                }
                _ => self.acknowledged = Some(segment.acknowledged),
            }
        }
        let ahead = distance(self.end, segment.sequence);
        match usize::try_from(ahead) {
            Ok(gap) if gap > HISTORY_BYTES_MAX => {
                wrongs.push(format!("{ahead} bytes were left out, more than any window"));
                self.history.clear();
            }
            Ok(gap) => self.history.extend(std::iter::repeat_n(UNSEEN, gap)),
            Err(_) => {}
        }
        // How many of its bytes are old; of these the first few may be older than what is
        // remembered.
        let old = usize::try_from(-ahead.min(0)).unwrap_or(0);
        let (repeated, new) = segment.payload.split_at(old.min(segment.payload.len()));
        let forgotten = old.saturating_sub(self.history.len()).min(repeated.len());
        let from = self.history.len().saturating_sub(old);
        let mut compared = 0;
        for (before, now) in self.history.iter_mut().skip(from).zip(repeated.get(forgotten..).unwrap_or_default()) {
            match *before {
                UNSEEN => *before = u16::from(*now),
                before if before == u16::from(*now) => compared += 1,
                _ => {
                    wrongs.push(format!("bytes at {} differ from those sent before", segment.sequence));
                    break;
                }
            }
        }
        self.history.extend(new.iter().map(|byte| u16::from(*byte)));
        let surplus = self.history.len().saturating_sub(HISTORY_BYTES_MAX);
        self.history.drain(..surplus);
        let reaches = segment.sequence.wrapping_add(u32::try_from(segment.payload.len()).unwrap_or(0));
        let reaches = if segment.has(flags::FIN) { reaches.wrapping_add(1) } else { reaches };
        if distance(self.end, reaches) > 0 {
            self.end = reaches;
        }
        (wrongs, compared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::build::tcp;

    const PORT: u16 = 40_000;

    fn check(frames: &[(HostName, Vec<u8>)]) -> TrafficReport {
        let mut checker = TrafficChecker::default();
        for (at, (host, frame)) in frames.iter().enumerate() {
            checker.frame(*host, at as u64 * 1000, frame);
        }
        checker.report(frames.len() as u64 * 1000)
    }

    fn data(sequence: u32, acknowledged: u32, payload: &[u8]) -> Vec<u8> {
        tcp(PORT, sequence, acknowledged, flags::ACK, payload)
    }

    #[test]
    fn a_takeover_is_one_change_of_the_releaser() {
        let (a, b) = (HostName::A, HostName::B);
        let start = u32::MAX - 5;
        let seen = check(&[
            (a, tcp(PORT, start, 1, flags::SYN | flags::ACK, b"")),
            (a, data(start.wrapping_add(1), 10, b"hello")),
            (a, data(start.wrapping_add(6), 20, b"world")),
            // The new primary repeats what was not acknowledged, cut in another way, and goes on.
            (b, data(start.wrapping_add(4), 20, b"loworld!")),
            (b, data(start.wrapping_add(12), 25, b"")),
        ]);
        assert_eq!((seen.violations, seen.words), (0, vec![]));
        assert_eq!(seen.intervals.iter().map(|r| (r.host, r.frames)).collect::<Vec<_>>(), [(a, 3), (b, 2)]);
        assert_eq!(seen.longest_silence_us, 1000);
    }

    #[test]
    fn two_releasers_at_a_time_show_as_extra_releaser_intervals() {
        let (a, b) = (HostName::A, HostName::B);
        let seen = check(&[(a, data(0, 0, b"")), (b, data(0, 0, b"")), (a, data(0, 0, b""))]);
        assert_eq!(seen.intervals.len(), 3);
    }

    #[test]
    fn a_rollback_of_sent_bytes_or_acks_is_a_violation() {
        let (a, b) = (HostName::A, HostName::B);
        let wrong = |second: Vec<u8>| {
            let seen = check(&[(a, data(100, 50, b"0123456789")), (b, second)]);
            (seen.violations, seen.words.join("; "))
        };
        // Another reply in place of one that was sent.
        assert!(wrong(data(105, 50, b"5x")).1.contains("differ"));
        // A reply that was sent and is not known any more: the guest's numbers go on with other
        // bytes.
        assert!(wrong(data(109, 50, b"new")).1.contains("differ"));
        // A request that was acknowledged and forgotten.
        assert!(wrong(data(110, 49, b"")).1.contains("1 bytes that had been acknowledged"));
        assert!(wrong(data(1 << 20, 50, b"")).1.contains("left out"));
        assert_eq!(wrong(data(100, 50, b"0123456789")).0, 0);
        assert_eq!(wrong(data(90, 50, b"before our time 456789".get(..10).unwrap())).0, 0);
        assert_eq!(wrong(data(98, 50, b"..0123")).0, 0);
        assert_eq!(wrong(data(98, 50, b"..0124")).0, 1);
    }

    #[test]
    fn a_lost_segment_may_come_later_and_is_compared_from_then_on() {
        let a = HostName::A;
        let seen = |last: &[u8]| {
            let frames = [data(100, 50, b"01"), data(105, 50, b"5"), data(102, 50, b"234"), data(100, 50, last)];
            check(&frames.map(|frame| (a, frame))).violations
        };
        assert_eq!((seen(b"012345"), seen(b"012x45"), seen(b"01234x")), (0, 1, 1));
    }

    #[test]
    fn a_reset_is_counted_and_ends_the_flow() {
        let seen = check(&[
            (HostName::A, data(100, 50, b"0123456789")),
            (HostName::A, tcp(PORT, 110, 50, flags::RST, b"")),
            (HostName::A, tcp(PORT, 7, 3, flags::SYN | flags::ACK, b"")),
            (HostName::A, data(8, 3, b"x")),
        ]);
        assert_eq!((seen.resets, seen.violations), (1, 0));
    }
}
