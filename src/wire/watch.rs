//! Notices a connection whose bytes do not arrive any more.
//!
//! The kernel's own limit (TCP_USER_TIMEOUT) is looked at only when a retransmission is due, which is 200 ms at the earliest and again as
//! long the next time: far too late for a cut that heartbeats on another connection do not show. So the kernel is asked how far the
//! peer has acknowledged. A link that is slow but moves acknowledges all the time and is never given up, however much waits to be sent.

use std::time::Duration;

use super::link::LinkCloser;

/// How often in the longest time allowed the kernel is asked.
const LOOKS: u64 = 8;

/// Judges one connection. Its times are those of the caller's clock, in microseconds.
#[derive(Debug)]
pub struct LinkWatch {
    closer: LinkCloser,
    unacknowledged_max_us: u64,
    looked_us: Option<u64>,
    /// How far the peer had acknowledged while something was on its way, and when that was first seen.
    stuck: Option<(u64, u64)>,
}

impl LinkWatch {
    /// A watch over the connection of `closer`: sent bytes may stay unacknowledged for so long.
    pub fn new(closer: LinkCloser, unacknowledged_max: Duration) -> LinkWatch {
        let unacknowledged_max_us = u64::try_from(unacknowledged_max.as_micros()).unwrap_or(u64::MAX);
        LinkWatch { closer, unacknowledged_max_us, looked_us: None, stuck: None }
    }

    /// Looks, if it is time to; for how long nothing has arrived, in microseconds, if that is too long.
    pub fn look(&mut self, now_us: u64) -> Option<u64> {
        let since_look_us = self.looked_us.map_or(u64::MAX, |looked_us| now_us.saturating_sub(looked_us));
        if since_look_us < self.unacknowledged_max_us / LOOKS {
            return None;
        }
        if since_look_us >= self.unacknowledged_max_us {
            // We stood still ourselves (or our whole host did): what we remember proves nothing.
            self.stuck = None;
        }
        self.looked_us = Some(now_us);
        self.judge(now_us, self.closer.on_its_way())
    }

    /// `acknowledged` is how far the peer has acknowledged, if something is on its way to it.
    fn judge(&mut self, now_us: u64, acknowledged: Option<u64>) -> Option<u64> {
        let acknowledged = match acknowledged {
            Some(acknowledged) => acknowledged,
            None => {
                self.stuck = None;
                return None;
            }
        };
        match self.stuck {
            Some((before, since_us)) if before == acknowledged => {
                let stuck_us = now_us.saturating_sub(since_us);
                (stuck_us >= self.unacknowledged_max_us).then_some(stuck_us)
            }
            _ => {
                self.stuck = Some((acknowledged, now_us));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::messages::Message;
    use crate::wire::link::{Link, Listener};

    fn pair() -> (Link, Link) {
        let listener = Listener::bind("127.0.0.1:0").unwrap();
        let there = listener.local_address().to_string();
        let near = Link::connect(&there, Duration::from_secs(10)).unwrap();
        (near, listener.accept().unwrap())
    }

    #[test]
    fn only_a_link_that_stands_still_with_bytes_on_their_way_is_given_up() {
        let (near, _far) = pair();
        let mut watch = LinkWatch::new(near.closer(), Duration::from_millis(150));
        assert_eq!(watch.judge(0, None), None);
        assert_eq!(watch.judge(10_000_000, Some(5)), None, "idle before, however long");
        assert_eq!(watch.judge(10_149_999, Some(5)), None);
        assert_eq!(watch.judge(10_150_000, Some(6)), None, "it moved");
        assert_eq!(watch.judge(10_299_999, Some(6)), None);
        assert_eq!(watch.judge(10_300_000, Some(6)), Some(150_000));
        assert_eq!(watch.judge(10_300_001, None), None);
        assert_eq!(watch.judge(99_000_000, Some(6)), None);
    }

    #[test]
    fn the_kernel_tells_what_is_on_its_way() {
        let (near, far) = pair();
        let closer = near.closer();
        assert_eq!(closer.on_its_way(), None);
        let (_, mut writer) = near.split();
        let (mut reader, _) = far.split();
        writer.write_message(&Message::Bye { reason: "test".into() }).unwrap();
        reader.read().unwrap();
        // Loopback acknowledges at once or after a delay; either way everything is acknowledged in the end.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while closer.on_its_way().is_some() {
            assert!(std::time::Instant::now() < deadline, "never acknowledged");
            std::thread::yield_now();
        }
        let mut watch = LinkWatch::new(closer, Duration::from_millis(150));
        assert_eq!(watch.look(0), None);
        assert_eq!(watch.look(1_000_000), None);
    }
}
