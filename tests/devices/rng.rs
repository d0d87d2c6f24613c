//! The source of random bytes.

use std::sync::Arc;

use mcd::device::virtio::rng::{REQUEST_BYTES_MAX, RngDevice};
use proptest::prelude::*;

use crate::rig::*;

fn bare() -> Rig<RngDevice<Memory>> {
    let (mem, machine) = (memory(), Arc::new(Machine::default()));
    let device = RngDevice::new(mem.clone(), GSI, machine.clone()).expect("device");
    device.unquiesce();
    Rig { mem, device, machine, added: 0 }
}

fn ready() -> Rig<RngDevice<Memory>> {
    let mut rig = bare();
    rig.set_up(0, SIZE);
    rig
}

fn state(rig: &Rig<RngDevice<Memory>>) -> Vec<u8> {
    let mut bytes = Vec::new();
    rig.device.save(&mut bytes);
    bytes
}

#[test]
fn buffers_are_filled_with_bytes_that_differ() {
    let mut rig = ready();
    assert_eq!((rig.read(0x08), rig.read(0x10)), (4, 0), "a source of random bytes, without features");
    for index in 0..2u16 {
        rig.descriptor(index, DATA + u64::from(index) * 0x1000, 64, WRITE, 0);
        rig.add(index);
    }
    rig.notify();
    assert_eq!((rig.used(), rig.used_entry(0), rig.used_entry(1)), (2, (0, 64), (1, 64)));
    let (a, b) = (rig.get(DATA, 64), rig.get(DATA + 0x1000, 64));
    assert!(a != b && a != [0; 64] && b != [0; 64]);
    assert_eq!(rig.get(DATA + 64, 64), [0; 64], "no more than asked for");
    assert_eq!((rig.read(0x60), rig.machine.line.lock().expect("line").clone()), (1, vec![true]));
    rig.write(0x64, 1);
    assert_eq!(*rig.machine.line.lock().expect("line"), [true, false]);
}

#[test]
fn a_request_gets_a_bounded_share() {
    let mut rig = ready();
    rig.descriptor(0, DATA, 100, WRITE | NEXT, 1);
    rig.descriptor(1, DATA + 0x1000, 0x4_0000, WRITE, 0);
    rig.add(0);
    rig.notify();
    let most = REQUEST_BYTES_MAX;
    assert_eq!(rig.used_entry(0), (0, most as u32));
    assert_eq!(rig.get(DATA + 0x1000 + most as u64 - 100, 0x4_0000 - most + 100), vec![0; 0x4_0000 - most + 100]);
}

#[test]
fn state_goes_to_another_device_which_looks_at_its_queue() {
    let mut rig = ready();
    rig.descriptor(0, DATA, 64, WRITE, 0);
    rig.add(0);
    rig.notify();
    // Put, and not yet told of.
    rig.descriptor(1, DATA + 0x1000, 64, WRITE, 0);
    rig.add(1);
    let saved = state(&rig);
    let other = bare();
    other.copy_memory(&rig);
    other.device.restore(&saved).expect("restore");
    assert_eq!(state(&other), saved);
    assert_eq!(*other.machine.line.lock().expect("line"), [true], "a set status raises the line again");
    other.device.unquiesce();
    assert_eq!((other.used(), other.used_entry(1)), (2, (1, 64)));
    for cut in 0..saved.len() {
        assert!(other.device.restore(&saved[..cut]).is_err());
    }
    let trailing = [saved.as_slice(), &[0]].concat();
    assert!(other.device.restore(&trailing).is_err());
}

#[test]
fn hostile_buffers_break_it() {
    type Case = (&'static str, fn(&mut Rig<RngDevice<Memory>>), &'static str);
    let cases: [Case; 6] = [
        ("readable", |r| r.descriptor(0, DATA, 64, 0, 0), "direction"),
        ("zero length", |r| r.descriptor(0, DATA, 0, WRITE, 0), "empty"),
        ("outside", |r| r.descriptor(0, MEMORY as u64 - 63, 64, WRITE, 0), "outside memory"),
        ("huge", |r| r.descriptor(0, 0, u32::MAX, WRITE, 0), "outside memory"),
        ("a loop", |r| r.descriptor(0, DATA, 64, WRITE | NEXT, 0), "no end"),
        ("indirect", |r| r.descriptor(0, TABLE, 16, WRITE | INDIRECT, 0), "indirect"),
    ];
    for (name, prepare, complaint) in cases {
        let mut rig = ready();
        prepare(&mut rig);
        rig.add(0);
        let before = rig.get(0, MEMORY);
        rig.notify();
        assert!(rig.is_broken() && rig.complaints()[0].contains(complaint), "{name}: {:?}", rig.complaints());
        assert!(rig.get(0, MEMORY) == before, "{name}: memory was written");
        rig.write(0x70, 0);
        rig.set_up(0, SIZE);
        rig.descriptor(0, DATA, 8, WRITE, 0);
        rig.add(0);
        rig.notify();
        assert_eq!(rig.used(), 1, "{name}: a reset heals it");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_chain_writes_what_was_not_given(
        descriptors in proptest::collection::vec(
            (
                prop_oneof![8 => DATA..DATA_END, 1 => any::<u64>()],
                prop_oneof![8 => 0u32..2000, 1 => any::<u32>()],
                0u16..8,
                0..SIZE + 1,
            ),
            usize::from(SIZE),
        ),
        heads in proptest::collection::vec(0..SIZE + 1, 1..8),
        claimed in prop_oneof![8 => 1..8u16, 1 => any::<u16>()],
    ) {
        let mut rig = ready();
        let mut given = vec![(USED, 6 + 8 * u64::from(SIZE))];
        for (index, (at, length, flags, next)) in (0u16..).zip(descriptors) {
            rig.descriptor(index, at, length, flags, next);
            given.push((at, if flags & WRITE != 0 { u64::from(length) } else { 0 }));
        }
        for head in heads {
            rig.add(head);
        }
        rig.put(AVAIL + 2, &claimed.to_le_bytes());
        let before = rig.get(0, MEMORY);
        rig.notify();
        let after = rig.get(0, MEMORY);
        for (at, _) in before.iter().zip(&after).enumerate().filter(|(_, (before, after))| before != after) {
            let at = at as u64;
            prop_assert!(given.iter().any(|(from, length)| *from <= at && at - from < *length), "{at:#x} was written");
        }
        prop_assert!(rig.is_broken() || rig.used() == claimed.min(SIZE));
        state(&rig);
    }
}
