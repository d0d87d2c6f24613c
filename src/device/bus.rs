//! Which device answers at which port and address.
//!
//! The ports are fixed. The virtio devices have a window of registers and an interrupt line each,
//! numbered from 0: first the network card, then the disks in the order of the machine's shape,
//! then the source of random bytes if there is one. With at most six disks the lines are 16 to 23,
//! the last ones the I/O APIC has.

use std::io::{self, Write};
use std::sync::Arc;

use parking_lot::Mutex;
use vm_memory::GuestMemory;

use super::block::BlockBackend;
use super::driver_looks::DriverLooks;
use super::net::NetBackend;
use super::pci::{PCI_PORT, PCI_PORTS, PCI_STATE_VERSION, PciPorts};
use super::serial::{SERIAL_PORT, SERIAL_PORTS, SERIAL_STATE_VERSION, SerialPort};
use super::virtio::blk::{BLK_STATE_VERSION, BlkDevice};
use super::virtio::net::{NET_STATE_VERSION, NetDevice};
use super::virtio::rng::{RNG_STATE_VERSION, RngDevice};
use super::{DeviceStateError, Signals};
use crate::protocol::machine_shape::MachineShape;

/// Guest-physical address of the first virtio-mmio device; device n is at `+ n *
/// VIRTIO_WINDOW_BYTES`.
pub const VIRTIO_BASE: u64 = 0xD000_0000;
/// Bytes of a virtio-mmio device's window.
pub const VIRTIO_WINDOW_BYTES: u64 = 0x1000;
/// Interrupt line of the first virtio-mmio device; device n is on `+ n`. From here on the lines
/// belong to the I/O APIC alone, so no ISA device shares them.
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
    /// Where the serial port's output goes. Never locked together with the port: a console that
    /// blocks holds up the vCPU that writes to it and nobody else.
    console: Mutex<Box<dyn Write + Send>>,
    pci: Mutex<PciPorts>,
    net: NetDevice<M>,
    disks: Vec<BlkDevice<M>>,
    rng: Option<RngDevice<M>>,
    devices: Vec<DeviceId>,
    looks: Arc<DriverLooks>,
}

/// What a device is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    /// The serial console.
    Serial,
    /// The network device.
    Net,
    /// A disk.
    Block,
    /// The source of random bytes.
    Rng,
    /// The PCI configuration ports.
    Pci,
}

impl DeviceKind {
    /// The version of the saved state this build writes.
    pub fn version(self) -> u16 {
        match self {
            DeviceKind::Serial => SERIAL_STATE_VERSION,
            DeviceKind::Net => NET_STATE_VERSION,
            DeviceKind::Block => BLK_STATE_VERSION,
            DeviceKind::Rng => RNG_STATE_VERSION,
            DeviceKind::Pci => PCI_STATE_VERSION,
        }
    }
}

/// One device that has a state to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceId {
    /// What it is.
    pub kind: DeviceKind,
    /// Which of its kind, from 0.
    pub instance: u16,
}

