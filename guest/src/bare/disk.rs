//! The virtio-blk driver: one queue, one request at a time, waited for where it is made.

use alloc::boxed::Box;

use mcd_guest::disk::{BLOCK_BYTES, Block, DiskError};

use super::mmio::Registers;
use super::ports::wait;
use super::virtqueue::{DESCRIPTOR_WRITE, Virtqueue};

/// The device id of a disk.
const DISK_DEVICE: u32 = 2;
/// Numbers of the devices that may be disks: device 0 is the network.
const DEVICES: core::ops::Range<u64> = 1..8;
/// Feature bits: the disk cannot be written; it can be flushed.
const FEATURE_READ_ONLY: u32 = 1 << 5;
const FEATURE_FLUSH: u32 = 1 << 9;
/// Kinds of request.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
/// The only queue, and its descriptors: a header, a block, a status.
const REQUESTS: u32 = 0;
const DESCRIPTORS: usize = 4;
/// Bytes of a sector, which a header counts in.
const SECTOR_BYTES: u64 = 512;
/// The status of a request that was done.
const STATUS_OK: u8 = 0;
/// The longest wait for the device before it is looked whether it is still well.
const LOOK_US: u32 = 10_000;

/// What device and driver share beside the rings. A block has a page of its own, so that the rest
/// dirties one page.
#[repr(C, align(4096))]
struct Buffers {
    block: Block,
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

/// The guest's first writable disk.
pub struct Disk {
    registers: Registers,
    queue: Virtqueue<DESCRIPTORS>,
    /// A pointer and no reference: the device writes there too.
    buffers: *mut Buffers,
    blocks: u64,
    can_flush: bool,
}

impl Disk {
    /// Takes the first writable disk into use, if there is one.
    pub fn find() -> Option<Disk> {
        let mut all = DEVICES.map(Registers::of).filter(|registers| registers.is(DISK_DEVICE));
        all.find_map(|registers| Disk::new(registers).ok().flatten())
    }

    fn new(registers: Registers) -> Result<Option<Disk>, &'static str> {
        let agreed = registers.begin(FEATURE_READ_ONLY | FEATURE_FLUSH)?;
        if agreed & FEATURE_READ_ONLY != 0 {
            return Ok(None);
        }
        let queue = Virtqueue::new();
        registers.set_up_queue(REQUESTS, DESCRIPTORS, queue.addresses())?;
        registers.start();
        let blocks = registers.config(0) / (BLOCK_BYTES as u64 / SECTOR_BYTES);
        let buffers =
            Box::into_raw(Box::new(Buffers { block: [0; BLOCK_BYTES], kind: 0, reserved: 0, sector: 0, status: 0 }));
        Ok(Some(Disk { registers, queue, buffers, blocks, can_flush: agreed & FEATURE_FLUSH != 0 }))
    }

    /// Whole blocks on the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Writes `block`, which `fill` fills.
    pub fn write(&mut self, block: u64, fill: impl FnOnce(&mut Block)) -> Result<(), DiskError> {
        self.check(block)?;
        // SAFETY: our own memory for ever, and the device has no request.
        fill(unsafe { &mut (*self.buffers).block });
        self.request(OUT, block, Some(0))
    }

    /// Reads `block`.
    pub fn read(&mut self, block: u64) -> Result<&Block, DiskError> {
        self.check(block)?;
        self.request(IN, block, Some(DESCRIPTOR_WRITE))?;
        // SAFETY: our own memory for ever, and the device has returned the request.
        Ok(unsafe { &(*self.buffers).block })
    }

    /// Returns when what was written outlives a loss of power.
    pub fn flush(&mut self) -> Result<(), DiskError> {
        if self.can_flush { self.request(FLUSH, 0, None) } else { Ok(()) }
    }

    fn check(&self, block: u64) -> Result<(), DiskError> {
        if block < self.blocks { Ok(()) } else { Err(DiskError::Beyond) }
    }

    /// Makes a request and waits for its end; `data` are the flags of the block's descriptor, if it
    /// takes part.
    fn request(&mut self, kind: u32, block: u64, data: Option<u16>) -> Result<(), DiskError> {
        let buffers = self.buffers;
        // SAFETY: our own memory for ever, and the device has no request; it reads them once the
        // queue says so.
        unsafe {
            (&raw mut (*buffers).kind).write_volatile(kind);
            (&raw mut (*buffers).sector).write_volatile(block * (BLOCK_BYTES as u64 / SECTOR_BYTES));
            (&raw mut (*buffers).status).write_volatile(u8::MAX);
        }
        // SAFETY: only addresses inside our own allocation are made.
        let (header, content, status) =
            unsafe { (&raw const (*buffers).kind, &raw const (*buffers).block, &raw const (*buffers).status) };
        let header = (header as u64, 16, 0);
        let answer = (status as u64, 1, DESCRIPTOR_WRITE);
        match data {
            Some(flags) => {
                self.queue.publish_chain([header, (content as u64, BLOCK_BYTES as u32, flags), answer]);
            }
            None => self.queue.publish_chain([header, answer]),
        }
        if self.queue.wants_notice() {
            self.registers.notify(REQUESTS);
        }
        while self.queue.take_used().is_none() {
            if self.registers.is_broken() {
                return Err(DiskError::Failed);
            }
            wait(LOOK_US);
        }
        // SAFETY: a byte of our own, which the device wrote before it returned the request.
        if unsafe { status.read_volatile() } == STATUS_OK { Ok(()) } else { Err(DiskError::Failed) }
    }
}
