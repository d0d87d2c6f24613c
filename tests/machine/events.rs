//! What a guest tells through ports, and what becomes of a guest that ends itself.

use mcd::machine::{MachineEvent, cpu_digest};

use crate::guest_code;
use crate::support::*;

guest_code!(
    boots_and_shuts_down,
    "mov dx, 0x604",
    "mov eax, 1",
    "out dx, eax",
    "mov eax, 99",
    "out dx, eax",
    "mov qword ptr [0x200000], 1",
    "mov eax, 2",
    "out dx, eax",
    "mov qword ptr [0x200000], 2",
    "1: jmp 1b",
);

guest_code!(panics, "mov dx, 0x604", "mov eax, 3", "out dx, eax", "1: jmp 1b",);

guest_code!(
    triple_faults,
    // There is no IDT: any exception ends in a shutdown.
    "ud2",
);

guest_code!(
    reads_where_nothing_is,
    "mov dx, 0x601",
    "in al, dx",
    "mov [0x200000], al",
    "mov edi, 0xd0fff000",
    "mov eax, [rdi]",
    "mov [0x200008], eax",
    "mov dword ptr [rdi], 5",
    "mov byte ptr [0x200010], 1",
    "1: jmp 1b",
);

/// The first event of a machine that runs `code`.
fn first_event(code: &'static [u8]) -> MachineEvent {
    let (mut machine, _wires, _console) = loaded(1, code);
    machine.resume().expect("resume");
    let event = machine.events().recv_timeout(WAIT_MAX).expect("event");
    // It can still be paused and saved.
    machine.pause().expect("pause");
    machine.save(&mut Vec::new()).expect("save");
    event
}

#[test]
fn a_guest_that_shuts_down_stays_down_in_another_machine_too() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, boots_and_shuts_down());
    machine.resume().expect("resume");
    let events = machine.events();
    assert_eq!(events.recv_timeout(WAIT_MAX), Ok(MachineEvent::Booted));
    assert_eq!(events.recv_timeout(WAIT_MAX), Ok(MachineEvent::Shutdown));
    for _ in 0..10 {
        machine.pause().expect("pause");
        machine.resume().expect("resume");
    }
    machine.pause().expect("pause");
    assert_eq!(word(machine.memory(), RESULTS), 1, "nothing runs after the shutdown");
    let mut state = Vec::new();
    machine.save(&mut state).expect("save");
    let (mut other, _wires, _console) = empty(1);
    copy_memory(machine.memory(), other.memory());
    other.restore(&state).expect("restore");
    for _ in 0..10 {
        other.resume().expect("resume");
        other.pause().expect("pause");
    }
    assert_eq!(word(other.memory(), RESULTS), 1);
}

#[test]
fn a_panic_and_a_triple_fault_are_told_apart() {
    if !have_kvm() {
        return;
    }
    assert_eq!(first_event(panics()), MachineEvent::GuestPanic);
    assert_eq!(first_event(triple_faults()), MachineEvent::Reset);
}

#[test]
fn where_nothing_is_ones_are_read() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, reads_where_nothing_is());
    machine.resume().expect("resume");
    let ram = machine.memory().clone();
    until("the guest to look around", || word(&ram, RESULTS + 16) == 1);
    assert_eq!((word(&ram, RESULTS), word(&ram, RESULTS + 8)), (0xff, 0xffff_ffff));
    machine.pause().expect("pause");
}

#[test]
fn the_cpu_digest_is_the_same_on_every_core() {
    if !have_kvm() {
        return;
    }
    let digests: Vec<u64> = (0..8)
        .map(|n| {
            std::thread::spawn(move || {
                use nix::sched::{CpuSet, sched_setaffinity};
                let mut set = CpuSet::new();
                let cores = std::thread::available_parallelism().map_or(1, usize::from);
                set.set(n % cores).expect("core");
                let _ = sched_setaffinity(nix::unistd::Pid::from_raw(0), &set);
                cpu_digest(mcd::machine::CpuModel::Host).expect("digest")
            })
            .join()
            .expect("thread")
        })
        .collect();
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "{digests:x?}");
    assert_ne!(digests[0], 0);
}
