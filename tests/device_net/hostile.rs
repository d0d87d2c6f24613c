//! Drivers that break the rules, and states that no device was ever in: the device breaks, the
//! process does not.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::rig::*;

/// Each hostile transmit set-up, with words its complaint must have.
type Hostile = (&'static str, fn(&mut Rig), &'static str);

/// A hostile receive set-up.
type HostileBuffer = (&'static str, fn(&mut Rig));

const HOSTILE: [Hostile; 12] = [
    (
        "loop",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 20, NEXT, 1);
            r.descriptor(TX, 1, 0x4_0000, 20, NEXT, 0);
            r.add(TX, 0)
        },
        "no end",
    ),
    (
        "self loop",
        |r| {
            r.descriptor(TX, 2, 0x4_0000, 1, NEXT, 2);
            r.add(TX, 2)
        },
        "no end",
    ),
    (
        "next outside the table",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 20, NEXT, 900);
            r.add(TX, 0)
        },
        "no end",
    ),
    ("head outside the table", |r| r.add(TX, SIZE + 5), "no end"),
    (
        "outside memory",
        |r| {
            r.descriptor(TX, 0, MEMORY as u64 - 10, 20, 0, 0);
            r.add(TX, 0)
        },
        "outside memory",
    ),
    (
        "address wraps",
        |r| {
            r.descriptor(TX, 0, u64::MAX - 5, 20, 0, 0);
            r.add(TX, 0)
        },
        "outside memory",
    ),
    (
        "zero length",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 0, 0, 0);
            r.add(TX, 0)
        },
        "empty",
    ),
    (
        "shorter than a header",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 11, 0, 0);
            r.add(TX, 0)
        },
        "empty",
    ),
    (
        "huge",
        |r| {
            r.descriptor(TX, 0, 0, u32::MAX, 0, 0);
            r.add(TX, 0)
        },
        "longer",
    ),
    (
        "huge in sum",
        |r| {
            for i in 0..8 {
                r.descriptor(TX, i, 0, 60_000, NEXT, i + 1)
            }
            r.add(TX, 0)
        },
        "longer",
    ),
    (
        "wrong direction",
        |r| {
            r.descriptor(TX, 0, 0x4_0000, 80, WRITE, 0);
            r.add(TX, 0)
        },
        "direction",
    ),
    (
        "index too far ahead",
        |r| r.mem.write_obj(SIZE + 1, GuestAddress(avail(TX) + 2)).expect("index"),
        "available ring",
    ),
];

#[test]
fn a_hostile_transmit_breaks_the_device_and_nothing_else() {
    for (name, prepare, complaint) in HOSTILE {
        let mut rig = Rig::ready();
        prepare(&mut rig);
        rig.notify(TX);
        assert!(rig.is_broken(), "{name}");
        assert_eq!(rig.read(0x60) & 2, 2, "{name}: the driver is told");
        let told = rig.machine.broken.lock().expect("broken").clone();
        assert!(told.len() == 1 && told[0].contains(complaint), "{name}: {told:?}");
        assert!(rig.backend.sent().is_empty(), "{name}");
        rig.notify(TX);
        assert_eq!(rig.machine.broken.lock().expect("broken").len(), 1, "{name}: told once");
        // A reset heals it.
        rig.write(0x70, 0);
        assert_eq!(rig.read(0x70), 0);
        rig.set_up();
        rig.put_frame(0, 9, 60);
        rig.notify(TX);
        assert_eq!(rig.backend.sent(), vec![vec![9; 60]], "{name}");
    }
}

/// An indirect table may have 65,535 descriptors, which the device would walk with its lock held.
#[test]
fn an_indirect_table_that_was_never_offered_is_refused() {
    let mut rig = Rig::ready();
    rig.descriptor(TX, 0, 0, 0xffff * 16, INDIRECT, 0);
    rig.add(TX, 0);
    rig.notify(TX);
    assert!(rig.is_broken());
    assert!(rig.machine.broken.lock().expect("broken")[0].contains("indirect"));
}

#[test]
fn a_pause_waits_for_one_chain_of_a_full_queue() {
    let mut rig = Rig::ready();
    for index in 0..SIZE {
        rig.put_frame(index, index as u8, 3_000);
    }
    // The pause is asked for while the first frame is being sent.
    let device = std::sync::Arc::downgrade(&rig.device);
    *rig.backend.on_transmit.lock().expect("hook") =
        Some(Box::new(move || device.upgrade().into_iter().for_each(|device| device.begin_quiesce())));
    rig.notify(TX);
    assert_eq!((rig.backend.sent().len(), rig.used(TX)), (1, 1), "no chain after the one it was at");
    rig.quiesce();
    // A driver that notifies again gets one more chain for each.
    rig.notify(TX);
    assert_eq!(rig.used(TX), 2);
    *rig.backend.on_transmit.lock().expect("hook") = None;
    rig.device.unquiesce();
    until("the rest to be sent after the pause", || rig.used(TX) == SIZE);
    let sent: Vec<u8> = rig.backend.sent().iter().map(|frame| frame[0]).collect();
    assert_eq!(sent, (0..SIZE as u8).collect::<Vec<_>>(), "in order, each once");
}

