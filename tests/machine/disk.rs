//! A disk under KVM: a guest writes, flushes and reads back, without end, while it is paused and
//! taken over at any moment.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use mcd::device::bus::VirtioWindow;
use mcd::device::image::RawImage;
use mcd::machine::{BlockBackend, CpuModel, GuestRam, Machine, MachineError, Stored};
use mcd::protocol::machine_shape::{DiskShape, MachineShape};
use mcd::protocol::pages::{PAGE_BYTES, PageSet};

use crate::guest_code;
use crate::support::*;

/// Where the guest's ring is, and behind it at 0x10000 its requests.
const TABLE: u64 = 0x30_0000;
const REQUESTS: u64 = 0x31_0000;
/// The disk is the second device.
const DISK: u8 = 1;
/// Sectors of the disk. The guest writes sector n mod 1024 in round n.
const SECTORS: u64 = 1024;

guest_code!(
    disk_writer,
    // Puts the chain at `head` (whose status is at `status`) into the ring of 16, and waits until
    // it is used and done.
    ".macro ask head, status",
    "movzx eax, word ptr [r14 + 2]",
    "mov ecx, eax",
    "and ecx, 15",
    "mov word ptr [r14 + rcx * 2 + 4], \\head",
    "mov byte ptr [r15 + \\status], 0xee",
    "inc eax",
    "mov word ptr [r14 + 2], ax",
    "mov dword ptr [rbx + 0x50], 0",
    "22: pause",
    "cmp word ptr [r13 + 2], ax",
    "jne 22b",
    "cmp byte ptr [r15 + \\status], 0",
    "jne 9f",
    ".endm",
    "mov ebx, 0xd0001000",
    "mov r14d, 0x301000",
    "mov r13d, 0x302000",
    "mov r15d, 0x310000",
    "mov r11d, 0x200000",
    "mov dword ptr [rbx + 0x70], 1",
    "mov dword ptr [rbx + 0x70], 3",
    "mov dword ptr [rbx + 0x24], 1",
    "mov dword ptr [rbx + 0x20], 1",
    "mov dword ptr [rbx + 0x24], 0",
    // FLUSH is agreed on.
    "mov dword ptr [rbx + 0x20], 0x200",
    "mov dword ptr [rbx + 0x70], 11",
    "mov dword ptr [rbx + 0x30], 0",
    "mov dword ptr [rbx + 0x38], 16",
    "mov dword ptr [rbx + 0x80], 0x300000",
    "mov dword ptr [rbx + 0x90], 0x301000",
    "mov dword ptr [rbx + 0xa0], 0x302000",
    "mov dword ptr [rbx + 0x44], 1",
    "mov dword ptr [rbx + 0x70], 15",
    "xor r12d, r12d",
    // Round r12: write the sector, flush, read it back, compare, and say so.
    "2: inc r12",
    "mov rax, r12",
    "and eax, 1023",
    "mov [r15 + 8], rax",
    "mov [r15 + 0x208], rax",
    "mov [r15 + 0x1000], r12",
    "mov [r15 + 0x11f8], r12",
    "ask 0, 0x80",
    "ask 3, 0x180",
    "ask 6, 0x280",
    "cmp [r15 + 0x2000], r12",
    "jne 9f",
    "cmp [r15 + 0x21f8], r12",
    "jne 9f",
    "mov [r11], r12",
    "jmp 2b",
    // Something was wrong: the status and what was read tell what.
    "9: mov qword ptr [r11 + 8], 1",
    "3: pause",
    "jmp 3b",
);

/// Lays out the guest's three requests: write (0), flush (3), read (6).
fn lay_out(ram: &GuestRam) {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    let put = |index: u64, address: u64, length: u32, flags: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend((index as u16 + 1).to_le_bytes());
        ram.write(TABLE + index * 16, &bytes).expect("descriptor");
    };
    let data = |offset: u64, flags: u16| Some((offset, flags));
    for (request, kind, data) in [(0, 1u32, data(0x1000, NEXT)), (1, 4, None), (2, 0, data(0x2000, NEXT | WRITE))] {
        let at = REQUESTS + request * 0x100;
        ram.write(at, &kind.to_le_bytes()).expect("header");
        put(request * 3, at, 16, NEXT);
        let mut next = request * 3 + 1;
        if let Some((offset, flags)) = data {
            put(next, REQUESTS + offset, 512, flags);
            next += 1;
        }
        put(next, at + 0x80, 1, WRITE);
    }
}

