//! What the images of a guest's disks are worth when the node that ran it ends, and what becomes of
//! a snapshot that the guest was to stop with.

use std::time::Duration;

use super::{End, Primary};
use crate::protocol::types::EpochId;

/// What came of stopping the guest and of writing what was held for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LastWrites {
    /// Its vCPUs and devices stopped: nothing writes to its disks any more.
    pub guest_stopped: bool,
    /// Nothing that had to be written to shared storage is left.
    pub drained: bool,
}

/// What is written down of a guest as its node ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LastStamp {
    /// The images of its disks are stamped as whole at this epoch; if none, they keep their stamp.
    pub at: Option<EpochId>,
    /// A snapshot that was written as the guest stopped for good is of this very moment: the stamp
    /// names it, and whoever asked for it hears so.
    pub with_snapshot: bool,
}

impl Primary {
    /// How long the peer may take for the last messages to it. One that takes nothing for so long
    /// would be suspected; it needs no word of why this node ends.
    pub fn goodbye_timeout(&self) -> Duration {
        self.config.heartbeat.timeout
    }

    /// How long shared storage may take for the guest's last writes before the node ends so; `None`
    /// if they are not this node's to write.
    pub fn drain_timeout(&self, end: &End) -> Option<Duration> {
        match end {
            // Nobody else has them, or ever will.
            End::GuestOver { .. } => Some(self.config.drain_timeout),
            // The secondary kept what was committed, and the rest was never acknowledged.
            End::Quit | End::Fenced | End::GuestFailed(_) => None,
        }
    }

    /// What is written down when all of that is done.
    pub fn last_stamp(&self, end: &End, writes: LastWrites) -> LastStamp {
        // Of a guest that was fenced or failed another node has the newer image. A guest that did
        // not stop may write after the stamp.
        let is_left_whole = matches!(end, End::GuestOver { .. } | End::Quit) && writes.guest_stopped;
        // With the record's generation: that is newer than the epoch's where the guest was stopped
        // on record, and with an older one the image would be taken for outdated.
        let at = EpochId { generation: self.generation(), ..self.running_epoch() };
        LastStamp {
            // Writes that were not drained are lost as in a loss of power: the image is whole.
            at: is_left_whole.then_some(at),
            // A snapshot is of the images' last moment only if they have all of it, and the guest
            // is over only if that is on record: a node that just ends may leave it to another one.
            with_snapshot: is_left_whole && writes.drained && matches!(end, End::GuestOver { .. }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::PrimaryConfig;
    use super::*;
    use crate::protocol::record::Record;
    use crate::protocol::types::{InstanceId, Instant};

    const OVER: End = End::GuestOver { restart: false };

    fn primary() -> Primary {
        let me = InstanceId(1);
        let mut primary = Primary::new(PrimaryConfig::for_tests(), me, Record::first(me), Instant::from_us(0));
        // As when the arbiter has it on record that the guest is over: no epoch is of that
        // generation.
        primary.record = primary.record.next_stopped();
        primary
    }

    fn left(end: &End, guest_stopped: bool, drained: bool) -> (bool, bool) {
        let stamp = primary().last_stamp(end, LastWrites { guest_stopped, drained });
        (stamp.at.is_some(), stamp.with_snapshot)
    }

    #[test]
    fn images_are_stamped_whole_where_the_guest_left_them_in_order() {
        for end in [OVER, End::GuestOver { restart: true }, End::Quit] {
            assert!(left(&end, true, true).0 && left(&end, true, false).0, "{end:?}");
            assert_eq!(left(&end, false, true), (false, false), "{end:?}: it may still write");
        }
        for end in [End::Fenced, End::GuestFailed("why".into())] {
            assert_eq!(left(&end, true, true), (false, false), "{end:?}");
        }
        let writes = LastWrites { guest_stopped: true, drained: true };
        let at = primary().last_stamp(&OVER, writes).at;
        assert_eq!(at.map(|at| (at.generation, at.epoch)), Some((primary().generation(), 0)));
    }

    #[test]
    fn a_snapshot_stands_only_for_a_guest_that_is_over_on_record_with_all_its_writes() {
        assert_eq!(left(&OVER, true, true), (true, true));
        assert_eq!(left(&OVER, true, false), (true, false), "the images are not what it says of them");
        assert_eq!(left(&OVER, false, true), (false, false));
        assert_eq!(left(&End::Quit, true, true), (true, false), "the guest may go on elsewhere");
    }

    #[test]
    fn only_a_guest_that_is_over_waits_for_shared_storage() {
        let primary = primary();
        assert_eq!(primary.drain_timeout(&OVER), Some(primary.config.drain_timeout));
        for end in [End::Quit, End::Fenced, End::GuestFailed("why".into())] {
            assert_eq!(primary.drain_timeout(&end), None, "{end:?}");
        }
    }
}
