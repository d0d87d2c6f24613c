//! What people are told of newcomers that were turned away: of each kind the first, and how many
//! there were. A second secondary tries again for as long as it runs.

use super::Primary;
use crate::protocol::messages::RefuseReason;

/// Different refusals that are told before all others are only counted.
const TOLD_MAX: usize = 8;

/// The refusals of one primary.
#[derive(Clone, Debug, Default)]
pub(super) struct Refusals {
    /// Those that were told since a newcomer last joined.
    told: Vec<(RefuseReason, String)>,
    count: u64,
}

impl Refusals {
    /// A newcomer is turned away. True if that is to be told.
    pub(super) fn add(&mut self, reason: RefuseReason, detail: &str) -> bool {
        self.count = self.count.saturating_add(1);
        let is_known = self.told.iter().any(|(of, text)| *of == reason && text == detail);
        let is_news = !is_known && self.told.len() < TOLD_MAX;
        if is_news {
            self.told.push((reason, detail.to_owned()));
        }
        is_news
    }

    /// A newcomer joined: what happens from now on is another story.
    pub(super) fn joined(&mut self) {
        self.told.clear();
    }

    /// How many there were.
    pub(super) fn count(&self) -> u64 {
        self.count
    }
}

impl Primary {
    /// How many newcomers were turned away.
    pub fn refused_count(&self) -> u64 {
        self.refusals.count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_told_once_and_all_are_counted() {
        let mut refusals = Refusals::default();
        assert!(refusals.add(RefuseReason::Busy, "busy"));
        for _ in 0..100 {
            assert!(!refusals.add(RefuseReason::Busy, "busy"));
        }
        assert!(refusals.add(RefuseReason::Guest, "not 'mail'"));
        assert_eq!(refusals.count(), 102);
        refusals.joined();
        assert!(refusals.add(RefuseReason::Busy, "busy"));
        assert_eq!(refusals.count(), 103);
    }

    #[test]
    fn whoever_makes_up_reasons_fills_no_log() {
        let mut refusals = Refusals::default();
        let told = (0..1000).filter(|n| refusals.add(RefuseReason::Guest, &format!("not '{n}'"))).count();
        assert_eq!((told, refusals.count()), (TOLD_MAX, 1000));
    }
}
