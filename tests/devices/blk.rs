//! What a well-behaved driver of a disk sees.

use std::sync::atomic::Ordering;

use crate::driver::*;
use crate::rig::*;

#[test]
fn the_configuration_is_the_disks() {
    let disk = DiskRig::bare(vec![0; 4096], false);
    let config = |disk: &DiskRig, at: u64| disk.rig.read(0x100 + at);
    assert_eq!(disk.rig.read(0x08), 2, "a disk");
    assert_eq!((config(&disk, 0), config(&disk, 4)), (8, 0), "sectors");
    assert_eq!((config(&disk, 8), config(&disk, 12)), (64 << 10, 126), "size_max, seg_max");
    assert_eq!(config(&disk, 20), 512, "block size");
    assert_eq!((config(&disk, 36), config(&disk, 40), config(&disk, 44)), (1 << 20, 16, 1), "discard");
    assert_eq!((config(&disk, 48), config(&disk, 52), config(&disk, 56)), (1 << 20, 16, 1), "write zeroes");
    assert_eq!(config(&disk, 60), 0, "nothing behind");
    let expected: u32 = [1, 2, 6, 9, 13, 14, 28].iter().map(|bit| 1 << bit).sum();
    assert_eq!(disk.rig.read(0x10), expected);
    let other = DiskRig::bare(vec![0; 512], true);
    let read_only: u32 = [1, 2, 5, 6, 9, 28].iter().map(|bit| 1 << bit).sum();
    assert_eq!((other.rig.read(0x10), config(&other, 36), config(&other, 56)), (read_only, 0, 0));
}

#[test]
fn sectors_are_written_and_read_back() {
    let mut disk = DiskRig::ready();
    disk.rig.put(disk.data_at(0), &[0xaa; 1024]);
    assert_eq!(disk.ask(OUT, 5, 1024, false), OK);
    assert_eq!(disk.rig.used_entry(0), (0, 1), "a write brings nothing but its status");
    assert_eq!(disk.disk.content()[5 * 512..7 * 512], [0xaa; 1024]);
    assert_eq!(disk.ask(IN, 6, 2048, true), OK);
    assert_eq!(disk.rig.used_entry(1), (0, 2049));
    let expected = [&[0xaa; 512][..], &pattern(SECTORS as usize * 512)[7 * 512..10 * 512]].concat();
    assert_eq!(disk.rig.get(disk.data_at(0), 2048), expected);
    assert_eq!(disk.ask(FLUSH, 0, 0, false), OK);
    let kinds: Vec<Call> = disk.disk.done().iter().map(|(call, ..)| *call).collect();
    assert_eq!(kinds, [Call::Write, Call::Read, Call::Flush]);
    assert!(disk.rig.complaints().is_empty());
}

#[test]
fn every_request_interrupts_and_the_line_follows_the_status() {
    let mut disk = DiskRig::ready();
    assert_eq!(disk.ask(FLUSH, 0, 0, false), OK);
    until("the line", || *disk.rig.machine.line.lock().expect("line") == [true]);
    assert_eq!(disk.rig.read(0x60), 1);
    disk.rig.write(0x64, 1);
    assert_eq!(*disk.rig.machine.line.lock().expect("line"), [true, false]);
    // A driver that polls gets no interrupt, but its doorbell rings.
    disk.rig.put(AVAIL, &1u16.to_le_bytes());
    let rings = disk.rig.machine.rings.load(Ordering::SeqCst);
    assert_eq!(disk.ask(FLUSH, 0, 0, false), OK);
    until("the doorbell", || disk.rig.machine.rings.load(Ordering::SeqCst) > rings);
    assert_eq!(disk.rig.read(0x60), 0);
}

