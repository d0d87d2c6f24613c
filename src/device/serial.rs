//! The serial console: a 16550 at port 0x3F8 on interrupt 4. What the guest writes goes to the console given to the machine.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use super::{DeviceStateError, Signals, StateReader};

/// First port of the serial console.
pub const SERIAL_PORT: u16 = 0x3F8;
/// How many ports it has.
pub const SERIAL_PORTS: u16 = 8;
/// Its interrupt line.
pub const SERIAL_GSI: u32 = 4;
/// The version of the saved state this build writes.
pub const SERIAL_STATE_VERSION: u16 = 1;
/// Most bytes its input may hold (the 16550's FIFO as vm-superio has it).
const INPUT_BYTES_MAX: usize = 64;

/// The console writer, kept across restores.
#[derive(Clone)]
struct Console(Arc<Mutex<Box<dyn Write + Send>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().flush()
    }
}

/// The interrupt of the serial port: edge-triggered, as ISA has it.
struct SerialIrq {
    signals: Arc<dyn Signals>,
}

impl Trigger for SerialIrq {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.signals.set_irq(SERIAL_GSI, true);
        self.signals.set_irq(SERIAL_GSI, false);
        Ok(())
    }
}

/// The serial console.
pub struct SerialPort {
    serial: Serial<SerialIrq, NoEvents, Console>,
    console: Console,
    signals: Arc<dyn Signals>,
}

impl SerialPort {
    /// A serial port that writes to `console`. The writer must not block for long: a vCPU waits for it.
    pub fn new(console: Box<dyn Write + Send>, signals: Arc<dyn Signals>) -> SerialPort {
        let console = Console(Arc::new(Mutex::new(console)));
        let irq = SerialIrq { signals: Arc::clone(&signals) };
        SerialPort { serial: Serial::new(irq, console.clone()), console, signals }
    }

    /// The guest reads register `register` (0 to 7).
    pub fn read(&mut self, register: u8) -> u8 {
        self.serial.read(register)
    }

    /// The guest writes register `register`. A console that fails loses the byte: the guest has no use for the error.
    pub fn write(&mut self, register: u8, value: u8) {
        let _ = self.serial.write(register, value);
    }

    /// Appends the saved state.
    pub fn save(&self, out: &mut Vec<u8>) {
        let state = self.serial.state();
        out.extend_from_slice(&[
            state.baud_divisor_low,
            state.baud_divisor_high,
            state.interrupt_enable,
            state.interrupt_identification,
            state.line_control,
            state.line_status,
            state.modem_control,
            state.modem_status,
            state.scratch,
            state.in_buffer.len() as u8,
        ]);
        out.extend_from_slice(&state.in_buffer);
    }

    /// Takes over a saved state.
    ///
    /// # Errors
    /// [`DeviceStateError`] if `bytes` are none; the port is as it was then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<(), DeviceStateError> {
        let mut reader = StateReader::new(bytes);
        let [low, high, enable, identification, line_control, line_status, modem_control, modem_status, scratch] =
            reader.array::<9>()?;
        let length = usize::from(reader.u8()?);
        if length > INPUT_BYTES_MAX {
            return Err(DeviceStateError::new(format!("serial input of {length} bytes")));
        }
        let in_buffer = reader.bytes(length)?.to_vec();
        reader.end()?;
        let state = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: enable,
            interrupt_identification: identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        let irq = SerialIrq { signals: Arc::clone(&self.signals) };
        self.serial = Serial::from_state(&state, irq, NoEvents, self.console.clone())
            .map_err(|_| DeviceStateError::new("serial state was refused"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::virtio::test_support::Recorder;

    #[test]
    fn state_survives_and_garbage_does_not() {
        let mut port = SerialPort::new(Box::new(io::sink()), Arc::new(Recorder::default()));
        port.write(3, 0x80);
        port.write(0, 0x0c);
        port.write(3, 0x03);
        port.write(7, 0x5a);
        let mut bytes = Vec::new();
        port.save(&mut bytes);
        let mut other = SerialPort::new(Box::new(io::sink()), Arc::new(Recorder::default()));
        other.restore(&bytes).expect("restore");
        let mut again = Vec::new();
        other.save(&mut again);
        assert_eq!(bytes, again);
        assert_eq!(other.read(7), 0x5a);
        for cut in 0..bytes.len() {
            assert!(other.restore(&bytes[..cut]).is_err());
        }
        bytes[9] = 65;
        assert!(other.restore(&bytes).is_err());
    }

    #[test]
    fn the_console_outlives_a_restore() {
        let sink = Arc::new(Mutex::new(Vec::new()));
        struct Shared(Arc<Mutex<Vec<u8>>>);
        impl Write for Shared {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut port = SerialPort::new(Box::new(Shared(Arc::clone(&sink))), Arc::new(Recorder::default()));
        port.write(0, b'a');
        let mut bytes = Vec::new();
        port.save(&mut bytes);
        port.restore(&bytes).expect("restore");
        port.write(0, b'b');
        assert_eq!(sink.lock().as_slice(), b"ab");
    }
}
