//! Saving and restoring: exact, complete, and safe against bytes that are no state.

use kvm_bindings::kvm_msr_entry;
use mcd::machine::{CpuModel, Machine, MachineError};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::guest_code;
use crate::support::*;

guest_code!(
    careful_counter,
    // Every round: write the count to the serial scratch register and read it back, read a device
    // register, write the count to the console, publish it. A lost read shows as a wrong value, a
    // doubled or lost write in the console's sequence.
    "2: inc rbx",
    "mov dx, 0x3ff",
    "mov al, bl",
    "out dx, al",
    "xor eax, eax",
    "in al, dx",
    "cmp al, bl",
    "jne 3f",
    "mov eax, [0xd0000000]",
    "cmp eax, 0x74726976",
    "jne 3f",
    "mov dx, 0x3f8",
    "mov al, bl",
    "out dx, al",
    "mov [0x200000], rbx",
    "jmp 2b",
    "3: mov qword ptr [0x200008], 1",
    "4: jmp 4b",
);

guest_code!(
    rich_state,
    // Vector registers, a running periodic LAPIC timer, a virtio device half set up, the serial
    // port reprogrammed.
    "mov rax, 0x0123456789abcdef",
    "movq xmm3, rax",
    "movq xmm15, rax",
    "fld1",
    "mov edi, 0xfee00000",
    "mov dword ptr [rdi + 0xf0], 0x1ff",
    "mov dword ptr [rdi + 0x3e0], 0x3",
    "mov dword ptr [rdi + 0x320], 0x20055",
    "mov dword ptr [rdi + 0x380], 0x7fffffff",
    "mov edi, 0xd0000000",
    "mov dword ptr [rdi + 0x70], 1",
    "mov dword ptr [rdi + 0x70], 3",
    "mov dword ptr [rdi + 0x24], 1",
    "mov dword ptr [rdi + 0x20], 1",
    "mov dword ptr [rdi + 0x30], 1",
    "mov dx, 0x3fb",
    "mov al, 0x13",
    "out dx, al",
    "lock inc qword ptr [0x200000]",
    "5: inc rbx",
    "jmp 5b",
);

#[test]
fn io_in_flight_is_neither_lost_nor_doubled() {
    if !have_kvm() {
        return;
    }
    let console = Console::default();
    let build = || {
        Machine::new(&shape(1), CpuModel::Host, Wires::new(), Vec::new(), Box::new(console.clone())).expect("machine")
    };
    let (mut active, mut other) = (build(), build());
    load(active.memory(), careful_counter());
    active.start_vcpus(vec![ring3(0)]).expect("start");
    let mut state = Vec::new();
    for round in 0..300u64 {
        let before = word(active.memory(), RESULTS);
        active.resume().expect("resume");
        let ram = active.memory().clone();
        until("the counter to count", || word(&ram, RESULTS) > before + round % 5);
        active.pause().expect("pause");
        state.clear();
        active.save(&mut state).expect("save");
        copy_memory(active.memory(), other.memory());
        other.restore(&state).expect("restore");
        std::mem::swap(&mut active, &mut other);
    }
    assert_eq!(word(active.memory(), RESULTS + 8), 0, "a read came back wrong");
    let written = console.0.lock().expect("console").clone();
    let count = word(active.memory(), RESULTS);
    assert!(written.len() as u64 == count || written.len() as u64 == count + 1, "{} of {count}", written.len());
    for (at, byte) in written.iter().enumerate() {
        assert_eq!(*byte, (at as u64 + 1) as u8, "the console's sequence breaks at {at}");
    }
}

/// The sections of a state: (kind, instance, payload).
pub fn sections(state: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
    let mut found = Vec::new();
    let mut rest = state;
    while !rest.is_empty() {
        let field = |at: usize| u16::from_le_bytes([rest[at], rest[at + 1]]);
        let length = u32::from_le_bytes([rest[6], rest[7], rest[8], rest[9]]) as usize;
        found.push((field(0), field(4), rest[10..10 + length].to_vec()));
        rest = &rest[10 + length..];
    }
    found
}

const VCPU_RUN: u16 = 2;
pub const LAPIC: u16 = 8;
const MSRS: u16 = 9;
const PIT: u16 = 16;
pub const IRQ_CHIP: u16 = 17;
const XSAVE: u16 = 5;
const CLOCK: u16 = 18;

/// Blanks what runs on while the machine is paused: the TSC, the LAPIC timer's count, the PIT's
/// start time, kvmclock.
fn without_clocks(state: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
    let mut all = sections(state);
    for (kind, _, payload) in &mut all {
        match *kind {
            LAPIC => payload[0x390..0x394].fill(0),
            MSRS => {
                for entry in payload.chunks_exact_mut(12).filter(|e| e[..4] == 0x10u32.to_le_bytes()) {
                    entry[4..].fill(0);
                }
            }
            PIT => {
                for channel in payload[..72].chunks_exact_mut(24) {
                    channel[16..24].fill(0);
                }
            }
            // Behind the first three fields: what the TSC showed at which time of kvmclock.
            VCPU_RUN => payload.truncate(9),
            CLOCK => payload.clear(),
            // Whether a component that holds its initial values counts as in use (XSTATE_BV, at
            // 512) is the processor's choice at each save (Intel SDM vol. 1, 13.6): the same
            // registers, told in two ways.
            XSAVE => {
                for (bit, area) in [(1u8, 160..416), (2, 576..832)] {
                    if payload[area].iter().all(|byte| *byte == 0) {
                        payload[512] &= !(1 << bit);
                    }
                }
            }
            _ => {}
        }
    }
    all
}

