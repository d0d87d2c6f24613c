//! What a driver asks of a disk, read off a descriptor chain and checked against the disk.
//!
//! A chain that is no request at all (no header, no room for the status) is a [`ChainError`]: the
//! device breaks. A request that cannot be done (beyond the end, a write to a read-only disk, an
//! unknown kind) is one with an answer: [`Work::Answer`].

use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemory};

use crate::device::virtio::chain::{self, ChainError, Stream};
use crate::protocol::machine_shape::{DiskShape, SECTOR_BYTES};

/// The kinds of request (virtio 1.2, 5.2.6).
mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

/// Bytes of the header before each request: kind, reserved, first sector.
const HEADER_BYTES: usize = 16;
/// Bytes of one range of a discard: first sector, sectors, flags.
const RANGE_BYTES: usize = 16;
/// Most ranges in one discard or write of zeroes.
pub(super) const RANGES_MAX: usize = 16;
/// Most sectors in one such range (512 MiB).
pub(super) const RANGE_SECTORS_MAX: u32 = 1 << 20;
/// Most bytes one request may move. Above what seg_max and size_max allow a driver.
const REQUEST_BYTES_MAX: u64 = 16 << 20;
/// The flag of a range: the space may be given back.
const RANGE_UNMAP: u32 = 1;

/// How a request ended, in the guest's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    /// Done.
    Ok = 0,
    /// It failed, or cannot be done on this disk.
    IoError = 1,
    /// The device does not know it.
    Unsupported = 2,
}

/// A piece of the disk that is to become zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) may_unmap: bool,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Fill the data from the disk, from this offset on.
    Read { offset: u64 },
    /// Write the data to the disk, from this offset on.
    Write { offset: u64 },
    /// Make what was written outlive a loss of power.
    Flush,
    /// The guest has no use for these any more.
    Discard(Vec<Range>),
    /// Make these zeros.
    WriteZeroes(Vec<Range>),
    /// Fill the data with the serial number.
    Identify,
    /// Nothing: answer this.
    Answer(Status),
}

/// One request.
#[derive(Debug)]
pub(super) struct Request {
    /// The chain's first descriptor, which names the request to the driver.
    pub(super) head: u16,
    /// Where its status goes.
    pub(super) status: GuestAddress,
    /// What is to be moved; for reads and identification to the guest, for writes from it.
    pub(super) data: Stream,
    /// What is to be done.
    pub(super) work: Work,
}

impl Request {
    /// Reads the request at `head` of `queue`, made to a disk of `shape`.
    ///
    /// # Errors
    /// [`ChainError`] if it is none.
    pub(super) fn read<M: GuestMemory>(
        mem: &M,
        queue: &Queue,
        head: u16,
        indirect_agreed: bool,
        shape: &DiskShape,
    ) -> Result<Request, ChainError> {
        let mut found = chain::buffers(mem, queue, head, indirect_agreed)?;
        let mut header = [0; HEADER_BYTES];
        found.readable.read(mem, &mut header)?;
        let status = found.writable.take_last()?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let (kind, sector) = (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(sector));
        let (data, work) = match kind {
            kind::IN => {
                let work =
                    moved(&found.writable, sector, shape).map_or_else(Work::Answer, |offset| Work::Read { offset });
                (found.writable, work)
            }
            kind::OUT => {
                let place = writable(shape).and_then(|()| moved(&found.readable, sector, shape));
                (found.readable, place.map_or_else(Work::Answer, |offset| Work::Write { offset }))
            }
            kind::FLUSH => (Stream::default(), Work::Flush),
            kind::GET_ID => (found.writable, Work::Identify),
            kind::DISCARD => {
                let ranges = ranges(mem, &mut found.readable, 0, shape)?;
                (Stream::default(), ranges.map_or_else(Work::Answer, Work::Discard))
            }
            kind::WRITE_ZEROES => {
                let ranges = ranges(mem, &mut found.readable, RANGE_UNMAP, shape)?;
                (Stream::default(), ranges.map_or_else(Work::Answer, Work::WriteZeroes))
            }
            _ => (Stream::default(), Work::Answer(Status::Unsupported)),
        };
        Ok(Request { head, status, data, work })
    }
}

fn writable(shape: &DiskShape) -> Result<(), Status> {
    if shape.read_only { Err(Status::IoError) } else { Ok(()) }
}

/// Where on the disk `data` goes or comes from.
fn moved(data: &Stream, sector: u64, shape: &DiskShape) -> Result<u64, Status> {
    let bytes = data.bytes_left();
    if bytes == 0 || bytes > REQUEST_BYTES_MAX || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoError);
    }
    place(sector, bytes, shape)
}

/// The offset of `sector`, if `bytes` bytes from there on are all inside the disk.
fn place(sector: u64, bytes: u64, shape: &DiskShape) -> Result<u64, Status> {
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset.checked_add(bytes).ok_or(Status::IoError)?;
    if end <= shape.bytes { Ok(offset) } else { Err(Status::IoError) }
}

/// The ranges in `data`, of which each may have the flags `flags_known`.
fn ranges<M: GuestMemory>(
    mem: &M,
    data: &mut Stream,
    flags_known: u32,
    shape: &DiskShape,
) -> Result<Result<Vec<Range>, Status>, ChainError> {
    let bytes = usize::try_from(data.bytes_left()).unwrap_or(usize::MAX);
    if bytes == 0 || bytes > RANGES_MAX * RANGE_BYTES || !bytes.is_multiple_of(RANGE_BYTES) {
        return Ok(Err(Status::IoError));
    }
    let mut all = Vec::with_capacity(bytes / RANGE_BYTES);
    while data.bytes_left() > 0 {
        let mut range = [0; RANGE_BYTES];
        data.read(mem, &mut range)?;
        all.push(range);
    }
    Ok(writable(shape).and_then(|()| all.into_iter().map(|bytes| range(bytes, flags_known, shape)).collect()))
}

fn range(bytes: [u8; RANGE_BYTES], flags_known: u32, shape: &DiskShape) -> Result<Range, Status> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let (sectors, flags) = (u32::from_le_bytes([n0, n1, n2, n3]), u32::from_le_bytes(flags));
    if flags & !flags_known != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > RANGE_SECTORS_MAX {
        return Err(Status::IoError);
    }
    let bytes = u64::from(sectors) * SECTOR_BYTES;
    Ok(Range { offset: place(sector, bytes, shape)?, bytes, may_unmap: flags & RANGE_UNMAP != 0 })
}
