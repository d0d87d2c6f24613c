//! virtio-net from the driver's side. Needs no KVM.

mod hostile;
mod offload;
mod rig;

use std::sync::atomic::Ordering;

use rig::*;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_frame_in_pieces_is_sent_whole() {
    let mut rig = Rig::ready();
    rig.mem.write_slice(&[0; 12], GuestAddress(0x4_0000)).expect("header");
    rig.mem.write_slice(b"hello, this is a frame", GuestAddress(0x4_1000)).expect("frame");
    rig.descriptor(TX, 3, 0x4_0000, 10, NEXT, 1);
    rig.descriptor(TX, 1, 0x4_000a, 2, NEXT, 7);
    rig.descriptor(TX, 7, 0x4_1000, 22, 0, 0);
    rig.add(TX, 3);
    rig.notify(TX);
    assert_eq!(rig.backend.sent(), vec![b"hello, this is a frame".to_vec()]);
    assert_eq!(rig.used(TX), 1);
    assert_eq!(rig.read(0x60), 1, "interrupt status");
    assert_eq!(*rig.machine.line.lock().expect("line"), vec![true]);
    rig.write(0x64, 1);
    assert_eq!(*rig.machine.line.lock().expect("line"), vec![true, false]);
    assert_eq!(rig.machine.rings.load(Ordering::SeqCst), 1);
}

#[test]
fn a_polling_driver_gets_no_interrupts() {
    let mut rig = Rig::ready();
    for queue in [RX, TX] {
        rig.mem.write_obj(1u16, GuestAddress(avail(queue))).expect("flags");
    }
    rig.put_frame(0, 1, 60);
    rig.notify(TX);
    assert_eq!((rig.used(TX), rig.read(0x60)), (1, 0));
    assert_eq!(rig.machine.rings.load(Ordering::SeqCst), 0, "it sees its own transmit");
    rig.put_buffer(0, 2048);
    rig.notify(RX);
    rig.backend.send(vec![5; 60]);
    until("the frame", || rig.used(RX) == 1);
    until("the doorbell", || rig.machine.rings.load(Ordering::SeqCst) == 1);
    assert_eq!(rig.read(0x60), 0);
    assert!(rig.machine.line.lock().expect("line").is_empty());
}

#[test]
fn a_full_backend_leaves_frames_in_the_queue_until_it_has_room() {
    let mut rig = Rig::ready();
    rig.backend.room.store(2, Ordering::SeqCst);
    for index in 0..6 {
        rig.put_frame(index, index as u8, 60);
    }
    rig.notify(TX);
    assert_eq!((rig.used(TX), rig.backend.sent().len()), (2, 2));
    rig.notify(TX);
    assert_eq!(rig.used(TX), 2);
    rig.backend.room.store(1, Ordering::SeqCst);
    rig.device.kick();
    until("one frame more", || rig.used(TX) == 3);
    // While paused nothing moves; the room is found at resume.
    rig.quiesce();
    rig.backend.room.store(2, Ordering::SeqCst);
    rig.device.kick();
    assert_eq!(rig.used(TX), 3);
    rig.device.unquiesce();
    until("two frames more", || rig.used(TX) == 5);
    rig.backend.room.store(10, Ordering::SeqCst);
    rig.notify(TX);
    assert_eq!(rig.used(TX), 6);
    let order: Vec<u8> = rig.backend.sent().iter().map(|f| f[0]).collect();
    assert_eq!(order, [0, 1, 2, 3, 4, 5], "in order, once");
}

#[test]
fn kicks_from_another_thread_are_never_lost() {
    let mut rig = Rig::ready();
    rig.backend.room.store(0, Ordering::SeqCst);
    for round in 0..2_000u16 {
        rig.put_frame(round % SIZE, round as u8, 60);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                rig.backend.room.store(1, Ordering::SeqCst);
                rig.device.kick();
            });
            rig.notify(TX);
        });
        until("the frame to leave", || rig.used(TX) == round.wrapping_add(1));
    }
    assert_eq!(rig.backend.sent().len(), 2_000);
}

