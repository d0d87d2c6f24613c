//! virtio-net from the driver's side, well-behaved and hostile. Needs no KVM.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mcd::device::virtio::net::NetDevice;
use mcd::device::{NetBackend, Signals, Transmit};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

type Memory = GuestMemoryMmap<()>;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const GSI: u32 = 5;
const MEMORY: usize = 1 << 20;
const RX: u32 = 0;
const TX: u32 = 1;
const SIZE: u16 = 8;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NEEDS_RESET: u32 = 64;

#[derive(Default)]
struct Machine {
    line: Mutex<Vec<bool>>,
    rings: AtomicUsize,
    broken: Mutex<Vec<String>>,
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
}

struct Backend {
    inbound: Mutex<VecDeque<Vec<u8>>>,
    outbound: Mutex<Vec<Vec<u8>>>,
    room: AtomicUsize,
    reads: AtomicUsize,
    readable: EventFd,
}

impl Backend {
    fn new() -> Arc<Backend> {
        Arc::new(Backend {
            inbound: Mutex::default(),
            outbound: Mutex::default(),
            room: AtomicUsize::new(usize::MAX),
            reads: AtomicUsize::new(0),
            readable: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        })
    }
    fn send(&self, frame: Vec<u8>) {
        self.inbound.lock().expect("inbound").push_back(frame);
        self.readable.write(1).expect("eventfd");
    }
    fn waiting(&self) -> usize {
        self.inbound.lock().expect("inbound").len()
    }
    fn sent(&self) -> Vec<Vec<u8>> {
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
}

/// A driver, its device and the world around both.
struct Rig {
    mem: Memory,
    device: NetDevice<Memory>,
    machine: Arc<Machine>,
    backend: Arc<Backend>,
    added: [u16; 2],
}

fn table(queue: u32) -> u64 {
    0x1_0000 + u64::from(queue) * 0x4000
}
fn avail(queue: u32) -> u64 {
    table(queue) + 0x1000
}
fn used(queue: u32) -> u64 {
    table(queue) + 0x2000
}

impl Rig {
    /// A device nobody has touched, running.
    fn bare() -> Rig {
        let mem = Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let (machine, backend) = (Arc::new(Machine::default()), Backend::new());
        let device = NetDevice::new(mem.clone(), MAC, GSI, backend.clone(), machine.clone()).expect("device");
        device.unquiesce();
        Rig { mem, device, machine, backend, added: [0; 2] }
    }

    /// A device whose driver is ready.
    fn ready() -> Rig {
        let mut rig = Rig::bare();
        rig.set_up();
        rig
    }

