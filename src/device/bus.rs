//! Which device answers at which port and address. The map is fixed, so the bus is a few comparisons.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use vm_memory::GuestMemory;

use super::net::NetBackend;
use super::pci::{PCI_PORT, PCI_PORTS, PCI_STATE_VERSION, PciPorts};
use super::serial::{SERIAL_PORT, SERIAL_PORTS, SERIAL_STATE_VERSION, SerialPort};
use super::virtio::net::{NET_STATE_VERSION, NetDevice};
use super::{DeviceStateError, Signals};

/// Guest-physical address of the first virtio-mmio device; device n is at `+ n * VIRTIO_WINDOW_BYTES`.
pub const VIRTIO_BASE: u64 = 0xD000_0000;
/// Bytes of a virtio-mmio device's window.
pub const VIRTIO_WINDOW_BYTES: u64 = 0x1000;
/// Interrupt line of the first virtio-mmio device; device n is on `+ n`. From here on the lines belong to the I/O APIC alone, so no
/// ISA device shares them.
pub const VIRTIO_GSI: u32 = 16;

/// Where a guest finds one virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioWindow {
    /// Guest-physical address of its registers, [`VIRTIO_WINDOW_BYTES`] long.
    pub address: u64,
    /// Its interrupt line, level-triggered.
    pub gsi: u32,
}

impl VirtioWindow {
    /// The window of device `number`, counted from 0.
    pub fn of(number: u8) -> VirtioWindow {
        let number = u32::from(number);
        VirtioWindow { address: VIRTIO_BASE + u64::from(number) * VIRTIO_WINDOW_BYTES, gsi: VIRTIO_GSI + number }
    }
}

/// The keyboard controller's command port, of which only the reset line exists.
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// The command that pulses the reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// ACPI's sleep control register (8 bit, out).
pub const POWER_PORT: u16 = 0x608;
/// ACPI's sleep status register (8 bit): always 0, because the machine never wakes up from a sleep.
pub const POWER_STATUS_PORT: u16 = 0x609;
/// ACPI's reset register (8 bit, out).
pub const RESET_PORT: u16 = 0x60a;
/// What a guest writes there.
pub const RESET_VALUE: u8 = 1;
/// The sleep type that powers off, as the guest is told it.
pub const SLEEP_TYPE_OFF: u8 = 5;
/// The sleep control register's bits: go to sleep, and where the sleep type is.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
/// What powers off.
const SLEEP_OFF: u8 = SLEEP_ENABLE | SLEEP_TYPE_OFF << SLEEP_TYPE_SHIFT;

/// What a port write makes the machine do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortEffect {
    /// Nothing more.
    None,
    /// The guest asked for a reset.
    Reset,
    /// The guest switched itself off.
    Off,
}

/// The devices of one machine.
pub struct Bus<M: GuestMemory + Send + Sync + 'static> {
    serial: Mutex<SerialPort>,
    pci: Mutex<PciPorts>,
    net: NetDevice<M>,
}

/// A saved device: which, in which version, and its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The serial console.
    Serial,
    /// The network device.
    Net,
    /// The PCI configuration ports.
    Pci,
}

impl DeviceKind {
    /// Every device, in the order of restoring.
    pub const ALL: [DeviceKind; 3] = [DeviceKind::Serial, DeviceKind::Net, DeviceKind::Pci];

