//! Whether the epoch that is about to be cut is likely to be a small one.

use std::time::Duration;

use crate::protocol::types::Instant;

/// Epochs that are looked back upon.
const EPOCHS: usize = 4;
/// After so long without a cut, the last epochs say nothing of the next. A guest dirties at most
/// some 10,000 pages meanwhile on each vCPU, with a fault for each.
const RECENT: Duration = Duration::from_millis(50);
/// Epochs are few pages if as many of them would fit the room.
const TIMES: usize = 4;

/// The sizes of the last epochs.
#[derive(Debug, Default)]
pub struct ExpectedPages {
    /// The newest last; `None` as long as there are too few.
    last: [Option<usize>; EPOCHS],
    cut_at: Instant,
}

impl ExpectedPages {
    /// An epoch of `pages` pages was cut.
    pub fn note(&mut self, now: Instant, pages: usize) {
        self.last.rotate_left(1);
        if let Some(newest) = self.last.last_mut() {
            *newest = Some(pages);
        }
        self.cut_at = now;
    }

    /// True if an epoch that is cut now will fit the room of `room_pages` pages as far as the last
    /// ones tell: they were small, and are not long ago.
    pub fn are_few(&self, now: Instant, room_pages: usize) -> bool {
        let is_small = |pages: &Option<usize>| pages.is_some_and(|pages| pages.saturating_mul(TIMES) <= room_pages);
        now.since(self.cut_at) <= RECENT && self.last.iter().all(is_small)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_small_and_recent_epochs_tell_of_a_small_one() {
        let mut expected = ExpectedPages::default();
        let at = |ms: u64| Instant::from_us(ms * 1000);
        for ms in 1..=4 {
            assert!(!expected.are_few(at(ms), 4000), "after {} epochs", ms - 1);
            expected.note(at(ms), 1000);
        }
        assert!(expected.are_few(at(54), 4000));
        assert!(!expected.are_few(at(55), 4000), "long ago");
        assert!(!expected.are_few(at(5), 3999), "little room");
        expected.note(at(5), 1001);
        for ms in 6..=9 {
            assert!(!expected.are_few(at(ms), 4000), "a large one among them");
            expected.note(at(ms), 0);
        }
        assert!(expected.are_few(at(10), 4000));
    }
}