fn disk_shape() -> DiskShape {
    DiskShape { bytes: SECTORS * 512, read_only: false, shared: false, serial: [b'x'; 20] }
}

fn shape_with_disk() -> MachineShape {
    MachineShape { disks: vec![disk_shape()], rng: true, ..shape(1) }
}

fn machine_with(image: &Path) -> Machine {
    let disk: Arc<dyn BlockBackend> = Arc::new(RawImage::open(image, false).expect("image"));
    Machine::new(&shape_with_disk(), CpuModel::Host, Wires::new(), vec![disk], Box::new(Console::default()))
        .expect("machine")
}

/// The number in each sector of an image; both its ends must agree.
fn numbers(image: &Path) -> Vec<u64> {
    let bytes = std::fs::read(image).expect("image");
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    (0..SECTORS as usize)
        .map(|sector| (number(sector * 512), number(sector * 512 + 504)))
        .for_each(|(a, b)| assert_eq!(a, b));
    (0..SECTORS as usize).map(|sector| number(sector * 512)).collect()
}

/// An image must hold all that the guest knows to be written: round `acked`; one more may be on its
/// way.
fn check_image(image: &Path, acked: u64) {
    for (sector, number) in numbers(image).into_iter().enumerate() {
        let newest = (0..=acked).rev().take(SECTORS as usize).find(|n| n % SECTORS == sector as u64).unwrap_or(0);
        let on_its_way = acked + 1;
        assert!(
            number == newest || (number == on_its_way && number % SECTORS == sector as u64),
            "sector {sector} holds {number}, not {newest}, when round {acked} was acknowledged"
        );
    }
}

struct Images {
    directory: tempfile::TempDir,
    count: u32,
}

impl Images {
    fn next(&mut self) -> PathBuf {
        self.count += 1;
        self.directory.path().join(format!("disk-{}", self.count))
    }
}

#[test]
fn takeovers_at_any_moment_find_a_disk_that_fits_the_memory() {
    if !have_kvm() {
        return;
    }
    let mut images = Images { directory: tempfile::tempdir().expect("directory"), count: 0 };
    let mut image = images.next();
    std::fs::write(&image, vec![0; (SECTORS * 512) as usize]).expect("image");
    let mut machine = machine_with(&image);
    load(machine.memory(), disk_writer());
    lay_out(machine.memory());
    machine.start_vcpus(vec![ring3(0)]).expect("start");
    let mut rounds = 0;
    for takeover in 0..5 {
        let standby_image = images.next();
        std::fs::write(&standby_image, vec![0; (SECTORS * 512) as usize]).expect("image");
        let mut standby = machine_with(&standby_image);
        machine.track_dirty(true).expect("track");
        copy_memory(machine.memory(), standby.memory());
        let mut dirty = PageSet::empty(machine.memory().pages());
        let mut state = Vec::new();
        for epoch in 0..12u64 {
            machine.resume().expect("resume");
            until("the guest to write", || word(machine.memory(), RESULTS) >= rounds + 5 || failed(&machine));
            // Somewhere in a round, differently each time.
            (0..epoch * 977).for_each(|_| std::hint::spin_loop());
            machine.pause().expect("pause");
            assert!(!failed(&machine), "the guest found a wrong answer in takeover {takeover}, round {rounds}");
            machine.collect_dirty(&mut dirty).expect("dirty");
            state.clear();
            machine.save(&mut state).expect("save");
            let mut page = [0; PAGE_BYTES];
            for index in dirty.iter() {
                machine.memory().read_page(index, &mut page).expect("read");
                standby.memory().write_page(index, &page).expect("write");
            }
            dirty.clear();
            rounds = word(machine.memory(), RESULTS);
            check_image(&image, rounds);
        }
        // What the disk held at the last epoch goes to the other node; its image is open already,
        // and is written in place.
        let content = std::fs::read(&image).expect("image");
        std::fs::write(&standby_image, content).expect("image");
        drop(machine);
        standby.restore(&state).expect("restore");
        (machine, image) = (standby, standby_image);
    }
    assert!(rounds >= 5 * 12 * 5);
}

