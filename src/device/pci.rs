//! The least of a PCI bus: its configuration ports, behind which there is a host bridge and nothing
//! else.
//!
//! No device of ours is on it. But a PC without these ports makes kernels complain at each boot,
//! and some then look for a bus in other, riskier ways.

use super::{DeviceStateError, StateReader};

/// First port: the address register (32 bit).
pub const PCI_PORT: u16 = 0xCF8;
/// How many ports there are; the data register takes the last four.
pub const PCI_PORTS: u16 = 8;
/// The version of the saved state this build writes.
pub const PCI_STATE_VERSION: u16 = 1;

/// Offset of the data register.
const DATA: usize = 4;
/// In the address: accesses to the data register are for configuration space.
const ENABLE: u32 = 1 << 31;
/// In the address: bus, device and function; the register is in the bits below.
const FUNCTION_MASK: u32 = 0x00ff_ff00;
const REGISTER_MASK: u32 = 0xfc;

/// The host bridge: vendor and device of a generic one, and its class.
const HOST_BRIDGE: [(usize, [u8; 4]); 2] = [(0x00, [0x36, 0x1b, 0x08, 0x00]), (0x08, [0x00, 0x00, 0x00, 0x06])];

/// The configuration ports.
#[derive(Default)]
pub struct PciPorts {
    address: u32,
}

impl PciPorts {
    /// The guest reads from the port at `offset` into `data`, which holds ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let offset = usize::from(offset);
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if offset >= DATA && self.address & ENABLE != 0 && self.address & FUNCTION_MASK == 0 {
            let register = (self.address & REGISTER_MASK) as usize + (offset - DATA);
            for (at, byte) in (register..).zip(data) {
                *byte = host_bridge(at);
            }
        }
    }

    /// The guest writes `data` to the port at `offset`. The host bridge has nothing that could be
    /// set.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if let (0, Ok(address)) = (offset, data.try_into()) {
            self.address = u32::from_le_bytes(address);
        }
    }

    /// Appends the saved state.
    pub fn save(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.address.to_le_bytes());
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`DeviceStateError`] if `bytes` are none; the ports are as they were then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceStateError> {
        let mut reader = StateReader::new(bytes);
        let address = reader.u32()?;
        reader.end()?;
        self.address = address;
        Ok(())
    }
}

/// A byte of the host bridge's configuration space.
fn host_bridge(at: usize) -> u8 {
    let word = HOST_BRIDGE.iter().find(|(start, _)| *start == at & !3);
    word.and_then(|(_, bytes)| bytes.get(at & 3)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(ports: &mut PciPorts, address: u32, offset: u16, length: usize) -> Vec<u8> {
        ports.write(0, &address.to_le_bytes());
        let mut data = vec![0xff; length];
        ports.read(offset, &mut data);
        data
    }

    #[test]
    fn there_is_a_host_bridge_and_nothing_else() {
        let mut ports = PciPorts::default();
        assert_eq!(config(&mut ports, 0x8000_0000, 4, 4), [0x36, 0x1b, 0x08, 0x00]);
        assert_eq!(config(&mut ports, 0x8000_0008, 6, 2), [0x00, 0x06], "its class");
        assert_eq!(config(&mut ports, 0x8000_000c, 6, 1), [0], "its kind of header");
        assert_eq!(config(&mut ports, 0x8000_00fc, 7, 4), [0; 4]);
        for elsewhere in [0x8000_0800, 0x8000_0100, 0x8001_0000, 0x0000_0000] {
            assert_eq!(config(&mut ports, elsewhere, 4, 4), [0xff; 4], "{elsewhere:#x}");
        }
    }

    #[test]
    fn the_address_is_kept_and_saved() {
        let mut ports = PciPorts::default();
        assert_eq!(config(&mut ports, 0x8000_1234, 0, 4), 0x8000_1234u32.to_le_bytes());
        // A byte there is for another device of old PCs.
        ports.write(3, &[1]);
        ports.write(0, &[1]);
        let mut saved = Vec::new();
        ports.save(&mut saved);
        let mut other = PciPorts::default();
        other.restore(&saved).expect("restore");
        assert_eq!(other.address, 0x8000_1234);
        assert!(other.restore(&saved[1..]).is_err() && other.restore(&[0; 5]).is_err());
    }
}
