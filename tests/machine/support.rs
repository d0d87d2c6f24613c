//! What the machine tests share: small ring-3 guests written in assembly, a network that is a pair
//! of queues, a console that is a vector, and the rule for hosts without KVM.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use mcd::machine::{CpuModel, GuestRam, InitialVcpu, Machine, NetBackend, Transmit};
use mcd::protocol::machine_shape::MachineShape;
use mcd::protocol::pages::PAGE_BYTES;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long a test waits for a guest before it says that it hangs.
pub const WAIT_MAX: Duration = Duration::from_secs(60);

/// Where guest code is loaded.
pub const CODE: u64 = 0x10_0000;
/// A page the guests write their findings to.
pub const RESULTS: u64 = 0x20_0000;
/// Guest memory of most tests.
pub const MEMORY: u64 = 16 << 20;

/// True if there is KVM; without it the test is skipped, or fails if the environment says that it
/// must run.
pub fn have_kvm() -> bool {
    if std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok() {
        return true;
    }
    assert!(std::env::var("MCD_REQUIRE_KVM").as_deref() != Ok("1"), "/dev/kvm is needed");
    println!("skipped: no /dev/kvm");
    false
}

/// Defines a function that returns the bytes of a piece of position-independent code.
#[macro_export]
macro_rules! guest_code {
    ($name:ident, $($line:expr),+ $(,)?) => {
        std::arch::global_asm!(
            concat!(".pushsection .rodata.", stringify!($name), ",\"a\""),
            concat!(".globl ", stringify!($name), "_begin"),
            concat!(stringify!($name), "_begin:"),
            $($line),+,
            concat!(".globl ", stringify!($name), "_end"),
            concat!(stringify!($name), "_end:"),
            ".popsection",
        );
        fn $name() -> &'static [u8] {
            // SAFETY: both symbols are defined by the assembly above, and only their addresses are
            // taken.
            unsafe extern "C" {
                #[link_name = concat!(stringify!($name), "_begin")]
                static BEGIN: u8;
                #[link_name = concat!(stringify!($name), "_end")]
                static END: u8;
            }
            // SAFETY: the two symbols delimit the bytes assembled above, in read-only data.
            unsafe {
                let begin = &raw const BEGIN;
                std::slice::from_raw_parts(begin, (&raw const END).offset_from(begin) as usize)
            }
        }
    };
}

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD_LOW: u64 = 0x3000;
const PD_DEVICES: u64 = 0x4000;
const TSS: u64 = 0x5000;
const TSS_BYTES: u32 = 0x68 + 8193;
const STACKS: u64 = 0x8_0000;

/// Lays out page tables (identity map of the first GiB and of the device window), a TSS that allows
/// every port, and `code`.
pub fn load(ram: &GuestRam, code: &[u8]) {
    // Present, writable, user, accessed; dirty and large for the leaves.
    let (table, leaf) = (0x27, 0xe7);
    let put = |address: u64, value: u64| ram.write(address, &value.to_le_bytes()).expect("table");
    put(PML4, PDPT | table);
    put(PDPT, PD_LOW | table);
    put(PDPT + 3 * 8, PD_DEVICES | table);
    for n in 0..512 {
        put(PD_LOW + n * 8, (n << 21) | leaf);
        put(PD_DEVICES + n * 8, (0xC000_0000 + (n << 21)) | leaf);
    }
    ram.write(TSS, &vec![0; TSS_BYTES as usize]).expect("tss");
    ram.write(TSS + 0x66, &0x68u16.to_le_bytes()).expect("tss");
    ram.write(CODE, code).expect("code");
}