fn failed(machine: &Machine) -> bool {
    word(machine.memory(), RESULTS + 8) != 0
}

#[test]
fn devices_are_where_the_machine_says() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let image = directory.path().join("disk");
    std::fs::write(&image, vec![0; (SECTORS * 512) as usize]).expect("image");
    let machine = machine_with(&image);
    assert_eq!(machine.virtio_windows(), [0, DISK, 2].map(VirtioWindow::of));
    assert_eq!(VirtioWindow::of(DISK), VirtioWindow { address: 0xd000_1000, gsi: 17 });
    assert_eq!(empty(1).0.virtio_windows(), [VirtioWindow::of(0)]);
}

#[test]
fn states_and_images_of_other_disks_are_refused() {
    if !have_kvm() {
        return;
    }
    let directory = tempfile::tempdir().expect("directory");
    let image = directory.path().join("disk");
    std::fs::write(&image, vec![0; (SECTORS * 512) as usize]).expect("image");
    let build = |shape: &MachineShape, count: usize| {
        let disks = (0..count).map(|_| Arc::new(RawImage::open(&image, true).expect("image")) as Arc<dyn BlockBackend>);
        Machine::new(shape, CpuModel::Host, Wires::new(), disks.collect(), Box::new(Console::default()))
    };
    let refused = |shape: &MachineShape, count: usize| build(shape, count).err().map(|error| error.to_string());
    let with = shape_with_disk();
    assert!(refused(&with, 0).is_some_and(|why| why.contains("1 disks") && why.contains("given 0")));
    assert!(refused(&shape(1), 1).is_some_and(|why| why.contains("given 1")));
    let seven = MachineShape { disks: vec![disk_shape(); 7], ..shape(1) };
    assert!(refused(&seven, 7).is_some_and(|why| why.contains("6 at most")));
    let larger = MachineShape { disks: vec![DiskShape { bytes: SECTORS * 1024, ..disk_shape() }], ..shape(1) };
    assert!(matches!(build(&larger, 1).err(), Some(MachineError::DiskSize { number: 0, .. })));
    let mut state = Vec::new();
    build(&with, 1).expect("machine").save(&mut state).expect("save");
    for other in [
        shape(1),
        MachineShape { rng: false, ..with.clone() },
        MachineShape { disks: vec![disk_shape(), disk_shape()], ..with.clone() },
        MachineShape { disks: vec![DiskShape { serial: [b'y'; 20], ..disk_shape() }], ..with.clone() },
    ] {
        let mut machine = build(&other, other.disks.len()).expect("machine");
        let error = machine.restore(&state).expect_err("another machine's").to_string();
        assert!(error.contains("section") && !error.contains('\n'), "{error}");
    }
    build(&with, 1).expect("machine").restore(&state).expect("its own");
}

/// A disk whose writes take until the test lets them go.
struct SlowDisk {
    /// Writes that wait, and whether they may go on.
    state: Mutex<(u32, bool)>,
    changed: Condvar,
}

impl SlowDisk {
    fn let_writes_go(&self, on: bool) {
        self.state.lock().expect("lock").1 = on;
        self.changed.notify_all();
    }

    fn wait_for_write(&self) {
        let state = self.state.lock().expect("lock");
        let waited = self.changed.wait_timeout_while(state, WAIT_MAX, |state| state.0 == 0).expect("lock");
        assert!(!waited.1.timed_out(), "no write came");
    }
}

