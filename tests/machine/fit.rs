//! What has to be the same on two hosts: the speed of the TSC, and every register that a guest can
//! change.

use kvm_bindings::kvm_msr_entry;
use mcd::machine::{CpuModel, Machine, MachineError, StateError, host_cpu};

use crate::support::*;

const MSRS: u16 = 9;

/// The MSRs in a saved state of one vCPU.
fn saved_msrs(state: &[u8]) -> Vec<(u32, u64)> {
    let mut rest = state;
    loop {
        let length = u32::from_le_bytes(rest[6..10].try_into().expect("a length")) as usize;
        if rest[..2] == MSRS.to_le_bytes() {
            let entries = rest[10..10 + length].chunks_exact(12);
            let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("a number"));
            let value = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("a number"));
            return entries.map(|entry| (number(&entry[..4]), value(&entry[4..]))).collect();
        }
        rest = &rest[10 + length..];
    }
}

fn machine(model: CpuModel) -> Machine {
    Machine::new(&shape(1), model, Wires::new(), Vec::new(), Box::new(Console::default())).expect("machine")
}

#[test]
fn memory_types_are_saved_and_restored() {
    if !have_kvm() {
        return;
    }
    for model in [CpuModel::Host, CpuModel::Baseline] {
        let set = [
            (0x200, 0xc000_0000u64),
            (0x201, 0xff_c000_0800),
            (0x20e, 0x1_0000_0006),
            (0x20f, 0xff_f000_0800),
            (0x250, 0x0606_0606_0606_0606),
            (0x259, 0x0001_0000_0404_0600),
            (0x26f, 0x0505_0505_0505_0505),
            (0x2ff, 0xc06),
        ];
        let mut first = machine(model);
        let mut initial = ring3(0);
        initial.msrs = set
            .iter()
            .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
            .collect();
        load(first.memory(), &[0xeb, 0xfe]);
        first.start_vcpus(vec![initial]).expect("start");
        first.resume().expect("resume");
        first.pause().expect("pause");
        let mut state = Vec::new();
        first.save(&mut state).expect("save");
        let mut second = machine(model);
        copy_memory(first.memory(), second.memory());
        second.restore(&state).expect("restore");
        let mut again = Vec::new();
        second.resume().expect("resume");
        second.pause().expect("pause");
        second.save(&mut again).expect("save");
        for (index, data) in set {
            for (which, state) in [("first", &state), ("second", &again)] {
                let found = saved_msrs(state).into_iter().find(|(saved, _)| *saved == index);
                assert_eq!(found, Some((index, data)), "MSR {index:#x} of the {which} machine, {}", model.name());
            }
        }
    }
}

#[test]
fn a_machine_that_could_not_be_restored_here_is_refused_beforehand() {
    if !have_kvm() {
        return;
    }
    let host = host_cpu(CpuModel::Host).expect("KVM");
    let mut own = machine(CpuModel::Host);
    assert_eq!(own.tsc_khz(), host.tsc_khz);
    own.rehearse(host.tsc_khz).expect("its own state");
    // Not the same, but what a host takes for it.
    own.rehearse(host.tsc_khz + host.tsc_khz / 10_000).expect("100 ppm off");
    let other_khz = host.tsc_khz / 2;
    match machine(CpuModel::Host).rehearse(other_khz) {
        Ok(()) => assert!(host.tsc_scales, "a TSC of another speed was taken"),
        Err(MachineError::State { error: StateError::Tsc { saved_khz, host_khz }, .. }) => {
            assert!(!host.tsc_scales);
            assert_eq!((saved_khz, host_khz), (other_khz, host.tsc_khz));
        }
        Err(other) => panic!("{other}"),
    }
    // It can be started or restored all the same.
    load(own.memory(), &[0xeb, 0xfe]);
    own.start_vcpus(vec![ring3(0)]).expect("start");
    own.resume().expect("resume");
    own.pause().expect("pause");
}
