//! The saved state of a virtio-rng device: its registers and its queue, nothing more.

use crate::device::virtio::mmio::Transport;
use crate::device::virtio::transport_persist::TransportState;
use crate::device::{DeviceStateError, StateReader};

/// The version of the saved state this build writes.
pub const RNG_STATE_VERSION: u16 = 1;

/// Appends the state of a device with these registers.
pub(super) fn write(transport: &Transport, out: &mut Vec<u8>) {
    TransportState::write(transport, out);
}

/// Reads a state.
pub(super) fn read(bytes: &[u8]) -> Result<TransportState, DeviceStateError> {
    let mut reader = StateReader::new(bytes);
    let state = TransportState::read(&mut reader)?;
    reader.end()?;
    Ok(state)
}