    /// The version of the saved state this build writes.
    pub fn version(self) -> u16 {
        match self {
            DeviceKind::Serial => SERIAL_STATE_VERSION,
            DeviceKind::Net => NET_STATE_VERSION,
            DeviceKind::Pci => PCI_STATE_VERSION,
        }
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Bus<M> {
    /// The devices of a machine with memory `mem`: a serial console, and a network card with address `mac` in `backend`.
    ///
    /// # Errors
    /// If the host gives no eventfd or thread.
    pub fn new(
        mem: M,
        mac: [u8; 6],
        backend: Arc<dyn NetBackend>,
        console: Box<dyn Write + Send>,
        signals: Arc<dyn Signals>,
    ) -> io::Result<Bus<M>> {
        let serial = Mutex::new(SerialPort::new(console, Arc::clone(&signals)));
        let pci = Mutex::default();
        Ok(Bus { serial, pci, net: NetDevice::new(mem, mac, VirtioWindow::of(0).gsi, backend, signals)? })
    }

    /// The guest reads `data.len()` bytes from `port`. Where nothing is, it reads ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(register) = serial_register(port) {
            let mut serial = self.serial.lock();
            data.iter_mut().for_each(|byte| *byte = serial.read(register));
        } else if let Some(offset) = pci_offset(port) {
            self.pci.lock().read(offset, data);
        } else if matches!(port, KEYBOARD_COMMAND_PORT | POWER_PORT | POWER_STATUS_PORT) {
            // No key was pressed and the controller is idle; the machine did not wake up from a sleep.
            data.fill(0);
        }
    }

    /// The guest writes `data` to `port`: more than one byte if it used a string instruction.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortEffect {
        if let Some(register) = serial_register(port) {
            let mut serial = self.serial.lock();
            data.iter().for_each(|byte| serial.write(register, *byte));
            return PortEffect::None;
        }
        if let Some(offset) = pci_offset(port) {
            self.pci.lock().write(offset, data);
            return PortEffect::None;
        }
        match (port, data.last()) {
            (KEYBOARD_COMMAND_PORT, Some(&KEYBOARD_RESET)) | (RESET_PORT, Some(&RESET_VALUE)) => PortEffect::Reset,
            (POWER_PORT, Some(&SLEEP_OFF)) => PortEffect::Off,
            _ => PortEffect::None,
        }
    }

    /// The guest reads `data.len()` bytes at guest-physical `address`. Where nothing is, it reads ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match net_offset(address) {
            Some(offset) => self.net.mmio_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes `data` at guest-physical `address`.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some(offset) = net_offset(address) {
            self.net.mmio_write(offset, data);
        }
    }

    /// Where the guest finds its virtio devices, for whoever tells it.
    pub fn virtio_windows(&self) -> Vec<VirtioWindow> {
        vec![VirtioWindow::of(0)]
    }

    /// Input of the serial console.
    pub fn console_input(&self, bytes: &[u8]) {
        self.serial.lock().input(bytes);
    }

    /// See [`NetDevice::kick`].
    pub fn kick_net(&self) {
        self.net.kick();
    }

    /// Keeps every device thread out of guest memory and input out of the devices; returns when that is so.
    pub fn quiesce(&self) {
        self.serial.lock().hold(true);
        self.net.quiesce();
    }

    /// Lets the device threads work again.
    pub fn unquiesce(&self) {
        self.serial.lock().hold(false);
        self.net.unquiesce();
    }

    /// Appends the saved state of a device. The machine must be paused.
    pub fn save(&self, device: DeviceKind, out: &mut Vec<u8>) {
        match device {
            DeviceKind::Serial => self.serial.lock().save(out),
            DeviceKind::Net => self.net.save(out),
            DeviceKind::Pci => self.pci.lock().save(out),
        }
    }

    /// Takes over the saved state of a device. The machine must be paused.
    ///
    /// # Errors
    /// [`DeviceStateError`] if `bytes` are no state of it; it is as it was then.
    pub fn restore(&self, device: DeviceKind, bytes: &[u8]) -> Result<(), DeviceStateError> {
        match device {
            DeviceKind::Serial => self.serial.lock().restore(bytes),
            DeviceKind::Net => self.net.restore(bytes),
            DeviceKind::Pci => self.pci.lock().restore(bytes),
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT).filter(|r| *r < SERIAL_PORTS)?;
    u8::try_from(register).ok()
}

fn pci_offset(port: u16) -> Option<u16> {
    port.checked_sub(PCI_PORT).filter(|offset| *offset < PCI_PORTS)
}

fn net_offset(address: u64) -> Option<u64> {
    address.checked_sub(VIRTIO_BASE).filter(|offset| *offset < VIRTIO_WINDOW_BYTES)
}
