//! Notices a connection whose bytes do not arrive any more.
//!
//! The kernel's own limit (TCP_USER_TIMEOUT) is looked at only when a retransmission is due, which is 200 ms at the earliest and again as
//! long the next time: far too late for a cut that heartbeats on another connection do not show. So the kernel is asked when it last heard
//! of the peer on this connection. A link that is slow but moves acknowledges all the time and is never given up, however much waits to be
//! sent and however much of it is lost on the way.
//!
//! When the last bytes of a flight are lost, though, nothing tells the sender's kernel, which waits for its timer: a blip of some ms would
//! be a silence of 200. So a connection that has waited for a while gets a *nudge*, a frame that says nothing. If it arrives, the peer's
//! kernel shows that bytes before it are missing, and they are sent again after a round trip.

use std::time::Duration;

use super::link::LinkCloser;

/// How often in the longest silence allowed the kernel is asked.
const LOOKS: u64 = 8;
/// This part of the longest silence allowed passes before the first nudge; then there is one at each look.
const NUDGE_AFTER: u64 = 4;

/// Judges one connection. Its times are those of the caller's clock, in microseconds.
#[derive(Debug)]
pub struct LinkWatch {
    closer: LinkCloser,
    silence_max_us: u64,
    looked_us: Option<u64>,
    /// Since when something is on its way without a word from the peer.
    waiting_since_us: Option<u64>,
    wants_nudge: bool,
}

/// What a look showed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkNews {
    /// Bytes are on their way and nothing has come back for so long, in microseconds: longer than allowed.
    Stuck(u64),
    /// The peer's newest bytes came so long ago, in microseconds; there were none yet at the last look.
    Received(u64),
}

/// What the kernel knows of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LinkVitals {
    /// Segments are sent and not acknowledged.
    pub on_their_way: bool,
    /// How long ago anything came from the peer, bytes or acknowledgements, in microseconds.
    pub heard_ago_us: u64,
    /// How long ago the peer's last bytes came, in microseconds.
    pub received_ago_us: u64,
}

impl LinkWatch {
    /// A watch over the connection of `closer`: sent bytes may be without an echo for so long.
    pub fn new(closer: LinkCloser, silence_max: Duration) -> LinkWatch {
        let silence_max_us = u64::try_from(silence_max.as_micros()).unwrap_or(u64::MAX);
        LinkWatch { closer, silence_max_us, looked_us: None, waiting_since_us: None, wants_nudge: false }
    }

    /// Looks, if it is time to.
    pub fn look(&mut self, now_us: u64) -> Option<LinkNews> {
        let since_look_us = self.looked_us.map_or(u64::MAX, |looked_us| now_us.saturating_sub(looked_us));
        if since_look_us < self.silence_max_us / LOOKS {
            return None;
        }
        // A kernel that does not tell is one whose own limits must do.
        let vitals = self.closer.vitals()?;
        self.judge(now_us, since_look_us, vitals)
    }

    /// True once after a look that found bytes on their way for so long that they may be lost: the connection should be nudged.
    pub fn take_nudge(&mut self) -> bool {
        std::mem::take(&mut self.wants_nudge)
    }

    fn judge(&mut self, now_us: u64, since_look_us: u64, vitals: LinkVitals) -> Option<LinkNews> {
        self.looked_us = Some(now_us);
        if !vitals.on_their_way || since_look_us >= self.silence_max_us {
            // In the second case we stood still ourselves (or our whole host did): the silence proves nothing.
            self.waiting_since_us = None;
        }
        if vitals.on_their_way {
            let heard_us = now_us.saturating_sub(vitals.heard_ago_us);
            let since_us = self.waiting_since_us.map_or(now_us, |since_us| since_us.max(heard_us));
            self.waiting_since_us = Some(since_us);
            let silence_us = now_us.saturating_sub(since_us);
            if silence_us >= self.silence_max_us {
                return Some(LinkNews::Stuck(silence_us));
            }
            self.wants_nudge = silence_us >= self.silence_max_us / NUDGE_AFTER;
        }
        (vitals.received_ago_us < since_look_us).then_some(LinkNews::Received(vitals.received_ago_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::messages::Message;
    use crate::wire::link::tests::pair;

    const MS: u64 = 1000;

    /// A look after `since_look` ms, `now` ms after the start; the rest in ms as well.
    fn look(watch: &mut LinkWatch, now: u64, on_their_way: bool, heard_ago: u64) -> Option<LinkNews> {
        let since_us = watch.looked_us.map_or(20 * MS, |looked_us| now * MS - looked_us);
        let vitals = LinkVitals { on_their_way, heard_ago_us: heard_ago * MS, received_ago_us: 3_600_000 * MS };
        watch.judge(now * MS, since_us, vitals)
    }

    #[test]
    fn only_silence_with_bytes_on_their_way_is_too_long() {
        let (near, _far) = pair();
        let mut watch = LinkWatch::new(near.closer(), Duration::from_millis(150));
        // Idle before, however long: the time counts from the first look that finds something on its way.
        assert_eq!(look(&mut watch, 10_000, true, 9_000), None);
        assert!(!watch.take_nudge());
        assert_eq!(look(&mut watch, 10_100, true, 9_100), None);
        assert!(watch.take_nudge() && !watch.take_nudge());
        // An echo in between, though the newest bytes are still on their way.
        assert_eq!(look(&mut watch, 10_149, true, 30), None);
        assert!(!watch.take_nudge());
        assert_eq!(look(&mut watch, 10_268, true, 149), None);
        assert_eq!(look(&mut watch, 10_269, true, 150), Some(LinkNews::Stuck(150 * MS)));
        assert_eq!(look(&mut watch, 10_270, false, 151), None);
        assert_eq!(look(&mut watch, 10_400, true, 281), None);
    }

    #[test]
    fn a_watch_that_slept_itself_blames_nobody() {
        let (near, _far) = pair();
        let mut watch = LinkWatch::new(near.closer(), Duration::from_millis(150));
        assert_eq!(look(&mut watch, 100, true, 0), None);
        assert_eq!(look(&mut watch, 1_000, true, 900), None);
        assert_eq!(look(&mut watch, 1_100, true, 1_000), None);
        assert_eq!(look(&mut watch, 1_150, true, 1_050), Some(LinkNews::Stuck(150 * MS)));
    }

    #[test]
    fn the_kernel_tells_what_came_and_what_is_on_its_way() {
        let (near, far) = pair();
        let (near_closer, far_closer) = (near.closer(), far.closer());
        let (_, mut writer) = near.split();
        let (mut reader, _) = far.split();
        writer.write_message(&Message::Bye { reason: "test".into() }).unwrap();
        reader.read().unwrap();
        assert!(far_closer.vitals().unwrap().received_ago_us < 60_000 * MS);
        // Loopback acknowledges at once or after a delay; either way everything is acknowledged in the end.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while near_closer.vitals().unwrap().on_their_way {
            assert!(std::time::Instant::now() < deadline, "never acknowledged");
            std::thread::yield_now();
        }
    }
}
