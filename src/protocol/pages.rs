//! A set of guest pages, dense by page index.
//!
//! Page *index*, not guest frame number: RAM is numbered without its hole, so that a set is as
//! large as memory and no larger.

/// Bytes in a guest page.
pub const PAGE_BYTES: usize = 4096;

/// A set of page indexes below a fixed length.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Default)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set over `pages` pages.
    pub fn empty(pages: u64) -> PageSet {
        PageSet { words: vec![0; words_for(pages)], pages }
    }

    /// The full set over `pages` pages.
    pub fn full(pages: u64) -> PageSet {
        let mut set = PageSet { words: vec![u64::MAX; words_for(pages)], pages };
        set.trim();
        set
    }

    /// How many pages the set ranges over (not how many are in it).
    pub fn len_pages(&self) -> u64 {
        self.pages
    }

    /// How many pages are in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// True if no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// True if `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] & (1 << (page % 64)) != 0
    }

    /// Adds `page`; a page beyond the range is ignored.
    pub fn insert(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Removes `page`.
    pub fn remove(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
        }
    }

    /// Removes the pages of `range`; how many were in the set.
    pub fn remove_range(&mut self, range: std::ops::Range<u64>) -> u64 {
        let range = range.start.min(self.pages)..range.end.min(self.pages);
        let (first, last) = ((range.start / 64) as usize, range.end.div_ceil(64) as usize);
        let mut removed = 0;
        for (number, word) in self.words.iter_mut().enumerate().take(last).skip(first) {
            let start = number as u64 * 64;
            let from = range.start.saturating_sub(start).min(64);
            let to = range.end.saturating_sub(start).min(64);
            let below = |bit: u64| if bit >= 64 { u64::MAX } else { (1 << bit) - 1 };
            let mask = below(to) & !below(from);
            removed += u64::from((*word & mask).count_ones());
            *word &= !mask;
        }
        removed
    }

    /// Removes every page.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every page of `other`.
    pub fn union_with(&mut self, other: &PageSet) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Removes every page of `other`, which may range over fewer pages; how many that were.
    pub fn subtract(&mut self, other: &PageSet) -> u64 {
        let mut removed = 0;
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            removed += u64::from((*mine & theirs).count_ones());
            *mine &= !theirs;
        }
        removed
    }

    /// Adds the pages whose bits are set in `words`, which start at page `first` (a multiple of
    /// 64). Bits beyond the range are ignored.
    pub fn union_words(&mut self, first: u64, words: &[u64]) {
        debug_assert_eq!(first % 64, 0);
        let start = (first / 64) as usize;
        for (mine, theirs) in self.words.iter_mut().skip(start).zip(words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// The pages in the set, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.iter_from(0)
    }

    /// The pages in the set from page `first` on, in rising order.
    pub fn iter_from(&self, first: u64) -> impl Iterator<Item = u64> + '_ {
        let skip = (first / 64) as usize;
        self.words.iter().enumerate().skip(skip).filter(|(_, w)| **w != 0).flat_map(move |(i, w)| {
            let mut rest = if i == skip { *w & (u64::MAX << (first % 64)) } else { *w };
            std::iter::from_fn(move || {
                if rest == 0 {
                    return None;
                }
                let bit = u64::from(rest.trailing_zeros());
                rest &= rest - 1;
                Some(i as u64 * 64 + bit)
            })
        })
    }

    /// The set's words, 64 pages each, the last one padded with zeros.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    fn trim(&mut self) {
        if !self.pages.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.pages % 64)) - 1;
        }
    }
}

fn words_for(pages: u64) -> usize {
    pages.div_ceil(64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_sets_end_where_memory_ends() {
        let mut set = PageSet::full(70);
        assert_eq!(set.count(), 70);
        assert!(!set.contains(70));
        set.insert(1000);
        set.union_words(64, &[u64::MAX]);
        assert_eq!(set.count(), 70);
        set.remove(69);
        assert_eq!(set.iter().last(), Some(68));
    }

    #[test]
    fn sets_add_and_take_away() {
        let mut a = PageSet::empty(200);
        let mut b = PageSet::empty(200);
        for page in [0, 63, 64, 199] {
            a.insert(page);
        }
        b.insert(64);
        b.insert(5);
        a.union_with(&b);
        assert_eq!(a.iter().collect::<Vec<_>>(), vec![0, 5, 63, 64, 199]);
        assert_eq!(a.subtract(&b), 2);
        assert_eq!(a.iter().collect::<Vec<_>>(), vec![0, 63, 199]);
        assert_eq!(a.count(), 3);
    }
}
