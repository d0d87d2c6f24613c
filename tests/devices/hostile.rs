//! Drivers that break the rules, and states that no device was ever in: the device breaks or
//! answers, memory that was not given to it stays as it is, and the process lives.

use proptest::prelude::*;

use crate::driver::*;
use crate::rig::*;

/// A name, how to prepare the queue, and words the complaint must have.
type Hostile = (&'static str, fn(&mut DiskRig), &'static str);

fn chain(disk: &mut DiskRig, descriptors: &[(u64, u32, u16, u16)]) {
    for (index, (address, length, flags, next)) in (0u16..).zip(descriptors) {
        disk.rig.descriptor(index, *address, *length, *flags, *next);
    }
    disk.rig.add(0);
}

/// A chain behind an indirect descriptor of `bytes` bytes with `flags`.
fn indirect(disk: &mut DiskRig, table: &[Vec<u8>], bytes: u32, flags: u16) {
    disk.rig.put(HEADERS + 0x800, &table.concat());
    chain(disk, &[(HEADERS + 0x800, bytes, INDIRECT | flags, 1)]);
}

const HOSTILE: [Hostile; 21] = [
    ("a loop", |d| chain(d, &[(HEADERS, 16, NEXT, 1), (DATA, 512, NEXT, 0)]), "no end"),
    ("a loop of one", |d| chain(d, &[(HEADERS, 16, NEXT, 0)]), "no end"),
    ("a loop of writable buffers", |d| chain(d, &[(HEADERS, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 1)]), "no end"),
    ("next outside the table", |d| chain(d, &[(HEADERS, 16, NEXT, SIZE)]), "no end"),
    ("head outside the table", |d| d.rig.add(SIZE), "no end"),
    ("an index too far ahead", |d| d.rig.put(AVAIL + 2, &(SIZE + 1).to_le_bytes()), "available ring"),
    ("no room for a status", |d| chain(d, &[(HEADERS, 16, 0, 0)]), "too short"),
    ("no header", |d| chain(d, &[(DATA, 513, WRITE, 0)]), "too short"),
    ("half a header", |d| chain(d, &[(HEADERS, 15, NEXT, 1), (DATA, 513, WRITE, 0)]), "too short"),
    ("zero length", |d| chain(d, &[(HEADERS, 16, NEXT, 1), (DATA, 0, NEXT | WRITE, 2), (DATA, 1, WRITE, 0)]), "empty"),
    (
        "readable behind writable",
        |d| chain(d, &[(HEADERS, 16, NEXT, 1), (DATA, 512, NEXT | WRITE, 2), (DATA, 1, 0, 0)]),
        "direction",
    ),
    (
        "data outside memory",
        |d| chain(d, &[(HEADERS, 16, NEXT, 1), (MEMORY as u64 - 511, 513, WRITE, 0)]),
        "outside memory",
    ),
    ("header outside memory", |d| chain(d, &[(MEMORY as u64, 16, NEXT, 1), (DATA, 1, WRITE, 0)]), "outside memory"),
    ("an address that wraps", |d| chain(d, &[(u64::MAX - 7, 16, NEXT, 1), (DATA, 1, WRITE, 0)]), "outside memory"),
    ("huge", |d| chain(d, &[(HEADERS, 16, NEXT, 1), (0, u32::MAX, WRITE, 0)]), "outside memory"),
    ("an indirect table of no descriptors", |d| indirect(d, &[], 0, 0), "indirect"),
    ("an indirect table of half a descriptor", |d| indirect(d, &[], 24, 0), "indirect"),
    ("a chain behind an indirect table", |d| indirect(d, &[], 16, NEXT), "indirect"),
    ("a huge indirect table", |d| indirect(d, &[], 0xffff_fff0, 0), "outside memory"),
    (
        "an indirect table in an indirect table",
        |d| indirect(d, &[descriptor(HEADERS + 0x800, 16, INDIRECT, 0)], 16, 0),
        "indirect",
    ),
    (
        "an indirect table that loops",
        |d| indirect(d, &[descriptor(HEADERS, 16, NEXT, 1), descriptor(DATA, 1, NEXT | WRITE, 1)], 32, 0),
        "no end",
    ),
];

