//! Floor 2: the devices of a machine. They know guest memory through vm-memory's trait and
//! everything else through [`Signals`].

pub mod block;
pub mod bus;
pub mod driver_looks;
pub mod image;
pub mod image_format;
pub mod net;
pub mod pci;
pub mod serial;
pub mod shared_image;
pub mod virtio;

use thiserror::Error;

pub use block::{BlockBackend, Stored};
pub use bus::Bus;
pub use net::{NetBackend, Offloads, Transmit};

/// What a device can make happen outside itself. The machine implements it.
pub trait Signals: Send + Sync {
    /// Sets the level of interrupt line `gsi`; returns when the interrupt controllers have seen it.
    fn set_irq(&self, gsi: u32, active: bool);
    /// A buffer was used: wakes every vCPU that sleeps in the wait port.
    fn ring(&self);
    /// The guest broke the rules of `device`, which now does nothing until the guest resets it. A
    /// guest can bring this about as often as it likes.
    fn broken(&self, device: &'static str, reason: &str);
    /// A device's thread that was to be quiet has become so: whoever waits for that looks again.
    /// Called with a device's lock held; it must not block.
    fn quiesced(&self);
}

/// Why a device's saved state was refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what}")]
pub struct DeviceStateError {
    /// What is wrong with it.
    pub what: String,
}

impl DeviceStateError {
    fn new(what: impl Into<String>) -> DeviceStateError {
        DeviceStateError { what: what.into() }
    }
}

/// Reads little-endian fields off the front of a device's saved state.
struct StateReader<'a> {
    rest: &'a [u8],
}

impl<'a> StateReader<'a> {
    fn new(bytes: &'a [u8]) -> StateReader<'a> {
        StateReader { rest: bytes }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DeviceStateError> {
        let (head, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| DeviceStateError::new("it was cut off"))?;
        self.rest = rest;
        Ok(*head)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], DeviceStateError> {
        let (head, rest) = self.rest.split_at_checked(length).ok_or_else(|| DeviceStateError::new("it was cut off"))?;
        self.rest = rest;
        Ok(head)
    }

    fn u8(&mut self) -> Result<u8, DeviceStateError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, DeviceStateError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, DeviceStateError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, DeviceStateError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn flag(&mut self) -> Result<bool, DeviceStateError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DeviceStateError::new(format!("{other} is no truth value"))),
        }
    }

    fn end(self) -> Result<(), DeviceStateError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(DeviceStateError::new(format!("{left} bytes too many"))),
        }
    }
}
