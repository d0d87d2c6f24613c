//! Numbers about epochs: a bounded log of the newest ones and histograms over all of them.

use std::collections::VecDeque;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::status::EpochCounts;

/// Median, 99th percentile and largest of something; the unit is in the name of the field that
/// holds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half are at most this.
    pub p50: u64,
    /// 99 in 100 are at most this.
    pub p99: u64,
    /// The largest.
    pub max: u64,
}

/// One committed epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochSample {
    /// Counts the committed epochs of this node from 0, over all generations: the log gives it.
    pub index: u64,
    /// How long the capture stopped the guest, in microseconds.
    pub pause_us: u64,
    /// From the start of the pause to the ack, in microseconds.
    pub commit_us: u64,
    /// Pages it held.
    pub dirty_pages: u64,
    /// Bytes it took on the wire.
    pub wire_bytes: u64,
    /// How long its oldest packet was held, in microseconds; 0 if it had none.
    pub hold_us: u64,
}

/// The answer to `mc-query-epochs {"since": N}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochsReply {
    /// What to ask for next time.
    pub next: u64,
    /// Samples that were asked for and are not kept any more.
    pub lost: u64,
    /// The samples, oldest first.
    pub epochs: Vec<EpochSample>,
}

/// How a number was distributed over all epochs, within 0.1 %; the largest value exactly.
struct Distribution {
    histogram: Histogram<u64>,
    max: u64,
}

impl Distribution {
    /// Above this all values count as equal; as microseconds it is twelve days.
    const VALUE_MAX: u64 = 1 << 40;

    fn new() -> Distribution {
        // The only errors are about the bounds, and these are constants: no input can bring one
        // about.
        let histogram = Histogram::new_with_bounds(1, Self::VALUE_MAX, 3).expect("constant bounds are accepted");
        Distribution { histogram, max: 0 }
    }

    fn record(&mut self, value: u64) {
        self.histogram.saturating_record(value);
        self.max = self.max.max(value);
    }

    fn quantiles(&self) -> Quantiles {
        let at = |quantile| self.histogram.value_at_quantile(quantile).min(self.max);
        Quantiles { p50: at(0.5), p99: at(0.99), max: self.max }
    }
}

/// What a node remembers of its epochs. Its size is bounded: the newest samples and a few
/// histograms.
pub struct EpochLog {
    samples: VecDeque<EpochSample>,
    samples_max: usize,
    counts: EpochCounts,
    wire_bytes: u64,
    pause_us: Distribution,
    commit_us: Distribution,
    dirty_pages: Distribution,
    hold_us: Distribution,
}

impl EpochLog {
    /// A log that keeps the newest `samples_max` samples.
    pub fn new(samples_max: usize) -> EpochLog {
        EpochLog {
            samples: VecDeque::with_capacity(samples_max),
            samples_max,
            counts: EpochCounts::default(),
            wire_bytes: 0,
            pause_us: Distribution::new(),
            commit_us: Distribution::new(),
            dirty_pages: Distribution::new(),
            hold_us: Distribution::new(),
        }
    }

    /// Takes in a committed epoch; its index is given here.
    pub fn commit(&mut self, sample: EpochSample) {
        let sample = EpochSample { index: self.counts.committed, ..sample };
        self.counts.committed = self.counts.committed.saturating_add(1);
        self.wire_bytes = self.wire_bytes.saturating_add(sample.wire_bytes);
        self.pause_us.record(sample.pause_us);
        self.commit_us.record(sample.commit_us);
        self.dirty_pages.record(sample.dirty_pages);
        // An epoch without output held nothing; its zero would hide what packets waited.
        if sample.hold_us > 0 {
            self.hold_us.record(sample.hold_us);
        }
        while self.samples.len() >= self.samples_max.max(1) {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }

    /// Takes in that an epoch was captured and will never be committed.
    pub fn abort(&mut self) {
        self.counts.aborted = self.counts.aborted.saturating_add(1);
    }

    /// Takes in bytes sent that belong to no epoch (background pages).
    pub fn add_wire_bytes(&mut self, bytes: u64) {
        self.wire_bytes = self.wire_bytes.saturating_add(bytes);
    }

    /// The samples from index `since` on that are still kept.
    pub fn since(&self, since: u64) -> EpochsReply {
        let next = self.counts.committed;
        let oldest = self.samples.front().map_or(next, |sample| sample.index);
        let skip = usize::try_from(since.saturating_sub(oldest)).unwrap_or(usize::MAX);
        let epochs = self.samples.iter().skip(skip).copied().collect();
        EpochsReply { next, lost: oldest.saturating_sub(since), epochs }
    }

    /// How many epochs there were.
    pub fn counts(&self) -> EpochCounts {
        self.counts
    }

    /// Bytes sent, in epochs and otherwise.
    pub fn wire_bytes(&self) -> u64 {
        self.wire_bytes
    }

    /// Pauses of all epochs, in microseconds.
    pub fn pause_us(&self) -> Quantiles {
        self.pause_us.quantiles()
    }

    /// Commit times of all epochs, in microseconds.
    pub fn commit_us(&self) -> Quantiles {
        self.commit_us.quantiles()
    }

    /// Dirty pages of all epochs.
    pub fn dirty_pages(&self) -> Quantiles {
        self.dirty_pages.quantiles()
    }

    /// Hold times of all epochs that had output, in microseconds.
    pub fn hold_us(&self) -> Quantiles {
        self.hold_us.quantiles()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(pause_us: u64) -> EpochSample {
        EpochSample { index: 999, pause_us, commit_us: 2, dirty_pages: 3, wire_bytes: 10, hold_us: 0 }
    }

    #[test]
    fn the_newest_are_kept_and_all_are_counted() {
        let mut log = EpochLog::new(3);
        assert_eq!(log.since(0), EpochsReply::default());
        for pause_us in 1..=5 {
            log.commit(sample(pause_us));
        }
        log.abort();
        assert_eq!(log.counts(), EpochCounts { committed: 5, aborted: 1 });
        assert_eq!(log.wire_bytes(), 50);
        let reply = log.since(0);
        assert_eq!((reply.next, reply.lost), (5, 2));
        assert_eq!(reply.epochs.iter().map(|s| (s.index, s.pause_us)).collect::<Vec<_>>(), [(2, 3), (3, 4), (4, 5)]);
        assert_eq!(log.since(4).epochs.len(), 1);
        assert_eq!(log.since(5), EpochsReply { next: 5, lost: 0, epochs: vec![] });
        assert_eq!(log.since(u64::MAX).epochs, []);
    }

    #[test]
    fn quantiles_are_right_and_extremes_do_no_harm() {
        let mut log = EpochLog::new(1);
        assert_eq!(log.pause_us(), Quantiles::default());
        for pause_us in 1..=100 {
            log.commit(sample(pause_us));
        }
        assert_eq!(log.pause_us(), Quantiles { p50: 50, p99: 99, max: 100 });
        assert_eq!(log.hold_us(), Quantiles::default());
        log.commit(sample(u64::MAX));
        assert_eq!(log.pause_us().max, u64::MAX);
        log.commit(sample(0));
    }
}
