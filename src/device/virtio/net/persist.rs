//! The saved state of a virtio-net device, and its byte form.
//!
//! What is not in it on purpose: whether the device waits for the guest's receive buffers and
//! whether its interrupt line is up. Both follow from the rest and are found again at resume.

use crate::device::virtio::mmio::Transport;
use crate::device::virtio::transport_persist::TransportState;
use crate::device::{DeviceStateError, StateReader};

/// The version of the saved state this build writes.
pub const NET_STATE_VERSION: u16 = 1;

/// The saved state of a virtio-net device.
pub(super) struct NetState {
    pub(super) mac: [u8; 6],
    /// A frame stands in the transmit queue for want of room outside.
    pub(super) transmit_stalled: bool,
    pub(super) transport: TransportState,
}

impl NetState {
    /// Appends the state of a device with these registers.
    pub(super) fn write(transport: &Transport, mac: [u8; 6], transmit_stalled: bool, out: &mut Vec<u8>) {
        out.extend_from_slice(&mac);
        out.push(u8::from(transmit_stalled));
        TransportState::write(transport, out);
    }

    /// Reads a state.
    pub(super) fn read(bytes: &[u8]) -> Result<NetState, DeviceStateError> {
        let mut reader = StateReader::new(bytes);
        let state = NetState {
            mac: reader.array()?,
            transmit_stalled: reader.flag()?,
            transport: TransportState::read(&mut reader)?,
        };
        reader.end()?;
        Ok(state)
    }
}
