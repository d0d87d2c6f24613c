//! An interrupt that a device has asked for is in the saved state, however the pause cuts between
//! those who ask and those who are asked.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use mcd::machine::{CpuModel, Machine, NetBackend, Transmit};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::guest_code;
use crate::state::{IRQ_CHIP, LAPIC, sections};
use crate::support::*;

guest_code!(
    sender_and_interrupted,
    // vCPU 0 switches its interrupt controller on, takes the network's line, which is
    // level-triggered, as vector 0x50, and counts; it serves no interrupt. vCPU 1 sets both queues
    // up, puts one frame of 64 bytes into the second one, and notifies.
    "test rdi, rdi",
    "jnz 2f",
    "mov ebx, 0xfee00000",
    "mov dword ptr [rbx + 0xf0], 0x1ff",
    "mov ebx, 0xfec00000",
    "mov dword ptr [rbx], 0x31",
    "mov dword ptr [rbx + 0x10], 0",
    "mov dword ptr [rbx], 0x30",
    "mov dword ptr [rbx + 0x10], 0x8050",
    "mov qword ptr [0x200000], 1",
    "1: inc qword ptr [0x200008]",
    "jmp 1b",
    "2: cmp qword ptr [0x200000], 1",
    "jne 2b",
    "mov edi, 0xd0000000",
    "mov dword ptr [rdi + 0x70], 1",
    "mov dword ptr [rdi + 0x70], 3",
    "mov dword ptr [rdi + 0x24], 1",
    "mov dword ptr [rdi + 0x20], 1",
    "mov dword ptr [rdi + 0x70], 11",
    "mov dword ptr [rdi + 0x30], 1",
    "mov dword ptr [rdi + 0x38], 8",
    "mov dword ptr [rdi + 0x80], 0x300000",
    "mov dword ptr [rdi + 0x90], 0x301000",
    "mov dword ptr [rdi + 0xa0], 0x302000",
    "mov dword ptr [rdi + 0x44], 1",
    "mov dword ptr [rdi + 0x70], 15",
    "mov qword ptr [0x300000], 0x400000",
    "mov dword ptr [0x300008], 76",
    "mov word ptr [0x301002], 1",
    "mov dword ptr [rdi + 0x50], 1",
    "3: pause",
    "jmp 3b",
);

/// Offsets in a LAPIC's page, of eight registers of 32 bits, 16 bytes apart.
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;
const VECTOR: usize = 0x50;

/// A backend that takes a frame only when it is told to, and its vCPU waits until then.
struct Slow {
    /// Frames that were handed over, and whether they are taken.
    state: Mutex<(u32, bool)>,
    changed: Condvar,
    nothing: EventFd,
}

impl NetBackend for Slow {
    fn transmit(&self, _frame: &[u8]) -> Transmit {
        let mut state = self.state.lock().expect("lock");
        state.0 += 1;
        self.changed.notify_all();
        drop(self.changed.wait_while(state, |state| !state.1).expect("lock"));
        Transmit::Accepted
    }

    fn receive(&self, _buf: &mut [u8]) -> io::Result<Option<usize>> {
        Ok(None)
    }

    fn readable_fd(&self) -> RawFd {
        self.nothing.as_raw_fd()
    }
}

impl Slow {
    fn wait_for_frame(&self) {
        let state = self.state.lock().expect("lock");
        let waited = self.changed.wait_timeout_while(state, WAIT_MAX, |state| state.0 == 0).expect("lock");
        assert!(!waited.1.timed_out(), "no frame was sent");
    }

    fn take(&self) {
        self.state.lock().expect("lock").1 = true;
        self.changed.notify_all();
    }
}

fn payload(state: &[u8], kind: u16, instance: u16) -> Vec<u8> {
    let found = sections(state).into_iter().find(|(k, i, _)| (*k, *i) == (kind, instance));
    found.expect("the section").2
}

fn has_vector(lapic: &[u8], registers: usize) -> bool {
    lapic[registers + VECTOR / 32 * 16 + VECTOR % 32 / 8] >> (VECTOR % 8) & 1 == 1
}

/// Waits until the vCPU that counts has not changed its count for a while.
fn wait_until_still(count: impl Fn() -> u64) {
    const STILL: Duration = Duration::from_millis(20);
    let (mut seen, mut since) = (count(), Instant::now());
    until("the first vCPU to be parked", || {
        let now = count();
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        since.elapsed() >= STILL
    });
}

/// A vCPU that is parked can still be sent an interrupt by one that is not. It was lost: the I/O
/// APIC waited for ever for the end of an interrupt that the saved vCPU never got.
#[test]
fn an_interrupt_for_a_parked_vcpu_is_in_the_state() {
    if !have_kvm() {
        return;
    }
    let nothing = EventFd::new(EFD_CLOEXEC).expect("eventfd");
    let backend = Arc::new(Slow { state: Mutex::new((0, false)), changed: Condvar::new(), nothing });
    let mut machine =
        Machine::new(&shape(2), CpuModel::Host, backend.clone(), Vec::new(), Box::new(Console::default()))
            .expect("machine");
    load(machine.memory(), sender_and_interrupted());
    machine.start_vcpus((0..2).map(ring3).collect()).expect("start");
    let ram = machine.memory().clone();
    machine.resume().expect("resume");
    backend.wait_for_frame();
    let (machine, state) = std::thread::scope(|scope| {
        let pausing = scope.spawn(move || {
            machine.pause().expect("pause");
            let mut state = Vec::new();
            machine.save(&mut state).expect("save");
            (machine, state)
        });
        wait_until_still(|| word(&ram, RESULTS + 8));
        backend.take();
        pausing.join().expect("thread")
    });
    drop(machine);
    let (lapic, io_apic) = (payload(&state, LAPIC, 0), payload(&state, IRQ_CHIP, 2));
    // Behind two words: base address, register number, id, requests; then an entry of 8 bytes for
    // each line.
    let entry = &io_apic[8 + 24 + 16 * 8..][..8];
    assert_eq!((usize::from(entry[0]), entry[1] & 0x80), (VECTOR, 0x80), "vector and trigger of the network's line");
    assert_ne!(entry[1] & 0x40, 0, "the line waits for the end of its interrupt");
    assert!(has_vector(&lapic, REQUESTED) || has_vector(&lapic, IN_SERVICE), "and the vCPU has it");
}