impl BlockBackend for SlowDisk {
    fn bytes(&self) -> u64 {
        SECTORS * 512
    }
    fn read(&self, _offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.fill(0);
        Ok(())
    }
    fn write(&self, _offset: u64, _from: &[u8]) -> io::Result<Stored> {
        let mut state = self.state.lock().expect("lock");
        state.0 += 1;
        self.changed.notify_all();
        let mut state = self.changed.wait_while(state, |state| !state.1).expect("lock");
        state.0 -= 1;
        Ok(Stored::Accepted)
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _offset: u64, _bytes: u64) -> io::Result<Stored> {
        Ok(Stored::Accepted)
    }
    fn write_zeroes(&self, _offset: u64, _bytes: u64, _may_unmap: bool) -> io::Result<Stored> {
        Ok(Stored::Accepted)
    }
}

guest_code!(
    write_and_count,
    // Sets the disk's queue of 16 up, asks for one write, and counts.
    "mov ebx, 0xd0001000",
    "mov dword ptr [rbx + 0x70], 1",
    "mov dword ptr [rbx + 0x70], 3",
    "mov dword ptr [rbx + 0x24], 1",
    "mov dword ptr [rbx + 0x20], 1",
    "mov dword ptr [rbx + 0x24], 0",
    "mov dword ptr [rbx + 0x20], 0x200",
    "mov dword ptr [rbx + 0x70], 11",
    "mov dword ptr [rbx + 0x30], 0",
    "mov dword ptr [rbx + 0x38], 16",
    "mov dword ptr [rbx + 0x80], 0x300000",
    "mov dword ptr [rbx + 0x90], 0x301000",
    "mov dword ptr [rbx + 0xa0], 0x302000",
    "mov dword ptr [rbx + 0x44], 1",
    "mov dword ptr [rbx + 0x70], 15",
    "mov word ptr [0x301002], 1",
    "mov dword ptr [rbx + 0x50], 0",
    "1: inc qword ptr [0x200000]",
    "jmp 1b",
);

#[test]
fn a_disk_that_does_not_answer_ends_the_pause_and_not_the_guest() {
    if !have_kvm() {
        return;
    }
    let disk = Arc::new(SlowDisk { state: Mutex::new((0, false)), changed: Condvar::new() });
    let console = Box::new(Console::default());
    let mut machine =
        Machine::new(&shape_with_disk(), CpuModel::Host, Wires::new(), vec![disk.clone()], console).expect("machine");
    load(machine.memory(), write_and_count());
    lay_out(machine.memory());
    machine.start_vcpus(vec![ring3(0)]).expect("start");
    let ram = machine.memory().clone();
    machine.resume().expect("resume");
    disk.wait_for_write();
    for round in 0..20 {
        let error = machine.pause_within(Duration::from_millis(round)).expect_err("the write has not ended");
        assert!(matches!(&error, MachineError::PauseTimedOut { what, .. } if what == "disk 0"), "{error}");
        assert!(machine.is_running());
    }
    // While a pause waits the vCPU runs; aborting is what ends it.
    let abort = machine.pause_abort();
    let (mut machine, paused) = std::thread::scope(|scope| {
        let pausing = scope.spawn(move || {
            let paused = machine.pause_within(WAIT_MAX);
            (machine, paused)
        });
        let before = word(&ram, RESULTS);
        until("the vCPU to run on", || word(&ram, RESULTS) > before + 1_000);
        until("the pause to be aborted", || {
            abort.abort();
            pausing.is_finished()
        });
        pausing.join().expect("thread")
    });
    let error = paused.expect_err("it was aborted");
    assert!(matches!(&error, MachineError::PauseAborted { what, .. } if what == "disk 0"), "{error}");
    let before = word(&ram, RESULTS);
    until("the vCPU to run on", || word(&ram, RESULTS) > before + 1_000);
    abort.abort();
    disk.let_writes_go(true);
    machine.pause().expect("the write has ended");
    let stopped = word(&ram, RESULTS);
    machine.save(&mut Vec::new()).expect("save");
    assert_eq!(word(&ram, RESULTS), stopped, "paused");
    machine.resume().expect("resume");
    until("the write to be answered", || {
        let mut status = [0];
        ram.read(REQUESTS + 0x80, &mut status).expect("status");
        let mut used = [0; 2];
        ram.read(0x30_2002, &mut used).expect("used");
        used == [1, 0] && status == [0]
    });
    for _ in 0..100 {
        machine.pause().expect("pause");
        machine.resume().expect("resume");
    }
}
