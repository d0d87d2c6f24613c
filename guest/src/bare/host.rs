//! The server on the bare machine: its main loop, and the machine as the commands see it.

use alloc::alloc::{Layout, alloc, dealloc};
use core::fmt::Write;

use mcd_guest::dirty::{PAGE_BYTES, Plan, Writer};
use mcd_guest::disk::{self, Content, DiskError, Run};
use mcd_guest::server::{Address, DirtyRefusal, DirtyStatus, Host, MemoryUse, PORT, Server};
use mcd_guest::sum::Checksum;

use super::boot_info::{BootInfo, HOLE_END, HOLE_START};
use super::disk::Disk;
use super::net::Net;
use super::ports::{Event, Serial, WAIT_FOREVER, tell, wait};
use super::writer::BOARD;
use super::{clock, heap};

/// The first page is not mapped, so that a null pointer is caught; a checksum leaves it out.
const FIRST_PAGE: u64 = 1;
/// Pages summed between two looks at the clock.
const SUM_PAGES_AT_ONCE: u64 = 16;

/// Serves for ever.
pub fn serve(info: &BootInfo) -> ! {
    let mut net = match Net::new() {
        Ok(net) => net,
        Err(reason) => panic!("{reason}"),
    };
    let address = Address {
        mac: info.mac,
        ipv4: info.ipv4,
        prefix_len: info.prefix_len,
        gateway: (info.gateway != [0; 4]).then_some(info.gateway),
    };
    let mut machine = Machine::new(info);
    let Ok(mut server) = Server::new(&mut net, &machine, address, info.seed) else {
        panic!("{} bytes of RAM are too few for the server", info.memory_bytes);
    };
    let [a, b, c, d] = info.ipv4;
    // Writing to the serial port cannot fail.
    let _ = writeln!(
        Serial,
        "mcd guest: serving RESP at {a}.{b}.{c}.{d}:{PORT}, {} MiB, {} vCPU",
        info.memory_bytes >> 20,
        info.cpus
    );
    tell(Event::Serving);
    loop {
        let progress = server.poll(&mut net, &mut machine);
        net.flush();
        let write_us = machine.write_some();
        if !progress && write_us != Some(0) {
            let timer_us = server.wait_us(machine.now_us());
            let wait_us = timer_us.into_iter().chain(write_us).min();
            wait(wait_us.map_or(WAIT_FOREVER, |us| u32::try_from(us).unwrap_or(WAIT_FOREVER - 1)));
        }
    }
}

/// The machine as the commands see it.
struct Machine {
    cpus: u32,
    memory_pages: u64,
    /// The memory writer, if it has no vCPU of its own.
    writer: Option<Writer>,
    disk: Option<Disk>,
    /// The disk's background writer.
    run: Run,
    /// The region in use by the newest plan.
    region: Option<Region>,
    /// The region before it, until the writer has taken the newest plan.
    retired: Option<Region>,
}

/// Pages for the memory writer.
struct Region {
    base: *mut u8,
    layout: Layout,
}

