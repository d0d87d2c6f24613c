//! How pages are packed: with lz4 or not, and for links whose speed nobody told us, found out by
//! sending.

use std::time::Duration;

use crate::wire::PageEncoder;

/// Writes shorter than this say nothing of a link's speed: they go into the socket's buffer and
/// return.
const TELLING_BYTES: usize = 512 << 10;
/// Below this many bytes a second a link is slower than lz4 (0.8 GB/s of pages on the build hosts),
/// with room for its effort.
const SLOW_BYTES_PER_S: f64 = 300e6;
/// Above this many it is not worth it. The gap keeps a link in between from changing its mind at
/// every write.
const FAST_BYTES_PER_S: f64 = 600e6;

/// What the operator wants and the peer can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// No lz4.
    Uncompressed,
    /// Always lz4.
    Lz4,
    /// lz4 while the link is slower than it.
    BySpeed,
}

/// The encoder in use.
pub struct Packer {
    packing: Packing,
    uncompressed: PageEncoder,
    lz4: PageEncoder,
    slow: bool,
}

impl Packer {
    /// A packer for a link of unknown speed.
    pub fn new(packing: Packing) -> Packer {
        Packer { packing, uncompressed: PageEncoder::new(false), lz4: PageEncoder::new(true), slow: false }
    }

    /// The encoder for the pages that come next.
    pub fn encoder(&mut self) -> &mut PageEncoder {
        let lz4 = match self.packing {
            Packing::Uncompressed => false,
            Packing::Lz4 => true,
            Packing::BySpeed => self.slow,
        };
        if lz4 { &mut self.lz4 } else { &mut self.uncompressed }
    }

    /// A write of `bytes` bytes took `time`.
    pub fn wrote(&mut self, bytes: usize, time: Duration) {
        if bytes < TELLING_BYTES || time.is_zero() {
            return;
        }
        let bytes_per_s = bytes as f64 / time.as_secs_f64();
        if bytes_per_s < SLOW_BYTES_PER_S {
            self.slow = true;
        } else if bytes_per_s > FAST_BYTES_PER_S {
            self.slow = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::pages::PAGE_BYTES;
    use crate::wire::PageKind;

    fn kind(packer: &mut Packer) -> PageKind {
        packer.encoder().encode(0, &[7; PAGE_BYTES], &mut Vec::new())
    }

    #[test]
    fn a_slow_link_gets_lz4_and_a_fast_one_loses_it() {
        let mut packer = Packer::new(Packing::BySpeed);
        assert_eq!(kind(&mut packer), PageKind::Raw);
        packer.wrote(1 << 20, Duration::from_millis(10)); // 105 MB/s
        assert_eq!(kind(&mut packer), PageKind::Lz4);
        packer.wrote(1 << 20, Duration::from_millis(2)); // 524 MB/s: in between, nothing changes
        packer.wrote(1000, Duration::from_nanos(1)); // too short to tell
        assert_eq!(kind(&mut packer), PageKind::Lz4);
        packer.wrote(1 << 20, Duration::from_micros(500)); // 2.1 GB/s
        assert_eq!(kind(&mut packer), PageKind::Raw);
    }

    #[test]
    fn the_operators_word_stands_whatever_the_link() {
        for (packing, expected) in [(Packing::Uncompressed, PageKind::Raw), (Packing::Lz4, PageKind::Lz4)] {
            let mut packer = Packer::new(packing);
            for time in [Duration::from_secs(1), Duration::from_micros(1)] {
                packer.wrote(1 << 20, time);
                assert_eq!(kind(&mut packer), expected);
            }
        }
    }
}