#[test]
fn a_request_may_be_cut_anywhere_and_stand_in_a_table_of_its_own() {
    let mut disk = DiskRig::bare(pattern(SECTORS as usize * 512), false);
    disk.rig.set_up(F_FLUSH | F_INDIRECT, SIZE);
    // The header in three parts, the last with data behind it; then data in odd parts.
    let mut header = OUT.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(9u64.to_le_bytes());
    header.extend([0x77; 100]);
    disk.rig.put(HEADERS, &header);
    disk.rig.put(DATA, &[0x78; 412]);
    let table = [
        descriptor(HEADERS, 3, NEXT, 4),
        descriptor(HEADERS + 4, 112, NEXT, 2),
        descriptor(DATA, 411, NEXT, 3),
        descriptor(DATA + 411, 1, NEXT, 5),
        descriptor(HEADERS + 3, 1, NEXT, 1),
        descriptor(HEADERS + 128, 1, WRITE, 0),
    ];
    disk.rig.put(HEADERS + 0x800, &table.concat());
    disk.rig.put(HEADERS + 128, &[NO_STATUS]);
    disk.rig.descriptor(7, HEADERS + 0x800, 6 * 16, INDIRECT, 0);
    disk.rig.add(7);
    disk.rig.notify();
    disk.rig.until_used(1);
    assert_eq!((disk.status(0), disk.rig.used_entry(0)), (OK, (7, 1)));
    assert_eq!(disk.disk.content()[9 * 512..10 * 512], [[0x77; 100].as_slice(), &[0x78; 412]].concat());
    // A read whose status is the last byte of the last buffer of data.
    disk.rig.put(HEADERS, &IN.to_le_bytes());
    disk.rig.descriptor(0, HEADERS, 16, NEXT, 1);
    disk.rig.descriptor(1, DATA, 500, WRITE | NEXT, 2);
    disk.rig.descriptor(2, DATA + 500, 13, WRITE, 0);
    disk.rig.put(DATA, &[NO_STATUS; 513]);
    disk.rig.add(0);
    disk.rig.notify();
    disk.rig.until_used(2);
    assert_eq!(disk.rig.get(DATA + 512, 1), [OK]);
    assert_eq!(disk.rig.get(DATA, 512), disk.disk.content()[9 * 512..10 * 512]);
}

#[test]
fn large_requests_go_in_pieces_and_are_whole() {
    let mut disk = DiskRig::ready();
    let bytes = 0x6_0000;
    let data = pattern(bytes + 7)[7..].to_vec();
    disk.rig.put(DATA, &data);
    assert_eq!(disk.ask(OUT, 100, bytes as u32, false), OK);
    assert_eq!(disk.disk.content()[100 * 512..100 * 512 + bytes], data);
    assert_eq!(disk.disk.done().len(), 3, "128 KiB each");
    disk.rig.put(DATA, &vec![0; bytes]);
    assert_eq!(disk.ask(IN, 100, bytes as u32, true), OK);
    assert_eq!(disk.rig.get(DATA, bytes), data);
}

#[test]
fn ranges_are_discarded_and_made_zeros() {
    let mut disk = DiskRig::ready();
    assert_eq!(disk.ask_ranges(DISCARD, &[(1, 2, 0), (8, 1, 0)]), OK);
    assert_eq!(disk.ask_ranges(WRITE_ZEROES, &[(20, 4, 1), (30, 1, 0), (31, 0, 0)]), OK);
    let mut expected = pattern(SECTORS as usize * 512);
    for (first, count) in [(1, 2), (8, 1), (20, 4), (30, 1)] {
        expected[first * 512..(first + count) * 512].fill(0);
    }
    assert!(disk.disk.content() == expected);
    assert_eq!(disk.ask_ranges(DISCARD, &[(0, 1, 1)]), UNSUPP, "a discard has no flags");
    assert_eq!(disk.ask_ranges(WRITE_ZEROES, &[(0, 1, 2)]), UNSUPP, "an unknown flag");
    assert_eq!(disk.ask_ranges(DISCARD, &[(0, 1, 0), (SECTORS, 1, 0)]), IOERR, "beyond the end");
    assert_eq!(disk.ask_ranges(WRITE_ZEROES, &[(u64::MAX, 1, 0)]), IOERR);
    assert_eq!(disk.ask_ranges(DISCARD, &[(0, u32::MAX, 0)]), IOERR, "more than a range may have");
    assert_eq!(disk.ask_ranges(DISCARD, &[(0, 1, 0); 17]), IOERR, "more ranges than there may be");
    assert_eq!(disk.ask_ranges(DISCARD, &[]), IOERR);
    assert_eq!(disk.ask(DISCARD, 0, 24, false), IOERR, "half a range");
    assert!(disk.disk.content() == expected, "a refused request changes nothing");
}