/// The first state of vCPU `cpu`: 64-bit ring 3, at the start of the code, RDI = its number.
pub fn ring3(cpu: u64) -> InitialVcpu {
    let segment = |type_: u8, selector: u16, l: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let data = segment(3, 0x23, 0);
    let tss =
        kvm_segment { base: TSS, limit: TSS_BYTES - 1, selector: 0x28, type_: 11, present: 1, ..Default::default() };
    let sregs = kvm_sregs {
        cs: segment(11, 0x33, 1),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: tss,
        ldt: kvm_segment { unusable: 1, ..Default::default() },
        gdt: kvm_dtable { base: 0x7800, limit: 0, ..Default::default() },
        idt: kvm_dtable { base: 0x7800, limit: 0, ..Default::default() },
        cr0: 0x8005_0033,
        cr3: PML4,
        cr4: 0x620,
        efer: 0xd01,
        ..Default::default()
    };
    let regs = kvm_regs { rip: CODE, rsp: STACKS + (cpu + 1) * 0x1000, rdi: cpu, rflags: 2, ..Default::default() };
    InitialVcpu { regs, sregs, fpu: None, msrs: Vec::new() }
}

/// A console that can be read.
#[derive(Clone, Default)]
pub struct Console(pub Arc<Mutex<Vec<u8>>>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("console").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A network that is two queues.
pub struct Wires {
    to_guest: Mutex<VecDeque<Vec<u8>>>,
    from_guest: Mutex<Vec<Vec<u8>>>,
    readable: EventFd,
}

impl Wires {
    pub fn new() -> Arc<Wires> {
        let readable = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("eventfd");
        Arc::new(Wires { to_guest: Mutex::default(), from_guest: Mutex::default(), readable })
    }

    /// Puts a frame on the wire to the guest.
    pub fn send(&self, frame: &[u8]) {
        self.to_guest.lock().expect("wire").push_back(frame.to_vec());
        self.readable.write(1).expect("eventfd");
    }

    /// How many frames the guest has not taken.
    pub fn waiting(&self) -> usize {
        self.to_guest.lock().expect("wire").len()
    }

    /// The frames the guest sent.
    pub fn sent(&self) -> Vec<Vec<u8>> {
        self.from_guest.lock().expect("wire").clone()
    }
}

impl NetBackend for Wires {
    fn transmit(&self, frame: &[u8]) -> Transmit {
        self.from_guest.lock().expect("wire").push(frame.to_vec());
        Transmit::Accepted
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut queue = self.to_guest.lock().expect("wire");
        let Some(frame) = queue.pop_front() else {
            let _ = self.readable.read();
            return Ok(None);
        };
        buf[..frame.len()].copy_from_slice(&frame);
        Ok(Some(frame.len()))
    }

    fn readable_fd(&self) -> RawFd {
        self.readable.as_raw_fd()
    }
}

pub fn shape(cpus: u8) -> MachineShape {
    MachineShape::bare(MEMORY, cpus, [2, 0, 0, 0, 0, 1])
}

/// A machine without a guest.
pub fn empty(cpus: u8) -> (Machine, Arc<Wires>, Console) {
    let (wires, console) = (Wires::new(), Console::default());
    let machine = Machine::new(&shape(cpus), CpuModel::Host, wires.clone(), Vec::new(), Box::new(console.clone()))
        .expect("machine");
    (machine, wires, console)
}

/// A machine whose vCPUs are about to run `code`, paused.
pub fn loaded(cpus: u8, code: &[u8]) -> (Machine, Arc<Wires>, Console) {
    let (mut machine, wires, console) = empty(cpus);
    load(machine.memory(), code);
    machine.start_vcpus((0..u64::from(cpus)).map(ring3).collect()).expect("start");
    (machine, wires, console)
}

/// Reads a 64-bit word of guest memory.
pub fn word(ram: &GuestRam, address: u64) -> u64 {
    let mut bytes = [0; 8];
    ram.read(address, &mut bytes).expect("read");
    u64::from_le_bytes(bytes)
}

/// Waits until `done`, and fails if the guest takes far too long.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < WAIT_MAX, "gave up waiting: {what}");
        std::thread::yield_now();
    }
}

/// Copies the memory of one machine into another of the same shape.
pub fn copy_memory(from: &GuestRam, to: &GuestRam) {
    let mut page = [0; PAGE_BYTES];
    for index in 0..from.pages() {
        from.read_page(index, &mut page).expect("read");
        to.write_page(index, &page).expect("write");
    }
}