#[test]
fn a_hostile_chain_breaks_the_disk_and_nothing_else() {
    for (name, prepare, complaint) in HOSTILE {
        let mut disk = DiskRig::bare(pattern(SECTORS as usize * 512), false);
        disk.rig.set_up(F_FLUSH | F_INDIRECT, SIZE);
        disk.rig.put(HEADERS, &[0; 16]);
        prepare(&mut disk);
        disk.rig.put(DATA, &[0x5a; 1024]);
        let memory = disk.rig.get(0, MEMORY);
        disk.rig.notify();
        until(name, || disk.rig.is_broken());
        assert_eq!(disk.rig.read(0x60) & 2, 2, "{name}: the driver is told");
        let told = disk.rig.complaints();
        assert!(
            told.len() == 1 && told[0].starts_with("virtio-blk: disk 3: ") && told[0].contains(complaint),
            "{name}: {told:?}"
        );
        assert!(disk.disk.done().is_empty(), "{name}");
        disk.rig.quiesce();
        let mut after = disk.rig.get(0, MEMORY);
        // The device's word that it wants no notifies.
        after[USED as usize] = memory[USED as usize];
        assert!(memory == after, "{name}: memory was written");
        assert!(disk.in_flight().is_empty(), "{name}");
        disk.rig.device.unquiesce();
        disk.rig.notify();
        // A reset heals it.
        disk.rig.write(0x70, 0);
        disk.rig.set_up(F_FLUSH, SIZE);
        assert_eq!(disk.ask(IN, 0, 512, true), OK, "{name}");
        assert_eq!(disk.rig.complaints().len(), 1, "{name}: told once");
    }
}

#[test]
fn indirect_tables_are_for_drivers_that_agreed() {
    let mut disk = DiskRig::ready();
    disk.rig.put(HEADERS, &[0; 16]);
    indirect(&mut disk, &[descriptor(HEADERS, 16, NEXT, 1), descriptor(DATA, 513, WRITE, 0)], 32, 0);
    disk.rig.notify();
    until("the device to break", || disk.rig.is_broken());
    assert!(disk.rig.complaints()[0].contains("indirect"));
}

#[test]
fn a_ring_taken_away_in_flight_is_not_written() {
    let mut disk = DiskRig::ready();
    disk.disk.allow(Call::Read, 0);
    disk.put(0, IN, 0, 512, true);
    disk.rig.notify();
    disk.disk.until_waiting(Call::Read);
    disk.rig.write(0x44, 0);
    let memory = disk.rig.get(0, MEMORY);
    disk.disk.allow(Call::Read, 1);
    until("the disk's answer", || disk.disk.done().len() == 1);
    disk.rig.quiesce();
    assert!(disk.rig.get(0, MEMORY) == memory);
}

#[test]
fn states_that_cannot_be_are_refused() {
    let mut disk = DiskRig::ready();
    disk.disk.allow(Call::Read, 0);
    disk.put(0, IN, 0, 512, true);
    disk.rig.notify();
    disk.disk.until_waiting(Call::Read);
    disk.rig.quiesce();
    let state = disk.state();
    disk.disk.allow(Call::Read, usize::MAX);
    let other = DiskRig::bare(pattern(SECTORS as usize * 512), false);
    other.rig.quiesce();
    for cut in 0..state.len() {
        assert!(other.rig.device.restore(&state[..cut]).is_err());
    }
    let changed = |at: usize, byte: u8| {
        let mut bytes = state.clone();
        bytes[at] = byte;
        bytes
    };
    let (registers, queue) = (29, 29 + 33);
    let in_flight = queue + 34;
    let twice = [&state[..in_flight], &[2, 0, 0, 0, 0, 0]].concat();
    for (name, bytes) in [
        ("another size", changed(1, 0xee)),
        ("read-only", changed(8, 1)),
        ("another serial number", changed(9, 0)),
        ("a status that does not exist", changed(registers + 1, 0xff)),
        ("a feature that is not offered", changed(registers + 4, 0xff)),
        ("two queues", changed(queue - 1, 2)),
        ("a queue size of 7", changed(queue + 2, 7)),
        ("a table outside memory", changed(queue + 13, 0xff)),
        ("more in flight than there are", changed(in_flight, 2)),
        ("in flight from outside the table", changed(in_flight + 2, SIZE as u8)),
        ("in flight twice", twice),
    ] {
        assert!(other.rig.device.restore(&bytes).is_err(), "{name}");
    }
    other.rig.device.restore(&state).expect("the state itself");
}

/// A place in the data window, or one that is partly or completely outside memory.
fn place() -> impl Strategy<Value = (u64, u32)> {
    let inside = (DATA..DATA_END, 1u32..0x4_0000).prop_map(|(at, length)| (at, length.min((DATA_END - at) as u32)));
    let outside = (prop_oneof![MEMORY as u64 - 4096..MEMORY as u64 + 4096, any::<u64>()], any::<u32>())
        .prop_filter("outside", |(at, length)| at.saturating_add(u64::from(*length)) > MEMORY as u64);
    prop_oneof![12 => inside, 1 => outside, 1 => (DATA..DATA_END).prop_map(|at| (at, 0))]
}

