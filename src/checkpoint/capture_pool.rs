//! Captures to fill again and again, as large as the epochs of late need them.
//!
//! ```text
//!  get ─▶ prepare: more dirty pages than room? make room, touched, while the guest runs ─▶ pause, fill ─▶ send
//!   ▲                                                                                                      │
//!   └── put: far more room than the last epochs filled? give it back to the host ◀─────────────────────────┘
//! ```

use std::sync::Arc;

use parking_lot::Mutex;

use super::capture::Capture;
use crate::protocol::pages::PAGE_BYTES;

/// Pages for which every capture has room: a usual epoch.
pub const ROOM_PAGES_MIN: usize = 4096;
/// Captures kept for reuse: one being filled, one being sent.
const POOLED: usize = 2;
/// Epochs in a row that must have filled less than a quarter of the room before it shrinks.
const SMALL_EPOCHS: u32 = 64;

/// Room for captures. Clones share it.
#[derive(Clone, Default)]
pub struct CapturePool {
    shared: Arc<Mutex<Pool>>,
}

#[derive(Default)]
struct Pool {
    #[expect(clippy::vec_box, reason = "captures travel in their boxes")]
    free: Vec<Box<Capture>>,
    shrinking: Shrinking,
}

impl CapturePool {
    /// Makes the pool ready. It takes a while: not for a thread that somebody waits for.
    pub fn warm(&self) {
        // Not in the loop's head: there the lock would be held as long as the loop.
        let kept = self.shared.lock().free.len();
        for _ in kept..POOLED {
            let mut capture = Box::<Capture>::default();
            capture.make_room(ROOM_PAGES_MIN);
            self.keep(capture);
        }
    }

    /// An empty capture, the one with the most room.
    pub fn get(&self) -> Box<Capture> {
        let mut pool = self.shared.lock();
        let largest = pool.free.iter().enumerate().max_by_key(|(_, capture)| capture.room_pages());
        match largest.map(|(at, _)| at) {
            Some(at) => pool.free.swap_remove(at),
            None => Box::default(),
        }
    }

    /// Gives a capture back that was filled, or was not needed.
    pub fn put(&self, mut capture: Box<Capture>) {
        let (used, room) = (capture.pages.len(), capture.room_pages());
        let target = self.shared.lock().shrinking.note(used, room);
        // Outside of the lock: the host takes its time to take memory back.
        if let Some(pages) = target {
            capture.shrink_to(pages);
        }
        self.keep(capture);
    }

    fn keep(&self, mut capture: Box<Capture>) {
        capture.clear();
        let mut pool = self.shared.lock();
        if pool.free.len() < POOLED {
            pool.free.push(capture);
        }
    }

    /// Most bytes the pool ever keeps for the pages of a guest of `pages` pages, all of which may
    /// be in one epoch. The state beside memory, some kilobytes for each vCPU, comes on top.
    pub fn bytes_max(pages: u64) -> u64 {
        let page_bytes = (PAGE_BYTES + size_of::<u64>()) as u64;
        pages.max(ROOM_PAGES_MIN as u64).saturating_mul(page_bytes).saturating_mul(POOLED as u64)
    }

    /// Bytes it keeps for pages now, in captures that are not handed out.
    pub fn bytes(&self) -> u64 {
        self.shared.lock().free.iter().map(|capture| capture.room_bytes()).sum()
    }
}

/// Decides when a capture has far too much room.
///
/// Its two thresholds lie apart, so that epochs of one size never make it shrink and grow in turns:
/// it shrinks once a quarter of the room was enough for a long time, and then to the double of what
/// was filled.
#[derive(Debug, Default)]
struct Shrinking {
    small_epochs: u32,
    largest: usize,
}

impl Shrinking {
    /// An epoch filled `used` pages of a capture with room for `room`. The room to shrink to, if it
    /// is to.
    fn note(&mut self, used: usize, room: usize) -> Option<usize> {
        if room <= ROOM_PAGES_MIN || used > room / 4 {
            *self = Shrinking::default();
            return None;
        }
        self.small_epochs += 1;
        self.largest = self.largest.max(used);
        if self.small_epochs < SMALL_EPOCHS {
            return None;
        }
        let target = self.largest.saturating_mul(2).max(ROOM_PAGES_MIN);
        *self = Shrinking::default();
        Some(target)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_shrinks_after_many_small_epochs_and_not_before() {
        let mut shrinking = Shrinking::default();
        let room = 100_000;
        for _ in 1..SMALL_EPOCHS {
            assert_eq!(shrinking.note(9000, room), None);
        }
        // One large epoch, and the count begins again.
        assert_eq!(shrinking.note(room / 4 + 1, room), None);
        for _ in 1..SMALL_EPOCHS {
            assert_eq!(shrinking.note(500, room), None);
        }
        assert_eq!(shrinking.note(9000, room), Some(18_000));
        // With the room it has now, the same epochs are not small.
        for _ in 0..2 * SMALL_EPOCHS {
            assert_eq!(shrinking.note(9000, 18_000), None);
        }
    }

    #[test]
    fn room_never_shrinks_below_that_of_a_usual_epoch() {
        let mut shrinking = Shrinking::default();
        let targets: Vec<_> = (0..SMALL_EPOCHS).filter_map(|_| shrinking.note(1, 5000)).collect();
        assert_eq!(targets, [ROOM_PAGES_MIN]);
        assert!((0..2 * SMALL_EPOCHS).all(|_| shrinking.note(1, ROOM_PAGES_MIN).is_none()));
    }

    #[test]
    fn the_pool_gives_the_memory_of_large_epochs_back() {
        let pool = CapturePool::default();
        pool.warm();
        let warm = pool.bytes();
        let use_once = |pages: usize| {
            let mut capture = pool.get();
            if pages > capture.room_pages() {
                capture.make_room(pages);
            }
            capture.pages.resize(pages, 0);
            pool.put(capture);
        };
        use_once(4 * ROOM_PAGES_MIN);
        assert!(pool.bytes() > 2 * warm, "{} of {warm}", pool.bytes());
        (0..SMALL_EPOCHS).for_each(|_| use_once(100));
        assert!(pool.bytes() <= warm + warm / 8, "{} of {warm}", pool.bytes());
        assert!(pool.bytes() <= CapturePool::bytes_max(1));
    }

    #[test]
    fn the_largest_is_used_first_and_no_more_than_two_are_kept() {
        let pool = CapturePool::default();
        let captures: Vec<_> = (0..3).map(|_| pool.get()).collect();
        for (mut capture, pages) in captures.into_iter().zip([10, 30, 20]) {
            capture.make_room(pages);
            pool.put(capture);
        }
        let rooms: Vec<_> = (0..3).map(|_| pool.get().room_pages()).collect();
        assert!(rooms[0] >= 30 && (10..30).contains(&rooms[1]) && rooms[2] == 0, "{rooms:?}");
    }
}
