//! A driver with one queue, the device it drives, and the world around both, without KVM.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use mcd::device::virtio::blk::BlkDevice;
use mcd::device::virtio::rng::RngDevice;
use mcd::device::{BlockBackend, Signals, Stored};
use mcd::protocol::machine_shape::DiskShape;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub type Memory = GuestMemoryMmap<()>;

pub const GSI: u32 = 17;
pub const MEMORY: usize = 1 << 20;
/// Buffers in the queue.
pub const SIZE: u16 = 16;
pub const TABLE: u64 = 0x1_0000;
pub const AVAIL: u64 = 0x1_1000;
pub const USED: u64 = 0x1_2000;
/// Where headers, statuses and indirect tables of requests go, 256 bytes for each.
pub const HEADERS: u64 = 0x2_0000;
/// Where data goes.
pub const DATA: u64 = 0x4_0000;
pub const DATA_END: u64 = 0xc_0000;

/// How long anything is waited for.
const GIVE_UP: Duration = Duration::from_secs(30);

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const NEEDS_RESET: u32 = 64;
/// A status byte that no device writes.
pub const NO_STATUS: u8 = 0xee;

#[derive(Default)]
pub struct Machine {
    pub line: Mutex<Vec<bool>>,
    pub rings: AtomicUsize,
    pub broken: Mutex<Vec<String>>,
    quiesced: Mutex<usize>,
    quiet: Condvar,
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
        self.broken.lock().expect("broken").push(format!("{device}: {reason}"));
    }
    fn quiesced(&self) {
        *self.quiesced.lock().expect("quiesced") += 1;
        self.quiet.notify_all();
    }
}

/// What a [`Disk`] is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    Read,
    Write,
    Flush,
    Discard,
    Zero,
    /// The answer that there is no room; it is not among the calls that went on.
    Full,
}

#[derive(Default)]
struct Gates {
    /// How many calls of a kind may go on; without an entry all may.
    open: HashMap<Call, usize>,
    /// Calls that wait at a closed gate.
    waiting: Vec<Call>,
    /// Calls that went on, in order.
    done: Vec<(Call, u64, u64)>,
}

/// A disk in memory that can be slow, full or failing on demand.
pub struct Disk {
    bytes: Mutex<Vec<u8>>,
    gates: Mutex<Gates>,
    moved: Condvar,
    /// How many more changes there is room for.
    pub room: AtomicUsize,
    pub fails: AtomicBool,
}

impl Disk {
    pub fn new(content: Vec<u8>) -> Arc<Disk> {
        Arc::new(Disk {
            bytes: Mutex::new(content),
            gates: Mutex::default(),
            moved: Condvar::new(),
            room: AtomicUsize::new(usize::MAX),
            fails: AtomicBool::new(false),
        })
    }
    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().expect("bytes").clone()
    }
    /// Lets `calls` calls of this kind go on; those beyond wait.
    pub fn allow(&self, call: Call, calls: usize) {
        self.gates.lock().expect("gates").open.insert(call, calls);
        self.moved.notify_all();
    }
    /// How many calls of this kind may still go on.
    pub fn left(&self, call: Call) -> usize {
        self.gates.lock().expect("gates").open.get(&call).copied().unwrap_or(usize::MAX)
    }
    /// Returns when a call of this kind waits at its gate.
    pub fn until_waiting(&self, call: Call) {
        let gates = self.gates.lock().expect("gates");
        let (_gates, timeout) =
            self.moved.wait_timeout_while(gates, GIVE_UP, |gates| !gates.waiting.contains(&call)).expect("gates");
        assert!(!timeout.timed_out(), "no {call:?} came");
    }
    /// The calls that went on: kind, offset, bytes.
    pub fn done(&self) -> Vec<(Call, u64, u64)> {
        self.gates.lock().expect("gates").done.clone()
    }
    fn pass(&self, call: Call, offset: u64, bytes: u64) -> io::Result<()> {
        let mut gates = self.gates.lock().expect("gates");
        gates.waiting.push(call);
        self.moved.notify_all();
        gates = self.moved.wait_while(gates, |gates| gates.open.get(&call) == Some(&0)).expect("gates");
        if let Some(left) = gates.open.get_mut(&call) {
            *left -= 1;
        }
        gates.waiting.retain(|waiting| *waiting != call);
        if call != Call::Full {
            gates.done.push((call, offset, bytes));
        }
        if self.fails.load(Ordering::SeqCst) { Err(io::Error::other("this disk fails")) } else { Ok(()) }
    }
    fn change(&self, call: Call, offset: u64, bytes: u64, with: impl Fn(usize) -> u8) -> io::Result<Stored> {
        let took = self.room.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |room| room.checked_sub(1));
        if took.is_err() {
            self.pass(Call::Full, offset, bytes)?;
            return Ok(Stored::Full);
        }
        self.pass(call, offset, bytes)?;
        let mut content = self.bytes.lock().expect("bytes");
        let range = offset as usize..(offset + bytes) as usize;
        content[range].iter_mut().enumerate().for_each(|(at, byte)| *byte = with(at));
        Ok(Stored::Accepted)
    }
}

