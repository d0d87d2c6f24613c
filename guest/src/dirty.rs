//! The memory writer behind `DIRTY`: puts a known load of dirty pages on the checkpoints.
//!
//! One word is written into each page of a region in turn, in small batches spread over time. The
//! server asks through a [`Board`]; a [`Writer`], on another vCPU if there is one, takes the plan
//! and works on it. Each word says which plan wrote it and which write of that plan it was, so that
//! a torn or stale page shows ([`Board::wrong_pages`]).

use core::sync::atomic::{AtomicU64, Ordering};

/// Bytes of a page.
pub const PAGE_BYTES: u64 = 4096;
/// Most page writes per second that can be asked for.
pub const PER_SECOND_MAX: u64 = 10_000_000;
/// Shortest time between two batches.
const TICK_US: u64 = 500;
/// Writes that were missed for longer than this are not made up for.
const CATCH_UP_US: u64 = 50_000;
/// Most writes in one batch.
const BATCH_MAX: u64 = 1_024;

/// What is asked of the writer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// First address of the region.
    pub base: u64,
    /// Pages of the region.
    pub pages: u64,
    /// Page writes per second; 0 for none.
    pub per_second: u64,
}

/// Where the server and the writer meet. All zero at first: no plan.
#[derive(Default)]
pub struct Board {
    /// Goes up by one with each plan.
    sequence: AtomicU64,
    base: AtomicU64,
    pages: AtomicU64,
    per_second: AtomicU64,
    /// The plan the writer works on.
    taken: AtomicU64,
    /// Writes of this plan that may have been done.
    started: AtomicU64,
    /// Writes of this plan that surely are done.
    written: AtomicU64,
}

impl Board {
    /// A board without a plan.
    pub const fn new() -> Board {
        Board {
            sequence: AtomicU64::new(0),
            base: AtomicU64::new(0),
            pages: AtomicU64::new(0),
            per_second: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            started: AtomicU64::new(0),
            written: AtomicU64::new(0),
        }
    }

    /// Whether the writer has taken the newest plan, and so has let go of the one before.
    pub fn is_settled(&self) -> bool {
        self.taken.load(Ordering::Acquire) == self.sequence.load(Ordering::Relaxed)
    }

    /// Asks for `plan`. Only when [settled](Board::is_settled).
    ///
    /// # Safety
    /// The region must be writable memory that nobody else uses until the next plan is settled.
    pub unsafe fn ask(&self, plan: Plan) {
        self.base.store(plan.base, Ordering::Relaxed);
        self.pages.store(plan.pages, Ordering::Relaxed);
        self.per_second.store(plan.per_second, Ordering::Relaxed);
        self.sequence.fetch_add(1, Ordering::Release);
    }

    /// The newest plan, and how many of its writes are done.
    pub fn status(&self) -> (Plan, u64) {
        (self.plan(), self.written.load(Ordering::Acquire))
    }

    /// How many pages of the region do not hold what the writer last wrote there. Only when
    /// [settled](Board::is_settled).
    pub fn wrong_pages(&self) -> u64 {
        let (plan, sequence) = (self.plan(), self.taken.load(Ordering::Acquire));
        let mut wrong = 0;
        for page in 0..plan.pages {
            let written = self.written.load(Ordering::Acquire);
            if written <= page {
                continue;
            }
            // SAFETY: the page lies in the region, which stays the writer's until the next plan is
            // settled; only the caller could ask for one. It was written, and aligned words are
            // read whole.
            let word = unsafe { ((plan.base + page * PAGE_BYTES) as *const u64).read_volatile() };
            let started = self.started.load(Ordering::Acquire);
            let oldest = last_write(written, page, plan.pages);
            let write = (word & COUNT_MASK).wrapping_sub(1);
            let right = word >> COUNT_BITS == sequence & TAG_MASK
                && write >= oldest
                && write < started
                && write % plan.pages == page;
            wrong += u64::from(!right);
        }
        wrong
    }

    fn plan(&self) -> Plan {
        Plan {
            base: self.base.load(Ordering::Relaxed),
            pages: self.pages.load(Ordering::Relaxed),
            per_second: self.per_second.load(Ordering::Relaxed),
        }
    }
}

/// A word's lower bits are the write's number plus one, its upper bits the plan's.
const COUNT_BITS: u32 = 48;
const COUNT_MASK: u64 = (1 << COUNT_BITS) - 1;
const TAG_MASK: u64 = (1 << (64 - COUNT_BITS)) - 1;

/// The newest of the first `written` writes that went to `page`, which is below `written`.
fn last_write(written: u64, page: u64, pages: u64) -> u64 {
    let last = written - 1;
    last - (last + pages - page) % pages
}

/// Spreads writes over time.
#[derive(Clone, Copy, Debug)]
struct Pacer {
    per_second: u64,
    looked_us: u64,
    /// Writes owed, in millionths.
    owed: u64,
}

impl Pacer {
    fn new(per_second: u64, now_us: u64) -> Pacer {
        Pacer { per_second: per_second.min(PER_SECOND_MAX), looked_us: now_us, owed: 0 }
    }