#[test]
fn frames_wait_outside_until_there_are_buffers_and_nobody_spins() {
    let mut rig = Rig::ready();
    for n in 0..4 {
        rig.backend.send(vec![n; 60]);
    }
    assert_eq!(rig.used_flags(RX), 0, "the driver is to notify");
    // Without buffers the backend is not even looked at, however often the device is woken.
    for _ in 0..200 {
        rig.quiesce();
        rig.device.unquiesce();
        rig.notify(RX);
    }
    assert_eq!((rig.backend.waiting(), rig.backend.reads.load(Ordering::SeqCst)), (4, 0));
    rig.put_buffer(0, 2048);
    rig.put_buffer(1, 2048);
    rig.notify(RX);
    until("two frames", || rig.used(RX) == 2);
    assert_eq!(rig.backend.waiting(), 2);
    rig.put_buffer(2, 2048);
    rig.put_buffer(3, 2048);
    rig.put_buffer(4, 2048);
    rig.notify(RX);
    until("all frames", || rig.used(RX) == 4);
    let mut got = [0; 14];
    rig.mem.read_slice(&mut got, GuestAddress(0x8_3000)).expect("read");
    assert_eq!(got, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3, 3], "header with num_buffers = 1, then the frame");
    let length: u32 = rig.mem.read_obj(GuestAddress(used(RX) + 4 + 3 * 8 + 4)).expect("length");
    assert_eq!(length, 72);
    until("the driver to be spared its notifies", || rig.used_flags(RX) == 1);
}

#[test]
fn a_paused_device_leaves_memory_alone() {
    let mut rig = Rig::ready();
    rig.put_buffer(0, 2048);
    rig.notify(RX);
    rig.quiesce();
    rig.backend.send(vec![1; 60]);
    for _ in 0..1_000 {
        std::thread::yield_now();
        assert_eq!(rig.used(RX), 0);
    }
    assert_eq!(rig.backend.waiting(), 1);
    rig.device.unquiesce();
    until("the frame", || rig.used(RX) == 1);
}

#[test]
fn a_frame_larger_than_its_buffer_is_dropped_and_the_buffer_kept() {
    let mut rig = Rig::ready();
    rig.put_buffer(0, 100);
    rig.notify(RX);
    rig.backend.send(vec![1; 200]);
    rig.backend.send(vec![2; 60]);
    until("the frame that fits", || rig.used(RX) == 1);
    let mut got = [0; 2];
    rig.mem.read_slice(&mut got, GuestAddress(0x8_000c)).expect("read");
    assert_eq!(got, [2, 2]);
}

#[test]
fn state_goes_to_another_device_and_on() {
    let mut rig = Rig::ready();
    rig.backend.room.store(1, Ordering::SeqCst);
    rig.put_frame(0, 1, 60);
    rig.put_frame(1, 2, 60);
    rig.notify(TX);
    rig.put_buffer(0, 2048);
    rig.quiesce();
    let state = rig.state();

    let other = Rig::bare();
    other.quiesce();
    let mut image = vec![0; MEMORY];
    rig.mem.read_slice(&mut image, GuestAddress(0)).expect("read");
    other.mem.write_slice(&image, GuestAddress(0)).expect("write");
    other.device.restore(&state).expect("restore");
    assert_eq!(other.state(), state);
    assert_eq!(*other.machine.line.lock().expect("line"), vec![true], "a set status raises the line again");
    other.backend.send(vec![3; 60]);
    other.device.unquiesce();
    until("the frame that had to wait", || other.used(TX) == 2);
    assert_eq!(other.backend.sent(), vec![vec![2; 60]]);
    until("a frame in", || other.used(RX) == 1);
    other.write(0x64, 3);
    assert_eq!(other.machine.line.lock().expect("line").last(), Some(&false));
}