#[test]
fn a_hostile_receive_buffer_breaks_the_device() {
    let cases: [HostileBuffer; 5] = [
        ("read-only", |r| {
            r.descriptor(RX, 0, 0x8_0000, 2048, 0, 0);
            r.add(RX, 0)
        }),
        ("outside memory", |r| {
            r.descriptor(RX, 0, MEMORY as u64, 2048, WRITE, 0);
            r.add(RX, 0)
        }),
        ("zero length", |r| {
            r.descriptor(RX, 0, 0x8_0000, 0, WRITE, 0);
            r.add(RX, 0)
        }),
        ("loop", |r| {
            r.descriptor(RX, 0, 0x8_0000, 1, WRITE | NEXT, 0);
            r.add(RX, 0)
        }),
        ("indirect without end", |r| {
            r.descriptor(RX, 0, table(RX), 16, INDIRECT, 0);
            r.add(RX, 0)
        }),
    ];
    for (name, prepare) in cases {
        let mut rig = Rig::ready();
        prepare(&mut rig);
        rig.notify(RX);
        rig.backend.send(vec![1; 60]);
        until(name, || rig.is_broken());
        assert_eq!(rig.used(RX), 0, "{name}");
    }
}

#[test]
fn states_that_cannot_be_are_refused() {
    let rig = Rig::ready();
    rig.quiesce();
    let state = rig.state();
    let other = Rig::bare();
    other.quiesce();
    for cut in 0..state.len() {
        assert!(other.device.restore(&state[..cut]).is_err());
    }
    let changed = |at: usize, byte: u8| {
        let mut bytes = state.clone();
        bytes[at] = byte;
        bytes
    };
    for (name, bytes) in [
        ("another MAC address", changed(0, 0xee)),
        ("a flag of 2", changed(6, 2)),
        ("a status that does not exist", changed(8, 0xff)),
        ("a feature that is not offered", changed(12, 0xff)),
        ("three queues", changed(39, 3)),
        ("a queue size of 7", changed(42, 7)),
        ("another kind of queue", changed(48, 1)),
        ("a table outside memory", changed(53, 0xff)),
    ] {
        assert!(other.device.restore(&bytes).is_err(), "{name}");
    }
    other.device.restore(&state).expect("the state itself");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_descriptors_make_the_device_panic_or_hang(
        descriptors in proptest::collection::vec(
            (
                prop_oneof![0u64..MEMORY as u64 + 4096, any::<u64>()],
                prop_oneof![0u32..5000, any::<u32>()],
                0u16..8,
                0u16..12,
            ),
            SIZE as usize * 2,
        ),
        heads in proptest::collection::vec(0u16..12, 1..8),
        claimed in prop_oneof![1u16..10, any::<u16>()],
    ) {
        let mut rig = Rig::ready();
        for (n, (address, length, flags, next)) in (0u16..).zip(descriptors) {
            rig.descriptor(u32::from(n / SIZE), n % SIZE, address, length, flags, next);
        }
        for head in heads {
            rig.add(TX, head);
            rig.add(RX, head);
        }
        for queue in [RX, TX] {
            rig.mem.write_obj(claimed, GuestAddress(avail(queue) + 2)).expect("index");
        }
        for n in 0..4 {
            rig.backend.send(vec![n; 300]);
        }
        rig.notify(RX);
        rig.notify(TX);
        rig.quiesce();
        let _ = rig.state();
    }

    #[test]
    fn no_state_bytes_make_the_device_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let rig = Rig::ready();
        rig.quiesce();
        let mut state = rig.state();
        for (at, byte) in changes {
            let at = at.index(state.len());
            state[at] = byte;
        }
        let other = Rig::bare();
        other.quiesce();
        let _ = other.device.restore(&state);
        other.device.unquiesce();
        other.notify(TX);
        other.notify(RX);
    }

    #[test]
    fn no_register_accesses_make_the_device_panic(
        accesses in proptest::collection::vec((0u64..0x110, any::<u32>(), any::<bool>()), 1..200)
    ) {
        let rig = Rig::bare();
        for (offset, value, write) in accesses {
            if write {
                rig.write(offset, value);
            } else {
                rig.read(offset);
            }
        }
    }
}
