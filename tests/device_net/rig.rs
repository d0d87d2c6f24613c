//! A driver, its device and the world around both, without KVM.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mcd::device::virtio::net::NetDevice;
use mcd::device::{NetBackend, Offloads, Signals, Transmit};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub type Memory = GuestMemoryMmap<()>;

pub const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
pub const GSI: u32 = 5;
pub const MEMORY: usize = 1 << 20;
pub const RX: u32 = 0;
pub const TX: u32 = 1;
pub const SIZE: u16 = 8;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const NEEDS_RESET: u32 = 64;

#[derive(Default)]
pub struct Machine {
    pub line: Mutex<Vec<bool>>,
    pub rings: AtomicUsize,
    pub broken: Mutex<Vec<String>>,
}

impl Signals for Machine {
    fn set_irq(&self, gsi: u32, active: bool) {
        assert_eq!(gsi, GSI);
        self.line.lock().expect("line").push(active);
    }
    fn ring(&self) {
        self.rings.fetch_add(1, Ordering::SeqCst);
    }
    fn broken(&self, device: &'static str, reason: &str) {
        assert_eq!(device, "virtio-net");
        self.broken.lock().expect("broken").push(reason.to_owned());
    }
    fn quiesced(&self) {}
}

pub struct Backend {
    pub inbound: Mutex<VecDeque<Vec<u8>>>,
    pub outbound: Mutex<Vec<Vec<u8>>>,
    pub room: AtomicUsize,
    pub reads: AtomicUsize,
    /// Called with each frame the guest sends.
    pub on_transmit: Mutex<Option<Box<dyn FnMut() + Send>>>,
    pub readable: EventFd,
    pub offloads: Offloads,
    pub agreed: Mutex<Vec<Offloads>>,
}

impl Backend {
    pub fn new(offloads: Offloads) -> Arc<Backend> {
        Arc::new(Backend {
            offloads,
            agreed: Mutex::default(),
            inbound: Mutex::default(),
            outbound: Mutex::default(),
            room: AtomicUsize::new(usize::MAX),
            reads: AtomicUsize::new(0),
            on_transmit: Mutex::default(),
            readable: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        })
    }
    pub fn send(&self, frame: Vec<u8>) {
        self.inbound.lock().expect("inbound").push_back(frame);
        self.readable.write(1).expect("eventfd");
    }
    pub fn waiting(&self) -> usize {
        self.inbound.lock().expect("inbound").len()
    }
    pub fn sent(&self) -> Vec<Vec<u8>> {
        self.outbound.lock().expect("outbound").clone()
    }
}

impl NetBackend for Backend {
    fn transmit(&self, frame: &[u8]) -> Transmit {
        let room = self.room.load(Ordering::SeqCst);
        if room == 0 {
            return Transmit::Full;
        }
        self.room.store(room - 1, Ordering::SeqCst);
        self.outbound.lock().expect("outbound").push(frame.to_vec());
        if let Some(hook) = &mut *self.on_transmit.lock().expect("hook") {
            hook();
        }
        Transmit::Accepted
    }
    fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let mut inbound = self.inbound.lock().expect("inbound");
        // Level-triggered as a tap is: readable while a frame waits.
        if inbound.len() <= 1 {
            let _ = self.readable.read();
        }
        Ok(inbound.pop_front().map(|frame| {
            let length = frame.len().min(buf.len());
            buf[..length].copy_from_slice(&frame[..length]);
            length
        }))
    }
    fn readable_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }
    fn offloads(&self) -> Offloads {
        self.offloads
    }
    fn agreed(&self, offloads: Offloads) {
        self.agreed.lock().expect("agreed").push(offloads);
    }
}

/// A driver, its device and the world around both.
pub struct Rig {
    pub mem: Memory,
    pub device: Arc<NetDevice<Memory>>,
    pub machine: Arc<Machine>,
    pub backend: Arc<Backend>,
    pub added: [u16; 2],
}

pub fn table(queue: u32) -> u64 {
    0x1_0000 + u64::from(queue) * 0x4000
}
pub fn avail(queue: u32) -> u64 {
    table(queue) + 0x1000
}
pub fn used(queue: u32) -> u64 {
    table(queue) + 0x2000
}