    fn set_up(&mut self) {
        self.added = [0; 2];
        self.mem.write_slice(&[0; 0x8000], GuestAddress(table(0))).expect("clear");
        for (offset, value) in [(0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, 1 << 5), (0x70, 11)] {
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

    fn write(&self, offset: u64, value: u32) {
        self.device.mmio_write(offset, &value.to_le_bytes());
    }
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }
    fn descriptor(&self, queue: u32, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(table(queue) + u64::from(index) * 16)).expect("descriptor");
    }
    /// Makes the chain at `head` available, without a notify.
    fn add(&mut self, queue: u32, head: u16) {
        let added = &mut self.added[queue as usize];
        let slot = avail(queue) + 4 + u64::from(*added % SIZE) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).expect("ring");
        *added = added.wrapping_add(1);
        self.mem.write_obj(*added, GuestAddress(avail(queue) + 2)).expect("index");
    }
    fn notify(&self, queue: u32) {
        self.write(0x50, queue);
    }
    fn used(&self, queue: u32) -> u16 {
        self.mem.read_obj(GuestAddress(used(queue) + 2)).expect("used")
    }
    fn used_flags(&self, queue: u32) -> u16 {
        self.mem.read_obj(GuestAddress(used(queue))).expect("used")
    }
    /// Puts a frame of `length` bytes of `byte` (behind its header) at descriptor `index` of the transmit queue.
    fn put_frame(&mut self, index: u16, byte: u8, length: usize) {
        let address = 0x4_0000 + u64::from(index) * 0x1000;
        let mut bytes = vec![0; 12];
        bytes.resize(12 + length, byte);
        self.mem.write_slice(&bytes, GuestAddress(address)).expect("frame");
        self.descriptor(TX, index, address, bytes.len() as u32, 0, 0);
        self.add(TX, index);
    }
    /// Makes descriptor `index` a receive buffer of `length` bytes.
    fn put_buffer(&mut self, index: u16, length: u32) {
        self.descriptor(RX, index, 0x8_0000 + u64::from(index) * 0x1000, length, WRITE, 0);
        self.add(RX, index);
    }
    fn state(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.device.save(&mut bytes);
        bytes
    }
    fn is_broken(&self) -> bool {
        self.read(0x70) & NEEDS_RESET != 0
    }
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(30), "gave up waiting: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_frame_in_pieces_is_sent_whole() {
    let mut rig = Rig::ready();
    rig.mem.write_slice(&[0; 12], GuestAddress(0x4_0000)).expect("header");
    rig.mem.write_slice(b"hello, this is a frame", GuestAddress(0x4_1000)).expect("frame");
    rig.descriptor(TX, 3, 0x4_0000, 10, NEXT, 1);
    rig.descriptor(TX, 1, 0x4_000a, 2, NEXT, 7);
    rig.descriptor(TX, 7, 0x4_1000, 22, 0, 0);
    rig.add(TX, 3);
    rig.notify(TX);
    assert_eq!(rig.backend.sent(), vec![b"hello, this is a frame".to_vec()]);
    assert_eq!(rig.used(TX), 1);
    assert_eq!(rig.read(0x60), 1, "interrupt status");
    assert_eq!(*rig.machine.line.lock().expect("line"), vec![true]);
    rig.write(0x64, 1);
    assert_eq!(*rig.machine.line.lock().expect("line"), vec![true, false]);
    assert_eq!(rig.machine.rings.load(Ordering::SeqCst), 1);
}

#[test]
fn a_polling_driver_gets_no_interrupts() {
    let mut rig = Rig::ready();
    for queue in [RX, TX] {
        rig.mem.write_obj(1u16, GuestAddress(avail(queue))).expect("flags");
    }
    rig.put_frame(0, 1, 60);
    rig.notify(TX);
    assert_eq!((rig.used(TX), rig.read(0x60)), (1, 0));
    assert_eq!(rig.machine.rings.load(Ordering::SeqCst), 0, "it sees its own transmit");
    rig.put_buffer(0, 2048);
    rig.notify(RX);
    rig.backend.send(vec![5; 60]);
    until("the frame", || rig.used(RX) == 1);
    until("the doorbell", || rig.machine.rings.load(Ordering::SeqCst) == 1);
    assert_eq!(rig.read(0x60), 0);
    assert!(rig.machine.line.lock().expect("line").is_empty());
}

#[test]
fn a_full_backend_leaves_frames_in_the_queue_until_it_has_room() {
    let mut rig = Rig::ready();
    rig.backend.room.store(2, Ordering::SeqCst);
    for index in 0..6 {
        rig.put_frame(index, index as u8, 60);
    }
    rig.notify(TX);
    assert_eq!((rig.used(TX), rig.backend.sent().len()), (2, 2));
    rig.notify(TX);
    assert_eq!(rig.used(TX), 2);
    rig.backend.room.store(1, Ordering::SeqCst);
    rig.device.kick();
    until("one frame more", || rig.used(TX) == 3);
    // While paused nothing moves; the room is found at resume.
    rig.device.quiesce();
    rig.backend.room.store(2, Ordering::SeqCst);
    rig.device.kick();
    assert_eq!(rig.used(TX), 3);
    rig.device.unquiesce();
    until("two frames more", || rig.used(TX) == 5);
    rig.backend.room.store(10, Ordering::SeqCst);
    rig.notify(TX);
    assert_eq!(rig.used(TX), 6);
    let order: Vec<u8> = rig.backend.sent().iter().map(|f| f[0]).collect();
    assert_eq!(order, [0, 1, 2, 3, 4, 5], "in order, once");
}

