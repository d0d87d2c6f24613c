//! How fast a resync goes.

use std::collections::VecDeque;

/// Over how long the rate is taken, in microseconds.
const WINDOW_US: u64 = 5_000_000;
/// Samples are as far apart.
const SAMPLE_US: u64 = 250_000;

/// How far a resync is, and how fast.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Pace {
    /// Pages and those left: of memory, then of each disk.
    pub parts: Vec<(u64, u64)>,
    /// Pages in a second, once that is known.
    pub rate_pages_s: Option<u64>,
}

/// Looks at a resync again and again.
#[derive(Default)]
pub(crate) struct Meter {
    /// When, and how many pages were left.
    samples: VecDeque<(u64, u64)>,
}

impl Meter {
    /// The pace of a resync that has come so far; there may be none.
    pub(crate) fn look(&mut self, now_us: u64, parts: Option<Vec<(u64, u64)>>) -> Option<Pace> {
        let Some(parts) = parts else {
            self.samples.clear();
            return None;
        };
        let left = parts.iter().fold(0_u64, |sum, (_, left)| sum.saturating_add(*left));
        let (newest_us, newest_left) = self.samples.back().copied().unwrap_or((now_us, left));
        if left > newest_left {
            // Another one.
            self.samples.clear();
        }
        if self.samples.is_empty() || now_us >= newest_us + SAMPLE_US {
            self.samples.push_back((now_us, left));
        }
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(us, _)| us + WINDOW_US < now_us) {
            self.samples.pop_front();
        }
        let rate_pages_s = self.samples.front().and_then(|(since_us, then)| {
            let took_us = now_us.saturating_sub(*since_us);
            // A moment is too short for a rate.
            let (took_us, done) = (Some(took_us).filter(|us| *us >= SAMPLE_US)?, then.saturating_sub(left));
            done.saturating_mul(1_000_000).checked_div(took_us)
        });
        Some(Pace { parts, rate_pages_s })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut meter = Meter::default();
        let mut rate = |ms: u64, left: u64| {
            meter.look(ms * 1000, Some(vec![(9000, left), (1000, 0)])).expect("a resync").rate_pages_s
        };
        assert_eq!(rate(0, 9000), None);
        assert_eq!(rate(100, 8990), None, "too early");
        assert_eq!(rate(1000, 8000), Some(1000));
        for second in 2..8 {
            rate(second * 1000, 8000 - (second - 1) * 500);
        }
        assert_eq!(rate(8000, 4500), Some(500), "the fast beginning is forgotten");
        assert_eq!(rate(9000, 9000), None, "another resync");
        assert_eq!(rate(9500, 8000), Some(2000));
        assert_eq!(meter.look(10_000_000, None), None);
        assert_eq!(
            meter.look(11_000_000, Some(vec![(10, 5)])),
            Some(Pace { parts: vec![(10, 5)], rate_pages_s: None })
        );
    }
}
