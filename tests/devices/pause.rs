//! Pauses, saves and resets while a request is on its way.

use std::sync::Mutex;

use crate::driver::*;
use crate::rig::*;

const PAGE: u32 = 4096;

/// What a request in flight can have touched: data, status, used ring.
fn visible(disk: &DiskRig) -> (Vec<u8>, u8, u16) {
    (disk.rig.get(disk.data_at(0), PAGE as usize), disk.status(0), disk.rig.used())
}

/// Gives a paused device's thread every chance to do what it must not.
fn wait_for_nothing() {
    (0..2_000).for_each(|_| std::thread::yield_now());
}

#[test]
fn a_slow_read_or_flush_does_not_delay_a_pause_and_shows_nothing_until_its_end() {
    for (kind, call, bytes) in [(IN, Call::Read, PAGE), (FLUSH, Call::Flush, 0)] {
        let mut disk = DiskRig::ready();
        disk.disk.allow(call, 0);
        disk.put(0, kind, 0, bytes, true);
        disk.rig.notify();
        disk.disk.until_waiting(call);
        // Returns although the disk does not answer: the test would hang here.
        disk.rig.quiesce();
        let before = visible(&disk);
        assert_eq!((before.1, before.2), (NO_STATUS, 0));
        assert_eq!(disk.in_flight(), [0]);
        disk.disk.allow(call, 1);
        until("the disk's answer", || disk.disk.done().len() == 1);
        wait_for_nothing();
        assert!(visible(&disk) == before, "{call:?}: an answer appeared in a pause");
        assert_eq!(disk.in_flight(), [0]);
        disk.rig.device.unquiesce();
        disk.rig.until_used(1);
        assert_eq!(disk.status(0), OK);
        assert_eq!(disk.disk.done().len(), 1, "asked once");
        disk.rig.quiesce();
        assert!(disk.in_flight().is_empty());
    }
}

#[test]
fn a_pause_waits_for_a_change_that_has_begun_and_none_begins_in_it() {
    for (kind, call) in [(OUT, Call::Write), (DISCARD, Call::Discard), (WRITE_ZEROES, Call::Zero)] {
        let mut disk = DiskRig::ready();
        let mut range = 1u64.to_le_bytes().to_vec();
        range.extend(1u32.to_le_bytes());
        range.extend([0; 4]);
        range.resize(512, 0);
        disk.rig.put(disk.data_at(0), &range);
        disk.disk.allow(call, 0);
        disk.put(0, kind, 0, if kind == OUT { 512 } else { 16 }, false);
        disk.rig.notify();
        disk.disk.until_waiting(call);
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            disk.rig.device.begin_quiesce();
            scope.spawn(|| {
                disk.rig.quiesce();
                order.lock().expect("order").push("quiet");
            });
            // Registers answer meanwhile: a vCPU does not wait for the disk.
            wait_for_nothing();
            assert_eq!(disk.rig.read(0x70), 15);
            order.lock().expect("order").push("let the disk go on");
            disk.disk.allow(call, usize::MAX);
        });
        assert_eq!(*order.lock().expect("order"), ["let the disk go on", "quiet"], "{call:?}");
        // The change was made before the pause; that it was done is seen after it.
        assert_eq!(disk.disk.done().len(), 1);
        assert_eq!((disk.rig.used(), disk.status(0)), (0, NO_STATUS));
        disk.put(1, kind, 0, if kind == OUT { 512 } else { 16 }, false);
        disk.rig.notify();
        wait_for_nothing();
        assert_eq!(disk.disk.done().len(), 1, "{call:?}: a change in a pause");
        disk.rig.device.unquiesce();
        disk.rig.until_used(2);
    }
}

/// Another device in front of `content`, with the memory and the state of a paused one.
fn restored(from: &DiskRig, content: Vec<u8>) -> DiskRig {
    let other = DiskRig::bare(content, false);
    other.rig.quiesce();
    other.rig.copy_memory(&from.rig);
    let state = from.state();
    other.rig.device.restore(&state).expect("restore");
    assert_eq!(other.state(), state, "what is restored is saved again");
    other
}

