//! The primary's book of epochs: what runs, what is on its way, what is committed, and when the
//! next cut is due.

use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::types::PrimaryConfig;
use crate::protocol::mutant;
use crate::protocol::types::{EpochId, Generation, Instant};

/// At most one epoch is on its way: a second one in flight would not make the first commit sooner.
#[derive(Clone, Debug)]
pub(super) struct Epochs {
    next: EpochId,
    capturing: Option<EpochId>,
    in_flight: Option<EpochId>,
    committed: Option<EpochId>,
    last_capture: Instant,
    output_waits: bool,
    pressed: bool,
}

impl Epochs {
    pub(super) fn new(generation: Generation, now: Instant) -> Epochs {
        Epochs {
            next: EpochId { generation, epoch: 0 },
            capturing: None,
            in_flight: None,
            committed: None,
            last_capture: now,
            output_waits: false,
            pressed: false,
        }
    }

    /// The name of the epoch that runs now.
    pub(super) fn next_id(&self) -> EpochId {
        self.next
    }

    /// The newest committed epoch of this generation.
    pub(super) fn committed(&self) -> Option<EpochId> {
        self.committed
    }

    /// True if nothing is being captured or on its way.
    pub(super) fn idle(&self) -> bool {
        self.capturing.is_none() && self.in_flight.is_none()
    }

    /// True if an epoch is being captured.
    pub(super) fn is_capturing(&self) -> bool {
        self.capturing.is_some()
    }

    /// True if somebody asked for a cut.
    pub(super) fn is_pressed(&self) -> bool {
        self.pressed
    }

    pub(super) fn press(&mut self) {
        self.pressed = true;
    }

    /// Output waits for the end of the running epoch, if that has any. The notice may be late: the
    /// epoch it was of may have been cut, and the next one must not be cut for nothing.
    pub(super) fn output_waiting(&mut self, open_packets: u64) {
        self.output_waits |= open_packets > 0;
    }

    /// When the running epoch is to be cut.
    pub(super) fn due(&self, config: &PrimaryConfig, cuts_on_output: bool) -> Instant {
        let early = self.pressed || (self.output_waits && cuts_on_output);
        self.last_capture + if early { config.interval_min.min(config.interval) } else { config.interval }
    }

    /// A resync begins: the first epoch is cut after one interval.
    pub(super) fn start(&mut self, now: Instant) {
        self.last_capture = now;
        self.abandon();
    }

    /// Cuts the running epoch and names it.
    pub(super) fn begin(&mut self, now: Instant) -> EpochId {
        let id = self.next;
        self.next = id.next();
        self.capturing = Some(id);
        self.last_capture = now;
        self.output_waits = false;
        self.pressed = false;
        id
    }

    /// The epoch was captured and is on its way.
    pub(super) fn captured(&mut self, id: EpochId) {
        if self.capturing == Some(id) {
            self.capturing = None;
            self.in_flight = Some(id);
        }
    }

    /// The capture failed; false if the epoch was given up before.
    pub(super) fn failed(&mut self, id: EpochId, now: Instant) -> bool {
        let current = self.capturing == Some(id);
        if current {
            self.capturing = None;
            self.last_capture = now;
        }
        current
    }

    /// The peer says that it has committed `id`; false if that cannot be.
    pub(super) fn commit(&mut self, id: EpochId) -> bool {
        // A fast ack may overtake the driver's word that the capture is done.
        let expected = self.in_flight.or(self.capturing);
        if expected != Some(id) {
            return false;
        }
        self.in_flight = None;
        self.capturing = None;
        self.committed = Some(if mutant::is("one-epoch-too-many") { id.next() } else { id });
        true
    }

    /// A new generation begins: epochs are numbered from 0 again.
    pub(super) fn begin_generation(&mut self, generation: Generation) {
        self.next = EpochId { generation, epoch: 0 };
        self.capturing = None;
        self.in_flight = None;
        self.committed = None;
        // Output that was held while the pair formed waits on: it is announced only once, and would
        // else wait for the whole interval.
    }

    /// Tells a checker the state (see [`Primary::digest`](super::Primary::digest)). Of the last
    /// capture only what it bars still counts; a checker sets an interval of minutes to say
    /// "never", so all that is as far away is the same.
    pub(super) fn digest<H: Hasher>(&self, config: &PrimaryConfig, now: Instant, into: &mut H) {
        const NEVER: Duration = Duration::from_secs(60);
        let Epochs { next, capturing, in_flight, committed, last_capture, output_waits, pressed } = self;
        (next, capturing, in_flight, committed, output_waits, pressed).hash(into);
        for wait in [config.interval, config.interval_min] {
            (*last_capture + wait).since(now).min(NEVER).hash(into);
        }
    }

    /// Nothing is on its way any more, and nothing of it is committed to anyone.
    pub(super) fn abandon(&mut self) {
        self.capturing = None;
        self.in_flight = None;
        self.committed = None;
        self.output_waits = false;
        self.pressed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_notice_of_output_does_not_cut_an_epoch_that_has_none() {
        let config = PrimaryConfig { interval: Duration::from_secs(1), ..PrimaryConfig::for_tests() };
        let (interval, start) = (config.interval, Instant::from_us(0));
        let mut epochs = Epochs::new(Generation(1), start);
        epochs.begin(start);
        epochs.output_waiting(0);
        assert_eq!(epochs.due(&config, true), start + interval, "what waited was cut with the epoch before");
        epochs.output_waiting(3);
        assert_eq!(epochs.due(&config, true), start + config.interval_min);
        epochs.output_waiting(0);
        assert_eq!(epochs.due(&config, true), start + config.interval_min, "what waits still waits");
        assert_eq!(epochs.due(&config, false), start + interval);
    }
}
