//! Pausing: never hangs, never loses a kick.

use std::time::Duration;

use crate::guest_code;
use crate::support::*;

guest_code!(
    count_up,
    // Each vCPU counts in its own word.
    "1: inc qword ptr [0x200000 + rdi * 8]",
    "jmp 1b",
);

guest_code!(
    sleep_for_ever,
    "1: inc qword ptr [0x200000 + rdi * 8]",
    "mov dx, 0x600",
    "mov eax, 0xffffffff",
    "out dx, eax",
    "jmp 1b",
);

guest_code!(
    sleep_a_little,
    "1: inc qword ptr [0x200000 + rdi * 8]",
    "mov dx, 0x600",
    "mov eax, 50",
    "out dx, eax",
    "jmp 1b",
);

guest_code!(
    port_storm,
    "1: inc qword ptr [0x200000 + rdi * 8]",
    "mov dx, 0x3ff",
    "in al, dx",
    "mov eax, [0xd0000000]",
    "jmp 1b",
);

/// 1,000 cycles of pause and resume; after each resume the guest must have moved if it can.
fn cycles(cpus: u8, code: &'static [u8], moves: bool) {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(cpus, code);
    let mut state = Vec::new();
    machine.resume().expect("resume");
    let ram = machine.memory().clone();
    until("first steps", || (0..u64::from(cpus)).all(|cpu| word(&ram, RESULTS + cpu * 8) > 0));
    for round in 0..1_000u64 {
        machine.pause().expect("pause");
        assert!(!machine.is_running());
        let at = word(&ram, RESULTS);
        if round % 10 == 0 {
            state.clear();
            machine.save(&mut state).expect("save");
            assert_eq!(word(&ram, RESULTS), at, "a paused guest stands still");
        }
        machine.resume().expect("resume");
        if moves && round % 3 != 0 {
            until("the guest to move", || word(&ram, RESULTS) != at);
        }
    }
    machine.pause().expect("pause");
}

#[test]
fn a_thousand_pauses_of_a_busy_guest() {
    cycles(1, count_up(), true);
}

#[test]
fn a_thousand_pauses_of_two_busy_vcpus() {
    cycles(2, count_up(), true);
}

#[test]
fn a_thousand_pauses_in_the_wait_port() {
    cycles(1, sleep_for_ever(), false);
    cycles(2, sleep_a_little(), true);
}

#[test]
fn a_thousand_pauses_amid_port_and_memory_io() {
    cycles(1, port_storm(), true);
    cycles(2, port_storm(), true);
}

#[test]
fn pause_resume_pause_at_once_is_not_lost() {
    if !have_kvm() {
        return;
    }
    for code in [count_up(), sleep_a_little()] {
        let (mut machine, _wires, _console) = loaded(2, code);
        for _ in 0..1_000 {
            machine.resume().expect("resume");
            machine.pause().expect("pause");
            machine.resume().expect("resume");
            machine.resume().expect("a second resume is none");
            machine.pause().expect("pause");
            machine.pause().expect("a second pause is none");
        }
    }
}

#[test]
fn a_pause_does_not_end_a_wait() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, sleep_for_ever());
    let ram = machine.memory().clone();
    machine.resume().expect("resume");
    // The first wait of a fresh machine returns at once, the second sleeps.
    until("the guest to sleep", || word(&ram, RESULTS) == 2);
    for _ in 0..200 {
        machine.pause().expect("pause");
        machine.resume().expect("resume");
    }
    machine.pause().expect("pause");
    assert_eq!(word(&ram, RESULTS), 2, "the guest slept through");
}

#[test]
fn pause_times_are_reported() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, count_up());
    let mut stop = Vec::new();
    let mut state = Vec::with_capacity(64 << 10);
    let mut gaps = Vec::new();
    for _ in 0..500 {
        machine.resume().expect("resume");
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_micros(500) {
            std::hint::spin_loop();
        }
        let start = std::time::Instant::now();
        machine.pause().expect("pause");
        state.clear();
        machine.save(&mut state).expect("save");
        gaps.push(start.elapsed().as_micros() as u64);
        stop.push(machine.pause_times());
    }
    gaps.sort_unstable();
    let mut stops: Vec<u64> = stop.iter().map(|t| t.stop_us).collect();
    stops.sort_unstable();
    let mut settles: Vec<u64> = stop.iter().map(|t| t.settle_us).collect();
    settles.sort_unstable();
    let mut encodes: Vec<u64> = stop.iter().map(|t| t.encode_us).collect();
    encodes.sort_unstable();
    println!(
        "pause and save {} µs, of it stop {} settle {} encode {}; {} bytes",
        gaps[250],
        stops[250],
        settles[250],
        encodes[250],
        state.len()
    );
    assert!(!state.is_empty());
}