impl BlockBackend for Disk {
    fn bytes(&self) -> u64 {
        self.bytes.lock().expect("bytes").len() as u64
    }
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.pass(Call::Read, offset, into.len() as u64)?;
        into.copy_from_slice(&self.bytes.lock().expect("bytes")[offset as usize..][..into.len()]);
        Ok(())
    }
    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
        self.change(Call::Write, offset, from.len() as u64, |at| from[at])
    }
    fn flush(&self) -> io::Result<()> {
        self.pass(Call::Flush, 0, 0)
    }
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<Stored> {
        self.change(Call::Discard, offset, bytes, |_| 0)
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, _may_unmap: bool) -> io::Result<Stored> {
        self.change(Call::Zero, offset, bytes, |_| 0)
    }
}

impl Rig<BlkDevice<Memory>> {
    /// Pauses the device: returns when it is quiet. Relies on the machine being told of that.
    pub fn quiesce(&self) {
        self.device.begin_quiesce();
        let quiesced = self.machine.quiesced.lock().expect("quiesced");
        let wait = self.machine.quiet.wait_timeout_while(quiesced, GIVE_UP, |_| !self.device.is_quiet());
        assert!(!wait.expect("quiesced").1.timed_out(), "the device is never quiet");
    }
}

pub trait Registers {
    fn get(&self, offset: u64, data: &mut [u8]);
    fn set(&self, offset: u64, data: &[u8]);
}

impl Registers for BlkDevice<Memory> {
    fn get(&self, offset: u64, data: &mut [u8]) {
        self.mmio_read(offset, data);
    }
    fn set(&self, offset: u64, data: &[u8]) {
        self.mmio_write(offset, data);
    }
}

impl Registers for RngDevice<Memory> {
    fn get(&self, offset: u64, data: &mut [u8]) {
        self.mmio_read(offset, data);
    }
    fn set(&self, offset: u64, data: &[u8]) {
        self.mmio_write(offset, data);
    }
}

/// A driver, its device and the machine around both.
pub struct Rig<D> {
    pub mem: Memory,
    pub device: D,
    pub machine: Arc<Machine>,
    pub added: u16,
}

impl<D: Registers> Rig<D> {
    /// Makes the driver ready with `features` besides VERSION_1, and a queue of `size`.
    pub fn set_up(&mut self, features: u32, size: u16) {
        self.added = 0;
        self.mem.write_slice(&[0; 0x3000], GuestAddress(TABLE)).expect("clear");
        for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, features), (0x70, 11)] {
            self.write(offset, value);
        }
        assert_eq!(self.read(0x70), 11, "features are agreed on");
        let setup =
            [(0x30, 0), (0x38, u32::from(size)), (0x80, TABLE as u32), (0x90, AVAIL as u32), (0xa0, USED as u32)];
        for (offset, value) in setup {
            self.write(offset, value);
        }
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1, "the queue is ready");
        self.write(0x70, 15);
    }
    pub fn write(&self, offset: u64, value: u32) {
        self.device.set(offset, &value.to_le_bytes());
    }
    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.get(offset, &mut data);
        u32::from_le_bytes(data)
    }
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).expect("memory");
    }
    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mem.read_slice(&mut bytes, GuestAddress(address)).expect("memory");
        bytes
    }
    pub fn descriptor(&self, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        self.put(TABLE + u64::from(index) * 16, &descriptor(address, length, flags, next));
    }
    /// Makes the chain at `head` available, without a notify.
    pub fn add(&mut self, head: u16) {
        self.put(AVAIL + 4 + u64::from(self.added % SIZE) * 2, &head.to_le_bytes());
        self.added = self.added.wrapping_add(1);
        // At once, not byte by byte: the device may be looking.
        self.mem.store(self.added.to_le(), GuestAddress(AVAIL + 2), Ordering::Release).expect("memory");
    }
    pub fn notify(&self) {
        self.write(0x50, 0);
    }
    /// How many chains were used.
    pub fn used(&self) -> u16 {
        self.mem.read_obj(GuestAddress(USED + 2)).expect("used")
    }
    /// Head and length of the chain that was used as number `at`.
    pub fn used_entry(&self, at: u16) -> (u32, u32) {
        let entry = self.get(USED + 4 + u64::from(at % SIZE) * 8, 8);
        let half = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        (half(0), half(4))
    }
    pub fn until_used(&self, count: u16) {
        until_or(
            || self.used() == count,
            || {
                format!(
                    "{count} used chains; there are {}, the status is {:#x}, complaints: {:?}",
                    self.used(),
                    self.read(0x70),
                    self.complaints()
                )
            },
        );
    }
    pub fn is_broken(&self) -> bool {
        self.read(0x70) & NEEDS_RESET != 0
    }
    pub fn complaints(&self) -> Vec<String> {
        self.machine.broken.lock().expect("broken").clone()
    }
    /// Copies all memory of another rig.
    pub fn copy_memory<E: Registers>(&self, from: &Rig<E>) {
        self.put(0, &from.get(0, MEMORY));
    }
}

pub fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> Vec<u8> {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    bytes
}

pub fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory")
}

pub fn shape(bytes: u64, read_only: bool) -> DiskShape {
    DiskShape { bytes, read_only, shared: false, serial: *b"serial-1234\0\0\0\0\0\0\0\0\0" }
}

pub fn until(what: &str, done: impl FnMut() -> bool) {
    until_or(done, || what.to_owned());
}

/// Waits until `done`; if that takes far too long, `what` says what was waited for.
pub fn until_or(mut done: impl FnMut() -> bool, what: impl Fn() -> String) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < GIVE_UP, "gave up waiting: {}", what());
        std::thread::yield_now();
    }
}
