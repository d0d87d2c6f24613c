//! Reads a connection's `tcp_info` from the kernel, for [`StallDetector`] to check.

use std::time::Duration;

use super::link::LinkCloser;
use crate::protocol::stall_detector::{Look, StallDetector};
use crate::protocol::types::Instant;

/// Watches one connection.
#[derive(Debug)]
pub struct LinkWatch {
    closer: LinkCloser,
    detector: StallDetector,
}

impl LinkWatch {
    /// A watch over the connection of `closer`: sent bytes may be unacknowledged for at most
    /// `silence_max`.
    pub fn new(closer: LinkCloser, silence_max: Duration) -> LinkWatch {
        LinkWatch { closer, detector: StallDetector::new(silence_max) }
    }

    /// Looks, if it is time to.
    pub fn look(&mut self, now: Instant) -> Option<Look> {
        if !self.detector.is_due(now) {
            return None;
        }
        // Without `tcp_info` the kernel's own limits must do.
        let tcp_info = self.closer.tcp_info()?;
        Some(self.detector.look(now, tcp_info))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::messages::Message;
    use crate::wire::link::tests::pair;

    #[test]
    fn tcp_info_has_what_arrived_and_what_is_in_flight() {
        let (near, far) = pair();
        let (near_closer, far_closer) = (near.closer(), far.closer());
        let (_, mut writer) = near.split();
        let (mut reader, _) = far.split();
        writer.write_message(&Message::Bye { reason: "test".into() }).unwrap();
        reader.read().unwrap();
        assert!(far_closer.tcp_info().unwrap().received_ago < Duration::from_secs(60));
        // Loopback acknowledges at once or after a delay; either way everything is acknowledged in
        // the end.
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        while near_closer.tcp_info().unwrap().on_their_way {
            assert!(std::time::Instant::now() < deadline, "never acknowledged");
            std::thread::yield_now();
        }
    }
}