#[test]
fn requests_in_flight_and_in_the_ring_are_done_after_a_restore() {
    for (kind, call) in [(IN, Call::Read), (OUT, Call::Write), (FLUSH, Call::Flush)] {
        let mut disk = DiskRig::ready();
        let data = vec![0x3c; PAGE as usize];
        disk.disk.allow(call, 0);
        disk.put(0, kind, 8, if kind == FLUSH { 0 } else { PAGE }, kind == IN);
        disk.put(1, GET_ID, 0, 20, true);
        if kind == OUT {
            disk.rig.put(disk.data_at(0), &data);
        }
        disk.rig.notify();
        disk.disk.until_waiting(call);
        disk.rig.device.begin_quiesce();
        if kind == OUT {
            disk.disk.allow(call, 1);
        }
        disk.rig.quiesce();
        assert_eq!(disk.in_flight(), [0], "the second is still in the ring");
        // What the other node's disk has: for a write, either nothing of it or all.
        for content in [pattern(SECTORS as usize * 512), disk.disk.content()] {
            let other = restored(&disk, content);
            other.rig.device.unquiesce();
            other.rig.until_used(2);
            assert_eq!((other.status(0), other.status(1)), (OK, OK), "{call:?}");
            assert_eq!(other.disk.done().len(), 1);
            assert_eq!(other.rig.used_entry(0).0, 0);
            let there = &other.disk.content()[8 * 512..8 * 512 + PAGE as usize];
            match kind {
                IN => assert_eq!(other.rig.get(other.data_at(0), PAGE as usize), there),
                OUT => assert_eq!(there, data),
                _ => {}
            }
            until("the interrupt", || other.rig.read(0x60) == 1);
            assert_eq!(other.rig.machine.line.lock().expect("line").last(), Some(&true));
        }
        disk.disk.allow(call, usize::MAX);
    }
}

#[test]
fn a_raised_interrupt_is_raised_again() {
    let mut disk = DiskRig::ready();
    assert_eq!(disk.ask(FLUSH, 0, 0, false), OK);
    disk.rig.quiesce();
    let other = restored(&disk, disk.disk.content());
    assert_eq!(*other.rig.machine.line.lock().expect("line"), [true]);
    other.rig.write(0x64, 1);
    assert_eq!(*other.rig.machine.line.lock().expect("line"), [true, false]);
}

#[test]
fn a_large_write_may_be_paused_between_its_pieces_and_is_done_again_whole() {
    let mut disk = DiskRig::ready();
    let bytes = 0x6_0000;
    disk.rig.put(DATA, &vec![0x99; bytes]);
    disk.disk.allow(Call::Write, 1);
    disk.put(0, OUT, 0, bytes as u32, false);
    disk.rig.notify();
    disk.disk.until_waiting(Call::Write);
    disk.rig.device.begin_quiesce();
    disk.disk.allow(Call::Write, 1);
    disk.rig.quiesce();
    assert!(disk.disk.done().len() < 3, "not all of it");
    assert_eq!((disk.in_flight(), disk.rig.used()), (vec![0], 0));
    let other = restored(&disk, disk.disk.content());
    other.rig.device.unquiesce();
    other.rig.until_used(1);
    assert!(other.disk.content()[..bytes].iter().all(|byte| *byte == 0x99));
    assert_eq!(other.disk.done().len(), 3, "from its first piece on");
}

#[test]
fn a_reset_in_flight_leaves_memory_alone() {
    let kinds = [(IN, Call::Read), (OUT, Call::Write), (FLUSH, Call::Flush)];
    for ((kind, call), set_up_first) in kinds.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        let mut disk = DiskRig::ready();
        disk.disk.allow(call, 0);
        disk.put(0, kind, 0, if kind == FLUSH { 0 } else { PAGE }, kind == IN);
        disk.rig.notify();
        disk.disk.until_waiting(call);
        disk.rig.write(0x70, 0);
        // Half of the time the next driver is there before the disk answers the old one.
        if set_up_first {
            disk.rig.set_up(F_FLUSH, SIZE);
        }
        let before = visible(&disk);
        disk.disk.allow(call, usize::MAX);
        until("the disk's answer", || disk.disk.done().len() == 1);
        wait_for_nothing();
        assert!(visible(&disk) == before, "{call:?}: the old driver's memory was touched");
        if !set_up_first {
            disk.rig.set_up(F_FLUSH, SIZE);
        }
        assert_eq!(disk.ask(GET_ID, 0, 20, true), OK);
        assert_eq!(disk.rig.used(), 1, "{call:?}: the old request is forgotten");
    }
}