#[test]
fn kicks_from_another_thread_are_never_lost() {
    let mut rig = Rig::ready();
    rig.backend.room.store(0, Ordering::SeqCst);
    for round in 0..2_000u16 {
        rig.put_frame(round % SIZE, round as u8, 60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                rig.backend.room.store(1, Ordering::SeqCst);
                rig.device.kick();
            });
            rig.notify(TX);
        });
        until("the frame to leave", || rig.used(TX) == round.wrapping_add(1));
    }
    assert_eq!(rig.backend.sent().len(), 2_000);
}

#[test]
fn frames_wait_outside_until_there_are_buffers_and_nobody_spins() {
    let mut rig = Rig::ready();
    for n in 0..4 {
        rig.backend.send(vec![n; 60]);
    }
    assert_eq!(rig.used_flags(RX), 0, "the driver is to notify");
    // Without buffers the backend is not even looked at, however often the device is woken.
    for _ in 0..200 {
        rig.device.quiesce();
        rig.device.unquiesce();
        rig.notify(RX);
    }
    assert_eq!((rig.backend.waiting(), rig.backend.reads.load(Ordering::SeqCst)), (4, 0));
    rig.put_buffer(0, 2048);
    rig.put_buffer(1, 2048);
    rig.notify(RX);
    until("two frames", || rig.used(RX) == 2);
    assert_eq!(rig.backend.waiting(), 2);
    rig.put_buffer(2, 2048);
    rig.put_buffer(3, 2048);
    rig.put_buffer(4, 2048);
    rig.notify(RX);
    until("all frames", || rig.used(RX) == 4);
    let mut got = [0; 14];
    rig.mem.read_slice(&mut got, GuestAddress(0x8_3000)).expect("read");
    assert_eq!(got, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3, 3], "header with num_buffers = 1, then the frame");
    let length: u32 = rig.mem.read_obj(GuestAddress(used(RX) + 4 + 3 * 8 + 4)).expect("length");
    assert_eq!(length, 72);
    until("the driver to be spared its notifies", || rig.used_flags(RX) == 1);
}

#[test]
fn a_paused_device_leaves_memory_alone() {
    let mut rig = Rig::ready();
    rig.put_buffer(0, 2048);
    rig.notify(RX);
    rig.device.quiesce();
    rig.backend.send(vec![1; 60]);
    for _ in 0..1_000 {
        std::thread::yield_now();
        assert_eq!(rig.used(RX), 0);
    }
    assert_eq!(rig.backend.waiting(), 1);
    rig.device.unquiesce();
    until("the frame", || rig.used(RX) == 1);
}

#[test]
fn a_frame_larger_than_its_buffer_is_dropped_and_the_buffer_kept() {
    let mut rig = Rig::ready();
    rig.put_buffer(0, 100);
    rig.notify(RX);
    rig.backend.send(vec![1; 200]);
    rig.backend.send(vec![2; 60]);
    until("the frame that fits", || rig.used(RX) == 1);
    let mut got = [0; 2];
    rig.mem.read_slice(&mut got, GuestAddress(0x8_000c)).expect("read");
    assert_eq!(got, [2, 2]);
}

/// Each hostile transmit set-up, with words its complaint must have.
type Hostile = (&'static str, fn(&mut Rig), &'static str);