/// A machine that ran `rich_state` until everything was set up, paused, and its state.
fn rich_machine(cpus: u8) -> (Machine, Vec<u8>) {
    let (mut machine, _wires, _console) = empty(cpus);
    load(machine.memory(), rich_state());
    let msr = |index: u32, data: u64| kvm_msr_entry { index, data, ..Default::default() };
    let mut initial: Vec<_> = (0..u64::from(cpus)).map(ring3).collect();
    for (cpu, vcpu) in initial.iter_mut().enumerate() {
        vcpu.msrs = vec![
            msr(0xc000_0081, 0x0023_0010_0000_0000),
            msr(0xc000_0082, 0xffff_8000_1234_5000 + cpu as u64),
            msr(0xc000_0084, 0x4_7700),
            msr(0xc000_0102, 0x7fff_0000_1000),
            msr(0x4b56_4d01, 0x30_0001 + 64 * cpu as u64),
        ];
    }
    machine.start_vcpus(initial).expect("start");
    machine.resume().expect("resume");
    let ram = machine.memory().clone();
    until("every vCPU to set everything up", || word(&ram, RESULTS) == u64::from(cpus));
    machine.pause().expect("pause");
    let mut state = Vec::new();
    machine.save(&mut state).expect("save");
    (machine, state)
}

#[test]
fn a_restored_machine_saves_the_same_state() {
    if !have_kvm() {
        return;
    }
    for cpus in [1, 2] {
        let (first, state) = rich_machine(cpus);
        let (mut second, _wires, _console) = empty(cpus);
        copy_memory(first.memory(), second.memory());
        second.restore(&state).expect("restore");
        let mut again = Vec::new();
        second.save(&mut again).expect("save");
        for (ours, theirs) in without_clocks(&state).iter().zip(&without_clocks(&again)) {
            assert_eq!(ours, theirs, "section {} of instance {}", ours.0, ours.1);
        }
        assert_eq!(state.len(), again.len());
        // The timer goes on from about where it was, not from its start.
        let count = |s: &[u8]| {
            let lapic = sections(s).into_iter().find(|s| s.0 == LAPIC).expect("lapic").2;
            u32::from_le_bytes(lapic[0x390..0x394].try_into().expect("count"))
        };
        assert!(count(&state) > 0 && count(&again) > 0 && count(&again) <= 0x7fff_ffff);
        second.resume().expect("resume");
        second.pause().expect("pause");
    }
}

#[test]
fn a_state_of_another_machine_is_refused() {
    if !have_kvm() {
        return;
    }
    let (_machine, state) = rich_machine(1);
    let (mut two, _wires, _console) = empty(2);
    let error = two.restore(&state).expect_err("another shape");
    assert!(error.to_string().contains("1 vCPUs"), "{error}");
    assert!(matches!(two.resume(), Err(MachineError::HalfRestored)));
    assert!(matches!(two.save(&mut Vec::new()), Err(MachineError::HalfRestored)));
}

#[test]
fn a_running_machine_is_neither_saved_nor_restored() {
    if !have_kvm() {
        return;
    }
    let (mut machine, state) = rich_machine(1);
    machine.resume().expect("resume");
    assert!(matches!(machine.save(&mut Vec::new()), Err(MachineError::Running { .. })));
    assert!(matches!(machine.restore(&state), Err(MachineError::Running { .. })));
    assert!(machine.is_running());
}

#[test]
fn damaged_state_is_refused_or_harmless() {
    if !have_kvm() {
        return;
    }
    let (_machine, state) = rich_machine(1);
    let (mut victim, _wires, _console) = empty(1);
    for cut in (0..state.len()).step_by(7) {
        assert!(victim.restore(&state[..cut]).is_err(), "cut at {cut}");
    }
    let mut longer = state.clone();
    longer.push(0);
    assert!(victim.restore(&longer).is_err());
    let victim = std::cell::RefCell::new(victim);
    let mut runner = TestRunner::new(Config { cases: 400, failure_persistence: None, ..Config::default() });
    let damage = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20);
    runner
        .run(&damage, |changes| {
            let mut damaged = state.clone();
            for (at, byte) in changes {
                damaged[at.index(state.len())] = byte;
            }
            let _ = victim.borrow_mut().restore(&damaged);
            Ok(())
        })
        .expect("no panic");
    let mut victim = victim.into_inner();
    victim.restore(&state).expect("a whole state heals the machine");
    victim.resume().expect("resume");
    victim.pause().expect("pause");
}
