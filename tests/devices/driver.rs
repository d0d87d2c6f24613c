//! A driver's requests to a disk.

use std::sync::Arc;

use mcd::device::virtio::blk::BlkDevice;

use crate::rig::*;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

pub const F_RO: u32 = 1 << 5;
pub const F_FLUSH: u32 = 1 << 9;
pub const F_INDIRECT: u32 = 1 << 28;

/// Sectors of the disk of most tests.
pub const SECTORS: u64 = 2048;

/// A driver of a disk.
pub struct DiskRig {
    pub rig: Rig<BlkDevice<Memory>>,
    pub disk: Arc<Disk>,
}

/// Every byte differs from its neighbours and from those a sector on.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at ^ at >> 9) as u8 | 1).collect()
}

impl DiskRig {
    /// A device nobody has touched, running, in front of `content`.
    pub fn bare(content: Vec<u8>, read_only: bool) -> DiskRig {
        let (mem, machine, disk) = (memory(), Arc::new(Machine::default()), Disk::new(content));
        let shape = shape(disk.content().len() as u64, read_only);
        let device = BlkDevice::new(mem.clone(), 3, &shape, GSI, disk.clone(), machine.clone()).expect("device");
        device.unquiesce();
        DiskRig { rig: Rig { mem, device, machine, added: 0 }, disk }
    }

    /// A device whose driver is ready and uses flush.
    pub fn ready() -> DiskRig {
        let mut rig = DiskRig::bare(pattern(SECTORS as usize * 512), false);
        rig.rig.set_up(F_FLUSH, SIZE);
        rig
    }

    /// Puts a request into slot `slot` (0 to 4), which has three descriptors, without a notify.
    /// Data of `data_bytes` is at [`DiskRig::data_at`], for the device to write if `to_guest`.
    pub fn put(&mut self, slot: u16, kind: u32, sector: u64, data_bytes: u32, to_guest: bool) {
        let (first, at) = (slot * 3, HEADERS + u64::from(slot) * 256);
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.rig.put(at, &header);
        self.rig.put(at + 128, &[NO_STATUS]);
        let after_header = if data_bytes > 0 { first + 1 } else { first + 2 };
        self.rig.descriptor(first, at, 16, NEXT, after_header);
        let direction = if to_guest { WRITE } else { 0 };
        self.rig.descriptor(first + 1, self.data_at(slot), data_bytes, NEXT | direction, first + 2);
        self.rig.descriptor(first + 2, at + 128, 1, WRITE, 0);
        self.rig.add(first);
    }

    pub fn data_at(&self, slot: u16) -> u64 {
        DATA + u64::from(slot) * 0x1_0000
    }

    pub fn status(&self, slot: u16) -> u8 {
        self.rig.get(HEADERS + u64::from(slot) * 256 + 128, 1)[0]
    }

    /// Does one request and returns its status.
    pub fn ask(&mut self, kind: u32, sector: u64, data_bytes: u32, to_guest: bool) -> u8 {
        let count = self.rig.used().wrapping_add(1);
        self.put(0, kind, sector, data_bytes, to_guest);
        self.rig.notify();
        self.rig.until_used(count);
        self.status(0)
    }

    /// Does one discard or write of zeroes of ranges (sector, sectors, flags) and returns its
    /// status.
    pub fn ask_ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.rig.put(self.data_at(0), &bytes);
        self.ask(kind, 0, bytes.len() as u32, false)
    }

    pub fn state(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.rig.device.save(&mut bytes);
        bytes
    }

    /// The heads of the requests in flight, as the state has them at its end. The device must be
    /// quiet.
    pub fn in_flight(&self) -> Vec<u16> {
        let state = self.state();
        // Behind the shape, the registers and the one queue.
        let tail = &state[8 + 1 + 20 + 33 + 34..];
        let heads: Vec<u16> = tail.chunks(2).map(|two| u16::from_le_bytes([two[0], two[1]])).collect();
        assert_eq!(usize::from(heads[0]), heads.len() - 1);
        heads[1..].to_vec()
    }
}
