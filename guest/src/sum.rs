//! The checksum behind `SUM`: over every page of RAM, a few at a time.

/// Words of a page.
const PAGE_WORDS: usize = 512;
/// An odd number whose product spreads a word's bits.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// A checksum in the making. Four lanes keep the multiplier busy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Checksum {
    /// Pages summed so far, which is also the next page to sum.
    pub pages: u64,
    lanes: [u64; 4],
}

impl Checksum {
    /// Adds the page at `page`. Other vCPUs and devices may write it meanwhile: each word is then
    /// the old or the new one.
    ///
    /// # Safety
    /// 4096 bytes at `page`, aligned to 8, must be readable.
    pub unsafe fn add_page(&mut self, page: *const u64) {
        let mut lanes = self.lanes;
        let mut at = 0;
        while at < PAGE_WORDS {
            for (index, lane) in lanes.iter_mut().enumerate() {
                // SAFETY: `at + index` is below PAGE_WORDS, which the caller promised to be
                // readable.
                let word = unsafe { page.add(at + index).read_volatile() };
                *lane = (*lane ^ word).wrapping_mul(SPREAD).rotate_left(29);
            }
            at += lanes.len();
        }
        self.lanes = lanes;
        self.pages += 1;
    }

    /// The sum as it stands.
    pub fn value(&self) -> u64 {
        let folded = self.lanes.iter().fold(self.pages, |sum, lane| (sum ^ lane).wrapping_mul(SPREAD).rotate_left(31));
        folded ^ (folded >> 29)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(memory: &[u64]) -> u64 {
        let mut checksum = Checksum::default();
        for page in memory.chunks_exact(PAGE_WORDS) {
            // SAFETY: a whole page of `memory`.
            unsafe { checksum.add_page(page.as_ptr()) };
        }
        checksum.value()
    }

    #[test]
    fn every_word_counts() {
        let mut memory = vec![0u64; 3 * PAGE_WORDS];
        let empty = sum(&memory);
        assert_eq!(sum(&memory), empty);
        assert_ne!(sum(&memory[PAGE_WORDS..]), empty);
        for at in [0, 1, 511, 512, 1000, 1535] {
            memory[at] = 1;
            assert_ne!(sum(&memory), empty, "word {at}");
            memory[at] = 0;
        }
    }
}