impl Region {
    /// Memory for `pages` pages, not touched.
    fn new(pages: u64) -> Option<Region> {
        let bytes = usize::try_from(pages.checked_mul(PAGE_BYTES)?).ok()?;
        let layout = Layout::from_size_align(bytes, PAGE_BYTES as usize).ok()?;
        if bytes == 0 {
            return None;
        }
        // SAFETY: the layout is not empty.
        let base = unsafe { alloc(layout) };
        if base.is_null() { None } else { Some(Region { base, layout }) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`; the owner drops a region only when the
        // writer has let go of it.
        unsafe { dealloc(self.base, self.layout) }
    }
}

impl Machine {
    fn new(info: &BootInfo) -> Machine {
        Machine {
            cpus: info.cpus,
            memory_pages: info.memory_bytes / PAGE_BYTES,
            writer: (info.cpus < 2).then(Writer::new),
            disk: Disk::find(),
            run: Run::default(),
            region: None,
            retired: None,
        }
    }

    /// Lets the disk's writer do its share, and the memory writer if it has no vCPU of its own;
    /// when one wants the next.
    fn write_some(&mut self) -> Option<u64> {
        let now_us = self.now_us();
        let memory_us = self.writer.as_mut().and_then(|writer| writer.step(&BOARD, now_us));
        let mut run = self.run;
        let disk_us = run.step(now_us, |block, seed| self.disk_write(block, seed));
        self.run = run;
        memory_us.into_iter().chain(disk_us).min()
    }

    /// Where page `page` of RAM lies.
    fn page_address(&self, page: u64) -> *const u64 {
        let flat = page * PAGE_BYTES;
        let address = if flat < HOLE_START { flat } else { flat - HOLE_START + HOLE_END };
        address as *const u64
    }
}

impl Host for Machine {
    fn now_us(&self) -> u64 {
        clock::now_us(0)
    }

    fn cpus(&self) -> u32 {
        self.cpus
    }

    fn memory_pages(&self) -> u64 {
        self.memory_pages
    }

    fn memory(&self) -> MemoryUse {
        heap::memory_use()
    }

    fn dirty_ask(&mut self, pages: u64, per_second: u64) -> Result<(), DirtyRefusal> {
        if !self.dirty_is_settled() {
            return Err(DirtyRefusal::Busy);
        }
        let (pages, per_second) = if pages == 0 || per_second == 0 { (0, 0) } else { (pages, per_second) };
        let region = match pages {
            0 => None,
            _ => Some(Region::new(pages).ok_or(DirtyRefusal::Memory)?),
        };
        let base = region.as_ref().map_or(0, |region| region.base as u64);
        self.retired = core::mem::replace(&mut self.region, region);
        // SAFETY: the region was allocated for this plan only and is kept until the next plan is
        // settled.
        unsafe { BOARD.ask(Plan { base, pages, per_second }) };
        Ok(())
    }

    fn dirty_is_settled(&mut self) -> bool {
        let is_settled = BOARD.is_settled();
        if is_settled {
            self.retired = None;
        }
        is_settled
    }

    fn dirty_status(&self) -> DirtyStatus {
        let (plan, written) = BOARD.status();
        DirtyStatus { pages: plan.pages, per_second: plan.per_second, written }
    }

    fn dirty_wrong_pages(&mut self) -> Option<u64> {
        self.dirty_is_settled().then(|| BOARD.wrong_pages())
    }

    fn sum_some(&mut self, checksum: &mut Checksum, slice_us: u64) -> bool {
        let end_us = self.now_us() + slice_us;
        loop {
            for _ in 0..SUM_PAGES_AT_ONCE {
                let page = checksum.pages + FIRST_PAGE;
                if page >= self.memory_pages {
                    return true;
                }
                // SAFETY: a whole page of RAM; the host maps all of it.
                unsafe { checksum.add_page(self.page_address(page)) };
            }
            if self.now_us() >= end_us {
                return false;
            }
        }
    }

    fn disk_blocks(&self) -> u64 {
        self.disk.as_ref().map_or(0, Disk::blocks)
    }

    fn disk_write(&mut self, block: u64, seed: u64) -> Result<(), DiskError> {
        self.disk.as_mut().ok_or(DiskError::None)?.write(block, |content| disk::fill(block, seed, content))
    }

    fn disk_read(&mut self, block: u64) -> Result<Content, DiskError> {
        let content = self.disk.as_mut().ok_or(DiskError::None)?.read(block)?;
        Ok(disk::content_of(block, content))
    }

    fn disk_flush(&mut self) -> Result<(), DiskError> {
        self.disk.as_mut().ok_or(DiskError::None)?.flush()
    }

    fn disk_run(&mut self) -> &mut Run {
        &mut self.run
    }

    fn shut_down(&mut self) {
        tell(Event::ShutDown);
    }
}