impl<M: GuestMemory + Clone + Send + Sync + 'static> Bus<M> {
    /// The devices of a machine of `shape` with memory `mem`: a serial console, a network card in
    /// `net`, a disk in each of `disks`, and perhaps a source of random bytes. Those with threads
    /// begin paused.
    ///
    /// # Errors
    /// If there is not one backend of the right size for each disk, or the host gives no eventfd or
    /// thread.
    pub fn new(
        mem: M,
        shape: &MachineShape,
        net: Arc<dyn NetBackend>,
        disks: Vec<Arc<dyn BlockBackend>>,
        console: Box<dyn Write + Send>,
        signals: Arc<dyn Signals>,
    ) -> io::Result<Bus<M>> {
        if disks.len() != shape.disks.len() {
            let why = format!("the guest is to have {} disks, {} are given", shape.disks.len(), disks.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let mut windows = (0u8..).map(VirtioWindow::of);
        let mut gsi = || windows.next().map_or(VIRTIO_GSI, |window| window.gsi);
        let net = NetDevice::new(mem.clone(), shape.mac, gsi(), net, Arc::clone(&signals))?;
        let mut blocks = Vec::with_capacity(disks.len());
        for ((number, disk), backend) in (0u16..).zip(&shape.disks).zip(disks) {
            blocks.push(BlkDevice::new(mem.clone(), number, disk, gsi(), backend, Arc::clone(&signals))?);
        }
        let rng = match shape.rng {
            true => Some(RngDevice::new(mem, gsi(), Arc::clone(&signals))?),
            false => None,
        };
        let id = |kind, instance| DeviceId { kind, instance };
        let mut devices = vec![id(DeviceKind::Serial, 0), id(DeviceKind::Net, 0), id(DeviceKind::Pci, 0)];
        devices.extend((0u16..).zip(&blocks).map(|(instance, _)| id(DeviceKind::Block, instance)));
        devices.extend(rng.iter().map(|_| id(DeviceKind::Rng, 0)));
        let serial = Mutex::new(SerialPort::new(signals));
        let names = std::iter::once("network card".to_owned());
        let names = names.chain((0..blocks.len()).map(|number| format!("disk {number}")));
        let names = names.chain(rng.iter().map(|_| "random source".to_owned()));
        let looks = Arc::new(DriverLooks::new(names.collect()));
        Ok(Bus { serial, console: Mutex::new(console), pci: Mutex::default(), net, disks: blocks, rng, devices, looks })
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Bus<M> {
    /// The guest reads `data.len()` bytes from `port`. Where nothing is, it reads ones.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(register) = serial_register(port) {
            let mut serial = self.serial.lock();
            data.iter_mut().for_each(|byte| *byte = serial.read(register));
        } else if let Some(offset) = pci_offset(port) {
            self.pci.lock().read(offset, data);
        } else if matches!(port, KEYBOARD_COMMAND_PORT | POWER_PORT | POWER_STATUS_PORT) {
            // No key was pressed and the controller is idle; the machine did not wake up from a
            // sleep.
            data.fill(0);
        }
    }

    /// The guest writes `data` to `port`: more than one byte if it used a string instruction.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortEffect {
        if let Some(register) = serial_register(port) {
            let mut serial = self.serial.lock();
            data.iter().for_each(|byte| serial.write(register, *byte));
            let output = serial.take_output();
            drop(serial);
            self.write_console(&output);
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

    /// A console that fails loses the bytes: the guest has no use for the error.
    fn write_console(&self, output: &[u8]) {
        if !output.is_empty() {
            let mut console = self.console.lock();
            let _ = console.write_all(output).and_then(|()| console.flush());
        }
    }

    /// The guest reads `data.len()` bytes at guest-physical `address`. Where nothing is, it reads
    /// ones.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.virtio_at(address) {
            Some((Virtio::Net(net), offset)) => net.mmio_read(offset, data),
            Some((Virtio::Disk(disk), offset)) => disk.mmio_read(offset, data),
            Some((Virtio::Rng(rng), offset)) => rng.mmio_read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes `data` at guest-physical `address`.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        match self.virtio_at(address) {
            Some((Virtio::Net(net), offset)) => net.mmio_write(offset, data),
            Some((Virtio::Disk(disk), offset)) => disk.mmio_write(offset, data),
            Some((Virtio::Rng(rng), offset)) => rng.mmio_write(offset, data),
            None => {}
        }
    }

    /// Where the guest finds its virtio devices: what boot writes into its tables.
    pub fn virtio_windows(&self) -> Vec<VirtioWindow> {
        let count = 1 + self.disks.len() + usize::from(self.rng.is_some());
        (0u8..).take(count).map(VirtioWindow::of).collect()
    }

    /// The virtio device with registers at `address`, and the offset among them.
    fn virtio_at(&self, address: u64) -> Option<(Virtio<'_, M>, u64)> {
        let from_base = address.checked_sub(VIRTIO_BASE)?;
        let number = usize::try_from(from_base / VIRTIO_WINDOW_BYTES).ok()?;
        self.looks.seen(number);
        let device = match number.checked_sub(1) {
            None => Virtio::Net(&self.net),
            Some(disk) if disk == self.disks.len() => Virtio::Rng(self.rng.as_ref()?),
            Some(disk) => Virtio::Disk(self.disks.get(disk)?),
        };
        Some((device, from_base % VIRTIO_WINDOW_BYTES))
    }

    /// Which virtio devices a driver has looked at.
    pub fn driver_looks(&self) -> Arc<DriverLooks> {
        Arc::clone(&self.looks)
    }

    /// Input of the serial console.
    pub fn console_input(&self, bytes: &[u8]) {
        self.serial.lock().input(bytes);
    }

    /// See [`NetDevice::kick`].
    pub fn kick_net(&self) {
        self.net.kick();
    }

    /// See [`BlkDevice::kick`]; all disks.
    pub fn kick_disks(&self) {
        self.disks.iter().for_each(BlkDevice::kick);
    }

    /// From now on no disk's thread touches guest memory or changes its disk;
    /// [`Bus::busy_disk`] says whether one still does. Never blocks, however slow a disk is.
    pub fn begin_quiesce_disks(&self) {
        self.disks.iter().for_each(BlkDevice::begin_quiesce);
    }

    /// A disk whose thread is not quiet yet, counted from 0.
    pub fn busy_disk(&self) -> Option<usize> {
        self.disks.iter().position(|disk| !disk.is_quiet())
    }

    /// The same for the network card's thread ([`Bus::net_is_quiet`]); input stays out of the
    /// serial port, and a vCPU that serves a queue stops after the chain it is at.
    pub fn begin_quiesce(&self) {
        self.net.begin_quiesce();
        self.rng.iter().for_each(RngDevice::begin_quiesce);
        self.serial.lock().hold(true);
    }

    /// True when the network card's thread is out of guest memory.
    pub fn net_is_quiet(&self) -> bool {
        self.net.is_quiet()
    }

    /// Lets all devices work again.
    pub fn unquiesce(&self) {
        self.serial.lock().hold(false);
        self.net.unquiesce();
        self.disks.iter().for_each(BlkDevice::unquiesce);
        self.rng.iter().for_each(RngDevice::unquiesce);
    }

    /// Every device with a state, in the order of saving and restoring.
    pub fn devices(&self) -> &[DeviceId] {
        &self.devices
    }

    /// Appends the saved state of a device; nothing if there is none such. The machine must be
    /// paused.
    pub fn save(&self, device: DeviceId, out: &mut Vec<u8>) {
        match device.kind {
            DeviceKind::Serial => self.serial.lock().save(out),
            DeviceKind::Net => self.net.save(out),
            DeviceKind::Pci => self.pci.lock().save(out),
            DeviceKind::Block => {
                self.disks.get(usize::from(device.instance)).into_iter().for_each(|disk| disk.save(out))
            }
            DeviceKind::Rng => self.rng.iter().for_each(|rng| rng.save(out)),
        }
    }

    /// Takes over the saved state of a device. The machine must be paused.
    ///
    /// # Errors
    /// [`DeviceStateError`] if there is no such device, or `bytes` are no state of it; it is as it
    /// was then.
    pub fn restore(&self, device: DeviceId, bytes: &[u8]) -> Result<(), DeviceStateError> {
        let missing = || DeviceStateError::new("the machine has no such device");
        self.looks.restored();
        match device.kind {
            DeviceKind::Serial => self.serial.lock().restore(bytes),
            DeviceKind::Net => self.net.restore(bytes),
            DeviceKind::Pci => self.pci.lock().restore(bytes),
            DeviceKind::Block => self.disks.get(usize::from(device.instance)).ok_or_else(missing)?.restore(bytes),
            DeviceKind::Rng => self.rng.as_ref().ok_or_else(missing)?.restore(bytes),
        }
    }
}

/// A virtio device, whichever it is.
enum Virtio<'a, M: GuestMemory + Send + Sync + 'static> {
    Net(&'a NetDevice<M>),
    Disk(&'a BlkDevice<M>),
    Rng(&'a RngDevice<M>),
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT).filter(|r| *r < SERIAL_PORTS)?;
    u8::try_from(register).ok()
}

fn pci_offset(port: u16) -> Option<u16> {
    port.checked_sub(PCI_PORT).filter(|offset| *offset < PCI_PORTS)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, RawFd};

    use vm_memory::{GuestAddress, GuestMemoryMmap};

    use super::super::net::Transmit;
    use super::super::virtio::test_support::Recorder;
    use super::*;

    /// A network without anything in it.
    struct Quiet(std::fs::File);

    impl NetBackend for Quiet {
        fn transmit(&self, _frame: &[u8]) -> Transmit {
            Transmit::Accepted
        }
        fn receive(&self, _buf: &mut [u8]) -> io::Result<Option<usize>> {
            Ok(None)
        }
        fn readable_fd(&self) -> RawFd {
            self.0.as_raw_fd()
        }
    }

    fn bus() -> Bus<GuestMemoryMmap> {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("map");
        let shape = MachineShape::bare(1 << 20, 1, [2, 0, 0, 0, 0, 1]);
        // An eventfd that nobody ever writes to: never readable.
        let quiet = nix::sys::eventfd::EventFd::new().expect("eventfd");
        let net = Arc::new(Quiet(std::os::fd::OwnedFd::from(quiet).into()));
        Bus::new(mem, &shape, net, Vec::new(), Box::new(io::sink()), Arc::new(Recorder::default())).expect("bus")
    }

    #[test]
    fn power_off_and_reset_are_what_the_guest_was_told() {
        let bus = bus();
        for (port, value, effect) in [
            (POWER_PORT, 0x34, PortEffect::Off),
            (POWER_PORT, 0x14, PortEffect::None),
            (POWER_PORT, 0x30, PortEffect::None),
            (POWER_STATUS_PORT, 0x80, PortEffect::None),
            (RESET_PORT, 1, PortEffect::Reset),
            (RESET_PORT, 0, PortEffect::None),
            (KEYBOARD_COMMAND_PORT, 0xfe, PortEffect::Reset),
            (KEYBOARD_COMMAND_PORT, 0xaa, PortEffect::None),
        ] {
            assert_eq!(bus.port_write(port, &[value]), effect, "{port:#x} {value:#x}");
        }
        for (port, byte) in [(POWER_STATUS_PORT, 0), (KEYBOARD_COMMAND_PORT, 0), (0x70, 0xff), (PCI_PORT, 0xff)] {
            let mut data = [0x55];
            bus.port_read(port, &mut data);
            assert_eq!(data, [byte], "{port:#x}");
        }
    }
}
