//! The guest's clock over a restore, read by the guest.

use std::time::Duration;

use kvm_bindings::kvm_msr_entry;
use mcd::machine::{CpuModel, Machine};

use crate::guest_code;
use crate::support::*;

/// MSR_KVM_SYSTEM_TIME_NEW, and the bit that switches the clock on.
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const SYSTEM_TIME_ENABLED: u64 = 1;
/// Where KVM keeps vCPU 0's clock.
const CLOCK_PAGE: u64 = 0x30_0000;
/// The flag by which a guest is told that it was paused.
const GUEST_STOPPED: u64 = 2;

guest_code!(
    clock_reader,
    // Reads kvmclock over and over, as the ABI says; publishes the newest time, and notes a step
    // back in the next word.
    "2: mov esi, [0x300000]",
    "test esi, 1",
    "jnz 2b",
    "lfence",
    "rdtsc",
    "shl rdx, 32",
    "or rax, rdx",
    "sub rax, [0x300008]",
    "mov cl, [0x30001c]",
    "test cl, cl",
    "js 3f",
    "shl rax, cl",
    "jmp 4f",
    "3: neg cl",
    "shr rax, cl",
    "4: mov edx, [0x300018]",
    "mul rdx",
    "shrd rax, rdx, 32",
    "add rax, [0x300010]",
    "cmp esi, [0x300000]",
    "jne 2b",
    "cmp rax, [0x200000]",
    "jae 5f",
    "mov qword ptr [0x200008], 1",
    "5: mov [0x200000], rax",
    "jmp 2b",
);

fn build() -> Machine {
    Machine::new(&shape(1), CpuModel::Host, Wires::new(), Vec::new(), Box::new(Console::default())).expect("machine")
}

#[test]
fn the_clock_counts_what_it_is_told_to_and_never_goes_back() {
    if !have_kvm() {
        return;
    }
    let (mut active, mut other) = (build(), build());
    load(active.memory(), clock_reader());
    let mut vcpu = ring3(0);
    let data = CLOCK_PAGE | SYSTEM_TIME_ENABLED;
    vcpu.msrs.push(kvm_msr_entry { index: SYSTEM_TIME, data, ..Default::default() });
    active.start_vcpus(vec![vcpu]).expect("start");
    active.resume().expect("resume");
    let aheads = [0, 1_000, 0, 5_000_000, 3_600_000_000, 0].map(Duration::from_micros);
    for ahead in aheads {
        let ram = active.memory().clone();
        let before = word(&ram, RESULTS);
        until("the clock to go on", || word(&ram, RESULTS) > before);
        active.pause().expect("pause");
        let (mut state, last_ns) = (Vec::new(), word(active.memory(), RESULTS));
        active.save(&mut state).expect("save");
        copy_memory(active.memory(), other.memory());
        other.restore_later(&state, ahead).expect("restore");
        std::mem::swap(&mut active, &mut other);
        active.resume().expect("resume");
        let ram = active.memory().clone();
        until("the clock to go on", || word(&ram, RESULTS) != last_ns);
        let now_ns = word(&ram, RESULTS);
        assert!(u128::from(now_ns) >= u128::from(last_ns) + ahead.as_nanos(), "{now_ns} after {last_ns} and {ahead:?}");
        let flags = word(&ram, CLOCK_PAGE + 24) >> 40;
        assert!(ahead.is_zero() || flags & GUEST_STOPPED != 0, "the guest was not told: {flags:#x}");
    }
    active.pause().expect("pause");
    assert_eq!(word(active.memory(), RESULTS + 8), 0, "the clock went back");
}
