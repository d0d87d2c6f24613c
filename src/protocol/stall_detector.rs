//! Finds out that a connection is stuck: sent bytes are not acknowledged any more.
//!
//! The kernel's own limit (TCP_USER_TIMEOUT) is looked at only when a retransmission is due, which
//! is 200 ms at the earliest and again as long the next time: far too late for a partition that
//! heartbeats on another connection do not show. So the driver asks the kernel when it last heard
//! of the peer on this connection, and the answer is checked here. A link that is slow but moves
//! acknowledges all the time and is never given up, however much waits to be sent and however much
//! of it is lost on the way.
//!
//! When the last bytes of a flight are lost, though, nothing tells the sender's kernel, which waits
//! for its timer: a blip of some ms would be a silence of 200. So a connection that has waited for
//! a while gets a *probe*, a frame without content. If it arrives, the peer's kernel shows that
//! bytes before it are missing, and they are sent again after a round trip.

use std::time::Duration;

use super::types::Instant;

/// How often in the longest silence allowed a connection is looked at.
const LOOKS: u32 = 8;
/// This part of the longest silence allowed passes before the first probe; then there is one at
/// each look.
const PROBE_AFTER: u32 = 4;

/// What the kernel knows of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpInfo {
    /// Bytes are sent and not acknowledged.
    pub on_their_way: bool,
    /// How long ago anything came from the peer, bytes or acknowledgements.
    pub heard_ago: Duration,
    /// How long ago the peer's last bytes came.
    pub received_ago: Duration,
}

/// What a look showed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Bytes are on their way and nothing has come back for so long, which is longer than allowed.
    pub stuck: Option<Duration>,
    /// Bytes have been on their way for so long that they may be lost: probe the connection.
    pub probe: bool,
    /// The peer's newest bytes came so long ago; there were none yet at the last look.
    pub received: Option<Duration>,
}

/// Watches one connection.
#[derive(Clone, Debug)]
pub struct StallDetector {
    silence_max: Duration,
    looked: Option<Instant>,
    /// Since when something is on its way and the peer sends nothing.
    waiting_since: Option<Instant>,
}

impl StallDetector {
    /// A detector that lets sent bytes be unacknowledged for at most `silence_max`.
    pub fn new(silence_max: Duration) -> StallDetector {
        StallDetector { silence_max, looked: None, waiting_since: None }
    }

    /// Whether it is time to look.
    pub fn is_due(&self, now: Instant) -> bool {
        self.looked.is_none_or(|looked| now.since(looked) >= self.silence_max / LOOKS)
    }

    /// Checks what the kernel knows at `now`.
    pub fn look(&mut self, now: Instant, tcp_info: TcpInfo) -> Look {
        let since_look = self.looked.map_or(Duration::MAX, |looked| now.since(looked));
        self.looked = Some(now);
        if !tcp_info.on_their_way || since_look >= self.silence_max {
            // In the second case this node was stalled (or its whole host was): the silence proves
            // nothing.
            self.waiting_since = None;
        }
        let mut look =
            Look { received: (tcp_info.received_ago < since_look).then_some(tcp_info.received_ago), ..Look::default() };
        if tcp_info.on_their_way {
            let heard = now.before(tcp_info.heard_ago);
            let since = self.waiting_since.map_or(now, |since| since.max(heard));
            self.waiting_since = Some(since);
            let silence = now.since(since);
            look.stuck = (silence >= self.silence_max).then_some(silence);
            look.probe = look.stuck.is_none() && silence >= self.silence_max / PROBE_AFTER;
        }
        look
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A look `now` ms after the start, at a connection over which the peer sends nothing.
    fn look(detector: &mut StallDetector, now: u64, on_their_way: bool, heard_ago: u64) -> Look {
        let tcp_info = TcpInfo { on_their_way, heard_ago: ms(heard_ago), received_ago: Duration::MAX };
        detector.look(Instant::from_us(now * 1000), tcp_info)
    }

    fn stuck(after: u64) -> Look {
        Look { stuck: Some(ms(after)), ..Look::default() }
    }

    const PROBE: Look = Look { stuck: None, probe: true, received: None };

    #[test]
    fn only_silence_with_bytes_on_their_way_is_too_long() {
        let mut detector = StallDetector::new(ms(150));
        // Idle before, however long: the time counts from the first look that finds something on
        // its way.
        assert_eq!(look(&mut detector, 10_000, true, 9_000), Look::default());
        assert_eq!(look(&mut detector, 10_100, true, 9_100), PROBE);
        // An echo in between, though the newest bytes are still on their way.
        assert_eq!(look(&mut detector, 10_149, true, 30), Look::default());
        assert_eq!(look(&mut detector, 10_268, true, 149), PROBE);
        assert_eq!(look(&mut detector, 10_269, true, 150), stuck(150));
        assert_eq!(look(&mut detector, 10_270, false, 151), Look::default());
        assert_eq!(look(&mut detector, 10_400, true, 281), Look::default());
    }

    #[test]
    fn who_slept_blames_nobody() {
        let mut detector = StallDetector::new(ms(150));
        assert_eq!(look(&mut detector, 100, true, 0), Look::default());
        assert_eq!(look(&mut detector, 1_000, true, 900), Look::default());
        assert_eq!(look(&mut detector, 1_100, true, 1_000), PROBE);
        assert_eq!(look(&mut detector, 1_150, true, 1_050), stuck(150));
    }

    #[test]
    fn bytes_of_the_peer_are_told_once() {
        let mut detector = StallDetector::new(ms(160));
        let received = |detector: &mut StallDetector, now: u64, ago: u64| {
            let tcp_info = TcpInfo { on_their_way: false, heard_ago: ms(ago), received_ago: ms(ago) };
            detector.look(Instant::from_us(now * 1000), tcp_info).received
        };
        assert!(detector.is_due(Instant::from_us(0)));
        assert_eq!(received(&mut detector, 1_000, 15), Some(ms(15)));
        assert!(!detector.is_due(Instant::from_us(1_019_999)) && detector.is_due(Instant::from_us(1_020_000)));
        assert_eq!(received(&mut detector, 1_020, 35), None);
        assert_eq!(received(&mut detector, 1_040, 5), Some(ms(5)));
    }
}
