//! Asks the kernel how a connection is, for [`StallDetector`] to judge.

use std::time::Duration;

use super::link::LinkCloser;
use crate::protocol::stall_detector::{Look, StallDetector};
use crate::protocol::types::Instant;

/// Watches one connection.
#[derive(Debug)]
pub struct LinkWatch {
    closer: LinkCloser,
    judge: StallDetector,
}

impl LinkWatch {
    /// A watch over the connection of `closer`: sent bytes may be without an echo for so long.
    pub fn new(closer: LinkCloser, silence_max: Duration) -> LinkWatch {
        LinkWatch { closer, judge: StallDetector::new(silence_max) }
    }

    /// Looks, if it is time to.
    pub fn look(&mut self, now: Instant) -> Option<Look> {
        if !self.judge.is_due(now) {
            return None;
        }
        // A kernel that does not tell is one whose own limits must do.
        let tcp_info = self.closer.tcp_info()?;
        Some(self.judge.look(now, tcp_info))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::messages::Message;
    use crate::wire::link::tests::pair;

    #[test]
    fn the_kernel_tells_what_came_and_what_is_on_its_way() {
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
