//! Pausing: never hangs, never loses a kick.

use std::time::Instant;

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
            assert_eq!(word(&ram, RESULTS), at, "a paused guest writes nothing");
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

guest_code!(
    measure_gaps,
    // Keeps the longest time between two rounds, in TSC ticks, at 0x200008.
    "1: rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "mov rcx, rax",
    "sub rcx, r8",
    "mov r8, rax",
    "inc qword ptr [0x200000]",
    "cmp rcx, [0x200008]",
    "jbe 1b",
    "mov [0x200008], rcx",
    "jmp 1b",
);

/// The middle one.
fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values[values.len() / 2]
}

/// Prints what an empty pause costs here, as seen from both sides. It asserts nothing about time.
#[test]
fn pause_times_are_reported() {
    if !have_kvm() {
        return;
    }
    let (mut machine, _wires, _console) = loaded(1, measure_gaps());
    let ram = machine.memory().clone();
    let mut state = Vec::with_capacity(64 << 10);
    let (mut times, mut gaps_us) = (Vec::new(), Vec::new());
    // SAFETY: reads the time stamp counter.
    let tsc = || unsafe { std::arch::x86_64::_rdtsc() };
    let (start, start_tsc) = (Instant::now(), tsc());
    machine.resume().expect("resume");
    for _ in 0..500 {
        let steps = word(&ram, RESULTS);
        until("the guest to measure", || word(&ram, RESULTS) > steps + 5_000);
        ram.write(RESULTS + 8, &[0; 8]).expect("reset");
        machine.pause().expect("pause");
        state.clear();
        machine.save(&mut state).expect("save");
        machine.resume().expect("resume");
        times.push(machine.pause_times());
        until("the guest to see the gap", || word(&ram, RESULTS) > steps + 6_000 && word(&ram, RESULTS + 8) > 0);
        let ticks_per_us = (tsc() - start_tsc) / u64::try_from(start.elapsed().as_micros()).expect("time").max(1);
        gaps_us.push(word(&ram, RESULTS + 8) / ticks_per_us.max(1));
    }
    machine.pause().expect("pause");
    println!(
        "medians of an empty pause, in µs: stop {}, settle {}, encode {}; the guest sees {}; {} bytes of state",
        median(times.iter().map(|t| t.stop_us).collect()),
        median(times.iter().map(|t| t.settle_us).collect()),
        median(times.iter().map(|t| t.encode_us).collect()),
        median(gaps_us),
        state.len()
    );
}