fn any_descriptor(size: u16) -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let flags = prop_oneof![4 => Just(NEXT), 4 => Just(NEXT | WRITE), 3 => Just(WRITE), 1 => 0u16..8];
    (place(), flags, 0..size + 1).prop_map(|((at, length), flags, next)| (at, length, flags, next))
}

/// A header: a kind that exists or any, and a sector that exists or any.
fn header() -> impl Strategy<Value = [u8; 16]> {
    let kind = prop_oneof![4 => Just(IN), 4 => Just(OUT), 4 => 0u32..16, 1 => any::<u32>()];
    let sector = prop_oneof![4 => 0..SECTORS, 1 => any::<u64>()];
    (kind, sector).prop_map(|(kind, sector)| {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        bytes
    })
}

/// Where the headers of the property test are: not in the data window, so that no write changes
/// them.
fn header_at(index: u16) -> u64 {
    HEADERS + u64::from(index) * 16
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_chain_writes_what_was_not_given_or_stops_the_device(
        headers in proptest::collection::vec(header(), usize::from(SIZE)),
        heads in proptest::collection::vec((0..SIZE, any::<bool>()), 1..6),
        table in proptest::collection::vec(any_descriptor(SIZE), usize::from(SIZE)),
        second in proptest::collection::vec(any_descriptor(SIZE), usize::from(SIZE)),
        reset_in_flight in any::<bool>(),
        size in prop_oneof![3 => Just(SIZE), 1 => Just(4), 1 => Just(1)],
    ) {
        let mut disk = DiskRig::bare(pattern(SECTORS as usize * 512), false);
        disk.rig.set_up(F_FLUSH | F_INDIRECT, size);
        let second_at = HEADERS + 0x800;
        let mut given = vec![(USED, 6 + 8 * u64::from(SIZE))];
        for (base, descriptors) in [(TABLE, &table), (second_at, &second)] {
            for (index, (at, length, flags, next)) in (0u64..).zip(descriptors) {
                let is_indirect = flags & INDIRECT != 0;
                let (at, length) = if is_indirect { (second_at, 16 * (length % 20)) } else { (*at, *length) };
                disk.rig.put(base + index * 16, &descriptor(at, length, *flags, *next));
                if flags & WRITE != 0 && !is_indirect {
                    given.push((at, u64::from(length)));
                }
            }
        }
        for (index, header) in (0u16..).zip(&headers) {
            disk.rig.put(header_at(index), header);
        }
        let mut added = 0;
        for (head, well_begun) in heads.into_iter().take(usize::from(size)) {
            if well_begun {
                // So that most chains get as far as their data.
                disk.rig.descriptor(head, header_at(head), 16, NEXT, (head + 1) % size);
            }
            disk.rig.put(AVAIL + 4 + u64::from(added % size) * 2, &head.to_le_bytes());
            added += 1;
        }
        disk.rig.put(AVAIL + 2, &added.to_le_bytes());
        let before = disk.rig.get(0, MEMORY);
        disk.rig.notify();
        if reset_in_flight {
            disk.rig.write(0x70, 0);
        } else {
            let done = || disk.rig.used() == added || disk.rig.is_broken();
            until("every chain to be answered or the device to break", done);
        }
        disk.rig.quiesce();
        let after = disk.rig.get(0, MEMORY);
        for (at, _) in before.iter().zip(&after).enumerate().filter(|(_, (before, after))| before != after) {
            let at = at as u64;
            let allowed = given.iter().any(|(from, length)| *from <= at && at - from < *length);
            prop_assert!(allowed, "{at:#x} was written");
        }
        disk.state();
    }

    #[test]
    fn no_state_bytes_make_the_device_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let mut disk = DiskRig::ready();
        disk.put(0, IN, 0, 512, true);
        disk.put(1, OUT, 0, 512, false);
        disk.rig.notify();
        disk.rig.quiesce();
        let mut state = disk.state();
        for (at, byte) in changes {
            let at = at.index(state.len());
            state[at] = byte;
        }
        let other = DiskRig::bare(pattern(SECTORS as usize * 512), false);
        other.rig.quiesce();
        other.rig.copy_memory(&disk.rig);
        let _ = other.rig.device.restore(&state);
        other.rig.device.unquiesce();
        other.rig.notify();
        other.rig.quiesce();
        other.state();
    }

    #[test]
    fn no_register_accesses_make_the_device_panic(
        accesses in proptest::collection::vec((0u64..0x150, any::<u32>(), any::<bool>()), 1..200)
    ) {
        let disk = DiskRig::bare(vec![0; 4096], false);
        for (offset, value, write) in accesses {
            if write {
                disk.rig.write(offset, value);
            } else {
                disk.rig.read(offset);
            }
        }
    }
}
