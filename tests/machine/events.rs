//! What a guest tells through ports, and what becomes of a guest that ends itself.

use mcd::machine::cpu_digest;
use mcd::protocol::guest_event::GuestEvent;

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
    floods_and_shuts_down,
    // vCPU 1 rings the event port for ever with "booted", vCPU 0 for a while, and then shuts down.
    "mov dx, 0x604",
    "mov eax, 1",
    "mov ecx, 5000",
    "1: out dx, eax",
    "test rdi, rdi",
    "jnz 1b",
    "dec ecx",
    "jnz 1b",
    "mov eax, 2",
    "2: out dx, eax",
    "inc qword ptr [0x200000]",
    "jmp 2b",
);

guest_code!(resets_by_keyboard, "mov al, 0xfe", "1: out 0x64, al", "jmp 1b",);

guest_code!(resets_by_register, "mov dx, 0x60a", "mov al, 1", "1: out dx, al", "jmp 1b",);

guest_code!(powers_off, "mov dx, 0x608", "mov al, 0x34", "1: out dx, al", "jmp 1b",);

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
fn first_event(code: &'static [u8]) -> GuestEvent {
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
    assert_eq!(events.recv_timeout(WAIT_MAX), Ok(GuestEvent::Booted));
    assert_eq!(events.recv_timeout(WAIT_MAX), Ok(GuestEvent::Shutdown));
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
    assert_eq!(first_event(panics()), GuestEvent::Panicked);
    assert_eq!(first_event(triple_faults()), GuestEvent::Reset);
}

#[test]
fn a_flood_of_events_is_bounded_and_loses_no_shutdown() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(2, floods_and_shuts_down());
    machine.resume().expect("resume");
    // Nobody reads until the guest has written everything.
    let ram = machine.memory().clone();
    let events = machine.events();
    assert_eq!(events.recv_timeout(WAIT_MAX), Ok(GuestEvent::Booted));
    assert_eq!(events.recv_timeout(WAIT_MAX), Ok(GuestEvent::Shutdown), "one boot of thousands, then the end");
    for _ in 0..20 {
        machine.pause().expect("pause");
        machine.resume().expect("resume");
    }
    drop(machine);
    assert_eq!(word(&ram, RESULTS), 0, "the vCPU that shut down is not entered again");
    assert_eq!(events.collect::<Vec<_>>(), [], "delivered once, and the receiver ends with the machine");
}

#[test]
fn every_way_to_end_a_guest_is_delivered_once() {
    if !have_kvm() {
        return;
    }
    for (code, end) in [
        (resets_by_keyboard(), GuestEvent::Reset),
        (resets_by_register(), GuestEvent::Reset),
        (powers_off(), GuestEvent::Shutdown),
        (panics(), GuestEvent::Panicked),
    ] {
        // Both vCPUs do the same.
        let (mut machine, _wires, _console) = loaded(2, code);
        machine.resume().expect("resume");
        let events = machine.events();
        assert_eq!(events.recv_timeout(WAIT_MAX), Ok(end.clone()));
        for _ in 0..10 {
            machine.pause().expect("pause");
            machine.resume().expect("resume");
        }
        drop(machine);
        assert_eq!(events.collect::<Vec<_>>(), [], "{end:?}");
    }
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
