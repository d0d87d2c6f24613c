//! A machine for tests of commands and server.

use crate::dirty::{Board, Plan, Writer};
use crate::disk::{self, BLOCK_BYTES, Block, Content, DiskError, Run};
use crate::server::{DirtyRefusal, DirtyStatus, Host, MemoryUse};
use crate::sum::Checksum;

/// Pages of a [`TestHost`].
pub const PAGES: u64 = 40;

/// A machine with a clock that does not advance by itself, and a little memory.
pub struct TestHost {
    pub now_us: u64,
    pub free_bytes: u64,
    pub is_shut_down: bool,
    ram: Vec<u64>,
    region: Vec<u64>,
    board: Board,
    writer: Writer,
    /// The disk's blocks, and what was written that a flush has not followed yet.
    disk: Vec<Box<Block>>,
    pub unflushed: u32,
    run: Run,
    /// Whether the writer's vCPU runs.
    pub writer_runs: bool,
}

impl TestHost {
    pub fn new() -> TestHost {
        TestHost {
            now_us: 1_000_000,
            free_bytes: 1 << 30,
            is_shut_down: false,
            ram: vec![3; PAGES as usize * 512],
            region: Vec::new(),
            board: Board::new(),
            writer: Writer::new(),
            disk: vec![Box::new([0; BLOCK_BYTES]); 8],
            unflushed: 0,
            run: Run::default(),
            writer_runs: true,
        }
    }
}

impl Host for TestHost {
    fn now_us(&self) -> u64 {
        self.now_us
    }

    fn cpus(&self) -> u32 {
        1
    }

    fn memory_pages(&self) -> u64 {
        PAGES
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse { used_bytes: 1 << 20, free_bytes: self.free_bytes }
    }

    fn dirty_ask(&mut self, pages: u64, per_second: u64) -> Result<(), DirtyRefusal> {
        if !self.board.is_settled() {
            return Err(DirtyRefusal::Busy);
        }
        if pages > 1000 {
            return Err(DirtyRefusal::Memory);
        }
        self.region = vec![0; pages as usize * 512];
        let base = self.region.as_mut_ptr() as u64;
        // SAFETY: the region is kept until the next plan, and nobody else uses it.
        unsafe { self.board.ask(Plan { base, pages, per_second }) };
        Ok(())
    }

    fn dirty_is_settled(&mut self) -> bool {
        if self.writer_runs {
            self.writer.step(&self.board, self.now_us);
        }
        self.board.is_settled()
    }

    fn dirty_status(&self) -> DirtyStatus {
        let (plan, written) = self.board.status();
        DirtyStatus { pages: plan.pages, per_second: plan.per_second, written }
    }

    fn dirty_wrong_pages(&mut self) -> Option<u64> {
        self.dirty_is_settled().then(|| self.board.wrong_pages())
    }

    fn sum_some(&mut self, checksum: &mut Checksum, _slice_us: u64) -> bool {
        let at = checksum.pages as usize * 512;
        // SAFETY: a whole page of `ram`: the last one ends the sum.
        unsafe { checksum.add_page(self.ram[at..at + 512].as_ptr()) };
        checksum.pages == PAGES
    }

    fn disk_blocks(&self) -> u64 {
        self.disk.len() as u64
    }

    fn disk_write(&mut self, block: u64, seed: u64) -> Result<(), DiskError> {
        let at = self.disk.get_mut(block as usize).ok_or(DiskError::Beyond)?;
        disk::fill(block, seed, at);
        self.unflushed += 1;
        Ok(())
    }

    fn disk_read(&mut self, block: u64) -> Result<Content, DiskError> {
        self.disk.get(block as usize).map(|content| disk::content_of(block, content)).ok_or(DiskError::Beyond)
    }

    fn disk_flush(&mut self) -> Result<(), DiskError> {
        self.unflushed = 0;
        Ok(())
    }

    fn disk_run(&mut self) -> &mut Run {
        &mut self.run
    }

    fn shut_down(&mut self) {
        self.is_shut_down = true;
    }
}
