//! What a driver learns of a disk before its first request: features and configuration space.

use super::request::{RANGE_SECTORS_MAX, RANGES_MAX};
use crate::protocol::machine_shape::{DiskShape, SECTOR_BYTES};

/// The configuration says how large a buffer may be.
const F_SIZE_MAX: u64 = 1 << 1;
/// The configuration says how many buffers a request may have.
const F_SEG_MAX: u64 = 1 << 2;
/// The disk cannot be written.
const F_RO: u64 = 1 << 5;
/// The configuration says how large a block is.
const F_BLK_SIZE: u64 = 1 << 6;
/// The device knows flush; without it what is written is flushed at once.
pub(super) const F_FLUSH: u64 = 1 << 9;
/// The device knows discard.
const F_DISCARD: u64 = 1 << 13;
/// The device knows write zeroes.
const F_WRITE_ZEROES: u64 = 1 << 14;
/// A chain may be a table of its own.
pub(super) const F_INDIRECT_DESC: u64 = 1 << 28;

/// Most requests in the queue.
pub(super) const QUEUE_SIZE_MAX: u16 = 128;
/// Most buffers of data in a request: with header and status they fill the queue.
const SEG_MAX: u32 = QUEUE_SIZE_MAX as u32 - 2;
/// Most bytes in one buffer.
const SIZE_MAX: u32 = 64 << 10;
/// Bytes of the configuration space.
pub(super) const CONFIG_BYTES: usize = 60;

/// What a disk of `shape` offers.
pub(super) fn features(shape: &DiskShape) -> u64 {
    let always = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_INDIRECT_DESC;
    always | if shape.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES }
}

/// The configuration space of a disk of `shape` (virtio 1.2, 5.2.4).
pub(super) fn bytes(shape: &DiskShape) -> [u8; CONFIG_BYTES] {
    let mut config = [0; CONFIG_BYTES];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(field) = config.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    };
    put(0, &(shape.bytes / SECTOR_BYTES).to_le_bytes());
    put(8, &SIZE_MAX.to_le_bytes());
    put(12, &SEG_MAX.to_le_bytes());
    put(20, &(SECTOR_BYTES as u32).to_le_bytes());
    if !shape.read_only {
        // Discard: sectors in a range, ranges, alignment in sectors.
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &(RANGES_MAX as u32).to_le_bytes());
        put(44, &1u32.to_le_bytes());
        // Write zeroes: sectors in a range, ranges, and whether it may give space back.
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &(RANGES_MAX as u32).to_le_bytes());
        put(56, &[1]);
    }
    config
}
