//! The saved state of a virtio-blk device, and its byte form.
//!
//! In flight are the requests that were taken off the ring and not answered. Their descriptors
//! still belong to the device and what they ask can be done twice, so the heads of their chains are
//! enough: they are read and done again from scratch. What a request had got from the disk when the
//! state was saved is not in it.
//!
//! What is not in it on purpose: whether the device waits for room, and whether its interrupt line
//! is up. Both are found again.

use std::collections::VecDeque;

use crate::device::virtio::mmio::Transport;
use crate::device::virtio::transport_persist::TransportState;
use crate::device::{DeviceStateError, StateReader};
use crate::protocol::machine_shape::DiskShape;

/// The version of the saved state this build writes.
pub const BLK_STATE_VERSION: u16 = 1;

/// The saved state of a virtio-blk device.
pub(super) struct BlkState {
    pub(super) transport: TransportState,
    /// The heads of the chains in flight, oldest first.
    pub(super) in_flight: VecDeque<u16>,
}

impl BlkState {
    /// Appends the state of a device with these registers, in front of a disk of `shape`.
    pub(super) fn write(shape: &DiskShape, transport: &Transport, in_flight: &VecDeque<u16>, out: &mut Vec<u8>) {
        out.extend_from_slice(&shape.bytes.to_le_bytes());
        out.push(u8::from(shape.read_only));
        out.extend_from_slice(&shape.serial);
        TransportState::write(transport, out);
        // Never more than a queue has.
        out.extend_from_slice(&(in_flight.len() as u16).to_le_bytes());
        for head in in_flight {
            out.extend_from_slice(&head.to_le_bytes());
        }
    }

    /// Reads a state of a disk of `shape`.
    pub(super) fn read(bytes: &[u8], shape: &DiskShape) -> Result<BlkState, DeviceStateError> {
        let mut reader = StateReader::new(bytes);
        let (bytes, read_only, serial) = (reader.u64()?, reader.flag()?, reader.array()?);
        let saved = DiskShape { bytes, read_only, shared: shape.shared, serial };
        if saved != *shape {
            return Err(DeviceStateError::new(format!(
                "the state is of a disk of {} bytes (this one has {}), \
                    or its serial number or its being read-only differs",
                saved.bytes, shape.bytes
            )));
        }
        let transport = TransportState::read(&mut reader)?;
        let queue_size = transport.queue_size(0);
        let mut in_flight = VecDeque::new();
        for _ in 0..reader.u16()? {
            let head = reader.u16()?;
            // So there are at most as many as the queue has.
            if head >= queue_size || in_flight.contains(&head) {
                return Err(DeviceStateError::new(format!("a request in flight at descriptor {head}")));
            }
            in_flight.push_back(head);
        }
        reader.end()?;
        Ok(BlkState { transport, in_flight })
    }
}