#[test]
fn a_reset_frees_a_request_that_waits_for_room() {
    let mut disk = DiskRig::ready();
    disk.disk.room.store(0, std::sync::atomic::Ordering::SeqCst);
    for _ in 0..200 {
        disk.put(0, OUT, 0, 512, false);
        disk.rig.notify();
        disk.rig.write(0x70, 0);
        disk.rig.set_up(F_FLUSH, SIZE);
        assert_eq!(disk.ask(GET_ID, 0, 20, true), OK);
    }
    assert!(disk.disk.done().is_empty());
}

#[test]
fn room_made_or_a_reset_while_the_backend_says_full_is_noticed() {
    for (full_answers_before, reset) in [(0, false), (1, false), (0, true), (1, true)] {
        let mut disk = DiskRig::ready();
        disk.disk.room.store(0, std::sync::atomic::Ordering::SeqCst);
        disk.disk.allow(Call::Full, full_answers_before);
        disk.put(0, OUT, 0, 512, false);
        disk.rig.notify();
        until("the device to ask often enough", || disk.disk.left(Call::Full) == 0);
        disk.disk.until_waiting(Call::Full);
        // The backend is about to say that it is full, and the device does not know it yet.
        if reset {
            disk.rig.write(0x70, 0);
            disk.rig.set_up(F_FLUSH, SIZE);
            disk.put(0, FLUSH, 0, 0, false);
            disk.rig.notify();
        } else {
            disk.disk.room.store(usize::MAX, std::sync::atomic::Ordering::SeqCst);
            disk.rig.device.kick();
        }
        disk.disk.allow(Call::Full, usize::MAX);
        let what = || {
            let (used, left, done) = (disk.rig.used(), disk.disk.left(Call::Full), disk.disk.done());
            format!(
                "an answer ({full_answers_before}, {reset}): {used} used, {left} left, {done:?}, {:?}",
                disk.state()
            )
        };
        until_or(|| disk.rig.used() == 1, what);
        assert_eq!(disk.status(0), OK);
    }
}

#[test]
fn a_device_ends_while_paused_waiting_for_room_or_at_work() {
    for room in [0, usize::MAX] {
        for paused in [false, true] {
            let mut disk = DiskRig::ready();
            disk.disk.room.store(room, std::sync::atomic::Ordering::SeqCst);
            disk.put(0, OUT, 0, 512, false);
            disk.rig.notify();
            if paused {
                disk.rig.quiesce();
            }
            drop(disk);
        }
    }
}

#[test]
fn pauses_at_any_moment_lose_and_double_nothing() {
    let mut disk = DiskRig::bare(vec![0; SECTORS as usize * 512], false);
    disk.rig.set_up(F_FLUSH, SIZE);
    for round in 0..500u16 {
        // Each request writes its number to a sector of its own; a read of the one before checks
        // it.
        let sector = u64::from(round) % SECTORS;
        disk.rig.put(disk.data_at(0), &[round.to_le_bytes(); 256].concat());
        disk.put(0, OUT, sector, 512, false);
        disk.put(1, IN, sector, 512, true);
        disk.put(2, FLUSH, 0, 0, false);
        disk.rig.notify();
        (0..round % 50).for_each(|_| std::hint::spin_loop());
        disk.rig.quiesce();
        // A third of the rounds go on with another device, as after a takeover.
        if round % 3 == 0 {
            let added = disk.rig.added;
            let mut next = restored(&disk, disk.disk.content());
            next.rig.added = added;
            disk = next;
        }
        disk.rig.device.unquiesce();
        disk.rig.until_used((round + 1).wrapping_mul(3));
        assert_eq!([0, 1, 2].map(|slot| disk.status(slot)), [OK; 3], "round {round}");
        assert_eq!(disk.rig.get(disk.data_at(1), 512), [round.to_le_bytes(); 256].concat());
    }
}
