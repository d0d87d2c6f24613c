//! The serial console: a 16550 at port 0x3F8 on interrupt 4. What the guest writes waits here until
//! it is taken, so that no console can block whoever needs the port; what a person types waits here
//! until the guest takes it.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

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
/// Most bytes that wait outside of the FIFO; more are lost, as on any serial line.
const WAITING_BYTES_MAX: usize = 64 << 10;
/// The register that hands over input.
const DATA_REGISTER: u8 = 0;

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
    serial: Serial<SerialIrq, NoEvents, Vec<u8>>,
    signals: Arc<dyn Signals>,
    /// Typed, and not yet in the FIFO. Not part of the saved state: for the guest it is still on
    /// the line.
    waiting: VecDeque<u8>,
    /// The machine is paused: nothing goes into the FIFO, whose interrupt a capture could miss.
    held: bool,
}

impl SerialPort {
    /// A serial port that takes no input yet.
    pub fn new(signals: Arc<dyn Signals>) -> SerialPort {
        let irq = SerialIrq { signals: Arc::clone(&signals) };
        SerialPort { serial: Serial::new(irq, Vec::new()), signals, waiting: VecDeque::new(), held: true }
    }

    /// The guest reads register `register` (0 to 7).
    pub fn read(&mut self, register: u8) -> u8 {
        let value = self.serial.read(register);
        if register == DATA_REGISTER {
            self.fill();
        }
        value
    }

    /// Takes input for the guest; what there is no room for is lost.
    pub fn input(&mut self, bytes: &[u8]) {
        let room = WAITING_BYTES_MAX.saturating_sub(self.waiting.len());
        self.waiting.extend(bytes.iter().take(room));
        self.fill();
    }

    /// Keeps input out of the port while the machine is paused, or lets it in again.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
        self.fill();
    }

    /// Moves waiting input into an empty FIFO, which raises the interrupt.
    fn fill(&mut self) {
        if self.held || self.waiting.is_empty() || self.serial.fifo_capacity() < INPUT_BYTES_MAX {
            return;
        }
        let next: Vec<u8> = self.waiting.iter().take(INPUT_BYTES_MAX).copied().collect();
        // In loopback mode the port takes none; the guest's next read asks again.
        let taken = self.serial.enqueue_raw_bytes(&next).unwrap_or(0);
        self.waiting.drain(..taken);
    }

    /// What the guest has written since the last call.
    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(self.serial.writer_mut())
    }

    /// The guest writes register `register`.
    pub fn write(&mut self, register: u8, value: u8) {
        // Neither a vector nor the interrupt line can fail.
        let _ = self.serial.write(register, value);
        if register != DATA_REGISTER {
            // It may have left loopback mode.
            self.fill();
        }
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
        self.serial = Serial::from_state(&state, irq, NoEvents, self.take_output())
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
        let mut port = SerialPort::new(Arc::new(Recorder::default()));
        port.write(3, 0x80);
        port.write(0, 0x0c);
        port.write(3, 0x03);
        port.write(7, 0x5a);
        let mut bytes = Vec::new();
        port.save(&mut bytes);
        let mut other = SerialPort::new(Arc::new(Recorder::default()));
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
    fn input_of_any_length_arrives_in_order_with_interrupts() {
        let recorder = Arc::new(Recorder::default());
        let mut port = SerialPort::new(recorder.clone());
        // The guest wants an interrupt for input.
        port.write(1, 1);
        recorder.lines.lock().clear();
        let typed: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        port.input(&typed);
        assert!(recorder.lines.lock().is_empty(), "the machine is paused");
        port.hold(false);
        let mut read = Vec::new();
        while port.read(5) & 1 == 1 {
            read.push(port.read(0));
        }
        assert!(read == typed);
        let raised = recorder.lines.lock().iter().filter(|line| **line == (SERIAL_GSI, true)).count();
        assert_eq!(raised, typed.len().div_ceil(INPUT_BYTES_MAX));
        port.input(&vec![b'x'; WAITING_BYTES_MAX * 2]);
        assert_eq!(port.waiting.len(), WAITING_BYTES_MAX - INPUT_BYTES_MAX);
    }

    #[test]
    fn output_waits_until_it_is_taken_also_across_a_restore() {
        let mut port = SerialPort::new(Arc::new(Recorder::default()));
        port.write(0, b'a');
        let mut bytes = Vec::new();
        port.save(&mut bytes);
        port.restore(&bytes).expect("restore");
        port.write(0, b'b');
        assert_eq!(port.take_output(), b"ab");
        assert!(port.take_output().is_empty(), "taken once");
    }
}