impl Rig {
    /// A device nobody has touched, running.
    pub fn bare() -> Rig {
        Rig::in_front_of(Offloads::NONE)
    }

    /// A device nobody has touched, running, whose backend can carry `offloads`.
    pub fn in_front_of(offloads: Offloads) -> Rig {
        let mem = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let (machine, backend) = (Arc::new(Machine::default()), Backend::new(offloads));
        let device = NetDevice::new(mem.clone(), MAC, GSI, backend.clone(), machine.clone()).expect("device");
        let device = Arc::new(device);
        device.unquiesce();
        Rig { mem, device, machine, backend, added: [0; 2] }
    }

    /// A device whose driver is ready.
    pub fn ready() -> Rig {
        let mut rig = Rig::bare();
        rig.set_up();
        rig
    }

    /// Pauses the device: returns when it is quiet.
    pub fn quiesce(&self) {
        self.device.begin_quiesce();
        until("the device to be quiet", || self.device.is_quiet());
    }

    pub fn set_up(&mut self) {
        self.agree(0);
    }

    /// Makes the driver ready with `features` besides MAC and VERSION_1.
    pub fn agree(&mut self, features: u32) {
        self.added = [0; 2];
        self.mem.write_slice(&[0; 0x8000], GuestAddress(table(0))).expect("clear");
        for (offset, value) in
            [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 1 << 5 | features), (0x70, 11)]
        {
            self.write(offset, value);
        }
        assert_eq!(self.read(0x70), 11);
        for queue in [RX, TX] {
            self.write(0x30, queue);
            self.write(0x38, u32::from(SIZE));
            self.write(0x80, table(queue) as u32);
            self.write(0x90, avail(queue) as u32);
            self.write(0xa0, used(queue) as u32);
            self.write(0x44, 1);
            assert_eq!(self.read(0x44), 1);
        }
        self.write(0x70, 15);
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.device.mmio_write(offset, &value.to_le_bytes());
    }
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    pub fn descriptor(&self, queue: u32, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(table(queue) + u64::from(index) * 16)).expect("descriptor");
    }
    /// Makes the chain at `head` available, without a notify.
    pub fn add(&mut self, queue: u32, head: u16) {
        let added = &mut self.added[queue as usize];
        let slot = avail(queue) + 4 + u64::from(*added % SIZE) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).expect("ring");
        *added = added.wrapping_add(1);
        self.mem.write_obj(*added, GuestAddress(avail(queue) + 2)).expect("index");
    }
    pub fn notify(&self, queue: u32) {
        self.write(0x50, queue);
    }
    pub fn used(&self, queue: u32) -> u16 {
        self.mem.read_obj(GuestAddress(used(queue) + 2)).expect("used")
    }
    pub fn used_flags(&self, queue: u32) -> u16 {
        self.mem.read_obj(GuestAddress(used(queue))).expect("used")
    }
    /// Puts a frame of `length` bytes of `byte` (behind its header) at descriptor `index` of the
    /// transmit queue.
    pub fn put_frame(&mut self, index: u16, byte: u8, length: usize) {
        let address = 0x4_0000 + u64::from(index) * 0x1000;
        let mut bytes = vec![0; 12];
        bytes.resize(12 + length, byte);
        self.mem.write_slice(&bytes, GuestAddress(address)).expect("frame");
        self.descriptor(TX, index, address, bytes.len() as u32, 0, 0);
        self.add(TX, index);
    }
    /// Makes descriptor `index` a receive buffer of `length` bytes.
    pub fn put_buffer(&mut self, index: u16, length: u32) {
        self.descriptor(RX, index, 0x8_0000 + u64::from(index) * 0x1000, length, WRITE, 0);
        self.add(RX, index);
    }
    pub fn state(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.device.save(&mut bytes);
        bytes
    }
    pub fn is_broken(&self) -> bool {
        self.read(0x70) & NEEDS_RESET != 0
    }
}

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "gave up waiting: {what}");
        std::thread::yield_now();
    }
}