    /// How many writes to do now.
    fn due(&mut self, now_us: u64) -> u64 {
        let elapsed_us = now_us.saturating_sub(self.looked_us);
        self.looked_us = self.looked_us.max(now_us);
        let owed_max = (CATCH_UP_US * self.per_second).max(1_000_000);
        self.owed = self.owed.saturating_add(elapsed_us.saturating_mul(self.per_second)).min(owed_max);
        let writes = (self.owed / 1_000_000).min(BATCH_MAX);
        self.owed -= writes * 1_000_000;
        writes
    }

    /// Microseconds until the next batch.
    fn wait_us(&self) -> u64 {
        if self.owed >= 1_000_000 {
            return 0;
        }
        (1_000_000 - self.owed).div_ceil(self.per_second.max(1)).max(TICK_US)
    }
}

/// Does what the board asks for.
#[derive(Default)]
pub struct Writer {
    sequence: u64,
    plan: Plan,
    pacer: Option<Pacer>,
    written: u64,
    batch_at_us: u64,
}

impl Writer {
    /// A writer without a plan.
    pub const fn new() -> Writer {
        let plan = Plan { base: 0, pages: 0, per_second: 0 };
        Writer { sequence: 0, plan, pacer: None, written: 0, batch_at_us: 0 }
    }

    /// Takes a new plan if there is one and writes what is due. In how many microseconds it wants
    /// to be called again; `None` if it has nothing to write.
    pub fn step(&mut self, board: &Board, now_us: u64) -> Option<u64> {
        let sequence = board.sequence.load(Ordering::Acquire);
        if sequence != self.sequence {
            self.sequence = sequence;
            self.plan = board.plan();
            self.written = 0;
            self.batch_at_us = now_us;
            let writes = self.plan.pages > 0 && self.plan.per_second > 0;
            self.pacer = writes.then(|| Pacer::new(self.plan.per_second, now_us));
            board.started.store(0, Ordering::Relaxed);
            board.written.store(0, Ordering::Relaxed);
            board.taken.store(sequence, Ordering::Release);
        }
        let pacer = self.pacer.as_mut()?;
        if now_us < self.batch_at_us {
            return Some(self.batch_at_us - now_us);
        }
        let writes = pacer.due(now_us);
        let wait_us = pacer.wait_us();
        self.batch_at_us = now_us + wait_us;
        self.write(board, writes);
        Some(wait_us)
    }

    fn write(&mut self, board: &Board, writes: u64) {
        let tag = (self.sequence & TAG_MASK) << COUNT_BITS;
        board.started.store(self.written + writes, Ordering::Release);
        for number in self.written..self.written + writes {
            let address = self.plan.base + number % self.plan.pages * PAGE_BYTES;
            // SAFETY: the address lies in the region of the plan in force, which is ours
            // (`Board::ask`'s promise).
            unsafe { (address as *mut u64).write_volatile(tag | ((number + 1) & COUNT_MASK)) };
        }
        self.written += writes;
        board.written.store(self.written, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(pages: usize) -> Vec<u64> {
        vec![0; pages * 512]
    }

    #[test]
    fn writes_come_at_the_rate_asked_for() {
        for per_second in [1, 7, 999, 100_000, 1_000_000] {
            let mut pacer = Pacer::new(per_second, 0);
            let (mut now_us, mut writes) = (0, 0);
            while now_us < 3_000_000 {
                writes += pacer.due(now_us);
                now_us += pacer.wait_us().max(1);
            }
            let expected = per_second * 3;
            assert!(writes.abs_diff(expected) <= expected / 100 + 1_024, "{per_second}: {writes}");
            assert!(per_second > 10 || writes.abs_diff(expected) <= 1, "{per_second}: {writes}");
        }
    }

    #[test]
    fn a_long_pause_is_not_made_up_for() {
        let mut pacer = Pacer::new(10_000, 0);
        let writes: u64 = (0..10).map(|_| pacer.due(60_000_000)).sum();
        assert_eq!(writes, 10_000 * CATCH_UP_US / 1_000_000);
    }

    #[test]
    fn every_page_is_written_in_turn_and_checked() {
        let (board, mut writer) = (Board::new(), Writer::new());
        let mut memory = region(10);
        assert_eq!(writer.step(&board, 0), None);
        assert!(board.is_settled());
        let base = memory.as_mut_ptr() as u64;
        // SAFETY: `memory` outlives the board's use of it and is not used otherwise while the plan
        // is in force.
        unsafe { board.ask(Plan { base, pages: 10, per_second: 1_000 }) };
        assert!(!board.is_settled());
        let mut now_us = 0;
        for _ in 0..25 {
            now_us += writer.step(&board, now_us).expect("work");
        }
        assert!(board.is_settled());
        let (_, written) = board.status();
        assert!((20..=25).contains(&written), "{written}");
        assert_eq!(board.wrong_pages(), 0);
        // A page that fell back by one round shows.
        let word = base as *mut u64;
        // SAFETY: page 0 of `memory`.
        unsafe { word.write_volatile(word.read_volatile() - 10) };
        assert_eq!(board.wrong_pages(), 1);
        // SAFETY: as above.
        unsafe { board.ask(Plan::default()) };
        assert_eq!(writer.step(&board, now_us), None);
        assert!(board.is_settled());
    }

    #[test]
    fn the_last_write_to_a_page_is_known() {
        for pages in 1..7u64 {
            for written in 1..40u64 {
                for page in 0..pages.min(written) {
                    let expected = (0..written).rev().find(|write| write % pages == page);
                    assert_eq!(Some(last_write(written, page, pages)), expected);
                }
            }
        }
    }
}