const HOSTILE: [Hostile; 12] = [
    (
        "loop",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 20, NEXT, 1);
            r.descriptor(TX, 1, 0x4_0000, 20, NEXT, 0);
            r.add(TX, 0)
        },
        "no end",
    ),
    (
        "self loop",
        |r| {
            r.descriptor(TX, 2, 0x4_0000, 1, NEXT, 2);
            r.add(TX, 2)
        },
        "no end",
    ),
    (
        "next outside the table",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 20, NEXT, 900);
            r.add(TX, 0)
        },
        "no end",
    ),
    ("head outside the table", |r| r.add(TX, SIZE + 5), "empty"),
    (
        "outside memory",
        |r| {
            r.descriptor(TX, 0, MEMORY as u64 - 10, 20, 0, 0);
            r.add(TX, 0)
        },
        "outside memory",
    ),
    (
        "address wraps",
        |r| {
            r.descriptor(TX, 0, u64::MAX - 5, 20, 0, 0);
            r.add(TX, 0)
        },
        "outside memory",
    ),
    (
        "zero length",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 0, 0, 0);
            r.add(TX, 0)
        },
        "empty",
    ),
    (
        "shorter than a header",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 11, 0, 0);
            r.add(TX, 0)
        },
        "empty",
    ),
    (
        "huge",
        |r| {
            r.descriptor(TX, 0, 0, u32::MAX, 0, 0);
            r.add(TX, 0)
        },
        "longer",
    ),
    (
        "huge in sum",
        |r| {
            for i in 0..8 {
                r.descriptor(TX, i, 0, 60_000, NEXT, i + 1)
            }
            r.add(TX, 0)
        },
        "longer",
    ),
    (
        "wrong direction",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 80, WRITE, 0);
            r.add(TX, 0)
        },
        "direction",
    ),
    (
        "index too far ahead",
        |r| r.mem.write_obj(SIZE + 1, GuestAddress(avail(TX) + 2)).expect("index"),
        "available ring",
    ),
];

#[test]
fn a_hostile_transmit_breaks_the_device_and_nothing_else() {
    for (name, prepare, complaint) in HOSTILE {
        let mut rig = Rig::ready();
        prepare(&mut rig);
        rig.notify(TX);
        assert!(rig.is_broken(), "{name}");
        assert_eq!(rig.read(0x60) & 2, 2, "{name}: the driver is told");
        let told = rig.machine.broken.lock().expect("broken").clone();
        assert!(told.len() == 1 && told[0].contains(complaint), "{name}: {told:?}");
        assert!(rig.backend.sent().is_empty(), "{name}");
        rig.notify(TX);
        assert_eq!(rig.machine.broken.lock().expect("broken").len(), 1, "{name}: told once");
        // A reset heals it.
        rig.write(0x70, 0);
        assert_eq!(rig.read(0x70), 0);
        rig.set_up();
        rig.put_frame(0, 9, 60);
        rig.notify(TX);
        assert_eq!(rig.backend.sent(), vec![vec![9; 60]], "{name}");
    }
}

#[test]
fn a_hostile_receive_buffer_breaks_the_device() {
    let cases: [(&str, fn(&mut Rig)); 5] = [
        ("read-only", |r| {
            r.descriptor(RX, 0, 0x8_0000, 2048, 0, 0);
            r.add(RX, 0)
        }),
        ("outside memory", |r| {
            r.descriptor(RX, 0, MEMORY as u64, 2048, WRITE, 0);
            r.add(RX, 0)
        }),
        ("zero length", |r| {
            r.descriptor(RX, 0, 0x8_0000, 0, WRITE, 0);
            r.add(RX, 0)
        }),
        ("loop", |r| {
            r.descriptor(RX, 0, 0x8_0000, 1, WRITE | NEXT, 0);
            r.add(RX, 0)
        }),
        ("indirect without end", |r| {
            r.descriptor(RX, 0, table(RX), 16, INDIRECT, 0);
            r.add(RX, 0)
        }),
    ];
    for (name, prepare) in cases {
        let mut rig = Rig::ready();
        prepare(&mut rig);
        rig.notify(RX);
        rig.backend.send(vec![1; 60]);
        until(name, || rig.is_broken());
        assert_eq!(rig.used(RX), 0, "{name}");
    }
}