#[test]
fn what_cannot_be_done_is_answered() {
    let mut disk = DiskRig::ready();
    assert_eq!(disk.ask(GET_ID, 0, 20, true), OK);
    assert_eq!(disk.rig.get(DATA, 20), *b"serial-1234\0\0\0\0\0\0\0\0\0");
    assert_eq!(disk.rig.used_entry(0), (0, 21));
    assert_eq!(disk.ask(GET_ID, 0, 5, true), OK);
    assert_eq!(disk.rig.used_entry(1), (0, 6));
    assert_eq!(disk.ask(99, 0, 512, true), UNSUPP);
    for (kind, to_guest) in [(IN, true), (OUT, false)] {
        assert_eq!(disk.ask(kind, SECTORS - 1, 512, to_guest), OK, "the last sector");
        assert_eq!(disk.ask(kind, SECTORS - 1, 1024, to_guest), IOERR, "beyond the end");
        assert_eq!(disk.ask(kind, u64::MAX, 512, to_guest), IOERR);
        assert_eq!(disk.ask(kind, u64::MAX / 512, 512, to_guest), IOERR);
        assert_eq!(disk.ask(kind, 0, 511, to_guest), IOERR, "part of a sector");
        assert_eq!(disk.ask(kind, 0, 0, to_guest), IOERR, "nothing at all");
    }
    assert!(!disk.rig.is_broken());
}

#[test]
fn a_read_only_disk_is_never_changed() {
    let content = pattern(4096);
    let mut disk = DiskRig::bare(content.clone(), true);
    disk.rig.set_up(F_RO, SIZE);
    assert_eq!(disk.ask(IN, 0, 512, true), OK);
    assert_eq!(disk.ask(OUT, 0, 512, false), IOERR);
    assert_eq!(disk.ask_ranges(DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(disk.ask_ranges(WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    assert_eq!(disk.ask(FLUSH, 0, 0, false), OK);
    assert!(disk.disk.content() == content);
}

#[test]
fn a_driver_that_does_not_flush_can_rely_on_its_writes() {
    let mut disk = DiskRig::bare(vec![0; 4096], false);
    disk.rig.set_up(0, SIZE);
    assert_eq!(disk.ask(OUT, 1, 512, false), OK);
    let kinds: Vec<Call> = disk.disk.done().iter().map(|(call, ..)| *call).collect();
    assert_eq!(kinds, [Call::Write, Call::Flush], "before the answer");
}

#[test]
fn a_failing_disk_is_an_io_error_and_may_recover() {
    let mut disk = DiskRig::ready();
    disk.disk.fails.store(true, Ordering::SeqCst);
    assert_eq!(disk.ask(IN, 0, 512, true), IOERR);
    assert_eq!(disk.ask(OUT, 0, 512, false), IOERR);
    assert_eq!(disk.ask(FLUSH, 0, 0, false), IOERR);
    assert_eq!(disk.ask_ranges(DISCARD, &[(0, 1, 0)]), IOERR);
    assert_eq!(disk.ask_ranges(WRITE_ZEROES, &[(0, 1, 0)]), IOERR);
    disk.disk.fails.store(false, Ordering::SeqCst);
    assert_eq!(disk.ask(OUT, 0, 512, false), OK);
    assert!(!disk.rig.is_broken());
}

#[test]
fn a_full_backend_keeps_the_request_until_there_is_room() {
    let mut disk = DiskRig::ready();
    disk.disk.room.store(1, Ordering::SeqCst);
    disk.rig.put(disk.data_at(0), &[1; 512]);
    disk.rig.put(disk.data_at(1), &[2; 512]);
    disk.put(0, OUT, 0, 512, false);
    disk.put(1, OUT, 1, 512, false);
    disk.rig.notify();
    disk.rig.until_used(1);
    // Full, paused, resumed: still there.
    disk.rig.quiesce();
    let _ = disk.in_flight();
    disk.rig.device.unquiesce();
    assert_eq!(disk.rig.used(), 1);
    disk.disk.room.store(1, Ordering::SeqCst);
    disk.rig.device.kick();
    // Even if the device had not found it full yet, it finds room now.
    disk.rig.until_used(2);
    assert_eq!((disk.status(1), disk.disk.content()[512]), (OK, 2));
}

#[test]
fn kicks_from_another_thread_are_never_lost() {
    let mut disk = DiskRig::ready();
    disk.disk.room.store(0, Ordering::SeqCst);
    for round in 0..2_000u16 {
        let (kind, count) = ([OUT, DISCARD][usize::from(round % 2)], round.wrapping_add(1));
        let (length, range) =
            if kind == OUT { (512, [0; 16]) } else { (16, [1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]) };
        disk.rig.put(disk.data_at(0), &range);
        disk.put(0, kind, 0, length, false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                disk.disk.room.store(1, Ordering::SeqCst);
                disk.rig.device.kick();
            });
            disk.rig.notify();
        });
        disk.rig.until_used(count);
    }
    assert_eq!(disk.disk.done().len(), 2_000);
}