#[test]
fn state_goes_to_another_device_and_on() {
    let mut rig = Rig::ready();
    rig.backend.room.store(1, Ordering::SeqCst);
    rig.put_frame(0, 1, 60);
    rig.put_frame(1, 2, 60);
    rig.notify(TX);
    rig.put_buffer(0, 2048);
    rig.device.quiesce();
    let state = rig.state();

    let other = Rig::bare();
    other.device.quiesce();
    let mut image = vec![0; MEMORY];
    rig.mem.read_slice(&mut image, GuestAddress(0)).expect("read");
    other.mem.write_slice(&image, GuestAddress(0)).expect("write");
    other.device.restore(&state).expect("restore");
    assert_eq!(other.state(), state);
    assert_eq!(*other.machine.line.lock().expect("line"), vec![true], "a set status raises the line again");
    other.backend.send(vec![3; 60]);
    other.device.unquiesce();
    until("the frame that had to wait", || other.used(TX) == 2);
    assert_eq!(other.backend.sent(), vec![vec![2; 60]]);
    until("a frame in", || other.used(RX) == 1);
    other.write(0x64, 3);
    assert_eq!(other.machine.line.lock().expect("line").last(), Some(&false));
}

#[test]
fn states_that_cannot_be_are_refused() {
    let rig = Rig::ready();
    rig.device.quiesce();
    let state = rig.state();
    let other = Rig::bare();
    other.device.quiesce();
    for cut in 0..state.len() {
        assert!(other.device.restore(&state[..cut]).is_err());
    }
    let changed = |at: usize, byte: u8| {
        let mut bytes = state.clone();
        bytes[at] = byte;
        bytes
    };
    for (name, bytes) in [
        ("another MAC address", changed(0, 0xee)),
        ("a flag of 2", changed(6, 2)),
        ("a status that does not exist", changed(8, 0xff)),
        ("a feature that is not offered", changed(12, 0xff)),
        ("three queues", changed(39, 3)),
        ("a queue size of 7", changed(42, 7)),
        ("another kind of queue", changed(48, 1)),
        ("a table outside memory", changed(53, 0xff)),
    ] {
        assert!(other.device.restore(&bytes).is_err(), "{name}");
    }
    other.device.restore(&state).expect("the state itself");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_descriptors_make_the_device_panic_or_hang(
        descriptors in proptest::collection::vec(
            (prop_oneof![0u64..MEMORY as u64 + 4096, any::<u64>()], prop_oneof![0u32..5000, any::<u32>()], 0u16..8, 0u16..12),
            SIZE as usize * 2,
        ),
        heads in proptest::collection::vec(0u16..12, 1..8),
        claimed in prop_oneof![1u16..10, any::<u16>()],
    ) {
        let mut rig = Rig::ready();
        for (n, (address, length, flags, next)) in (0u16..).zip(descriptors) {
            rig.descriptor(u32::from(n / SIZE), n % SIZE, address, length, flags, next);
        }
        for head in heads {
            rig.add(TX, head);
            rig.add(RX, head);
        }
        for queue in [RX, TX] {
            rig.mem.write_obj(claimed, GuestAddress(avail(queue) + 2)).expect("index");
        }
        for n in 0..4 {
            rig.backend.send(vec![n; 300]);
        }
        rig.notify(RX);
        rig.notify(TX);
        rig.device.quiesce();
        let _ = rig.state();
    }

    #[test]
    fn no_state_bytes_make_the_device_panic(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
        let rig = Rig::ready();
        rig.device.quiesce();
        let mut state = rig.state();
        for (at, byte) in changes {
            let at = at.index(state.len());
            state[at] = byte;
        }
        let other = Rig::bare();
        other.device.quiesce();
        let _ = other.device.restore(&state);
        other.device.unquiesce();
        other.notify(TX);
        other.notify(RX);
    }

    #[test]
    fn no_register_accesses_make_the_device_panic(accesses in proptest::collection::vec((0u64..0x110, any::<u32>(), any::<bool>()), 1..200)) {
        let rig = Rig::bare();
        for (offset, value, write) in accesses {
            if write {
                rig.write(offset, value);
            } else {
                rig.read(offset);
            }
        }
    }
}
