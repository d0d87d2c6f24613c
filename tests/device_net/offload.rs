//! Checksums and segmentation left to the host: headers pass as far as driver and backend agree.

use mcd::device::Offloads;
use vm_memory::{Bytes, GuestAddress};

use crate::rig::*;

const ALL: Offloads = Offloads { checksum: true, segmentation: true, guest_checksum: true };
const CSUM: u32 = 1;
const GUEST_CSUM: u32 = 1 << 1;
const TSO4: u32 = 1 << 11;
const TSO6: u32 = 1 << 12;

/// A header that asks for a checksum at 34 + 16 and for segments of 1460 bytes of TCP over IPv4.
const LARGE: [u8; 12] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
const LACKS_CHECKSUM: [u8; 12] = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
const PLAIN: [u8; 12] = [0; 12];

/// Lets the driver send `length` bytes of 7 behind `header`.
fn send(rig: &mut Rig, header: [u8; 12], length: usize) {
    let bytes = [header.to_vec(), vec![7; length]].concat();
    rig.mem.write_slice(&bytes, GuestAddress(0x4_0000)).expect("frame");
    rig.descriptor(TX, 0, 0x4_0000, bytes.len() as u32, 0, 0);
    rig.add(TX, 0);
    rig.notify(TX);
}

/// What the driver finds in its buffer when the wire brings `frame`, with its header; the buffer is
/// put first.
fn receive(rig: &mut Rig, header: [u8; 12], count: u16) -> [u8; 14] {
    rig.put_buffer(0, 2048);
    rig.notify(RX);
    rig.backend.send([header.to_vec(), vec![9; 60]].concat());
    until("the frame", || rig.used(RX) == count);
    let mut got = [0; 14];
    rig.mem.read_slice(&mut got, GuestAddress(0x8_0000)).expect("read");
    got
}

#[test]
fn what_the_backend_carries_is_offered() {
    assert_eq!(Rig::bare().read(0x10), 1 << 5);
    assert_eq!(Rig::in_front_of(ALL).read(0x10), 1 << 5 | CSUM | GUEST_CSUM | TSO4 | TSO6);
    let only_in = Rig::in_front_of(Offloads { guest_checksum: true, ..Offloads::NONE });
    assert_eq!(only_in.read(0x10), 1 << 5 | GUEST_CSUM);
}

#[test]
fn headers_pass_through_when_agreed_on() {
    let mut rig = Rig::in_front_of(ALL);
    rig.agree(CSUM | GUEST_CSUM | TSO4);
    assert_eq!(rig.backend.agreed.lock().expect("agreed").last(), Some(&ALL));
    send(&mut rig, LARGE, 40_000);
    send(&mut rig, PLAIN, 60);
    let sent = rig.backend.sent();
    assert_eq!(sent[0], [LARGE.to_vec(), vec![7; 40_000]].concat());
    assert_eq!(sent[1], [PLAIN.to_vec(), vec![7; 60]].concat());
    assert_eq!(receive(&mut rig, LACKS_CHECKSUM, 1), [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 1, 0, 9, 9]);
    rig.write(0x70, 0);
    assert_eq!(rig.backend.agreed.lock().expect("agreed").last(), Some(&Offloads::NONE), "a reset takes it back");
}

#[test]
fn what_was_not_agreed_on_is_dropped_and_never_reaches_the_other_side() {
    let mut rig = Rig::in_front_of(ALL);
    rig.agree(TSO6);
    for header in [LARGE, LACKS_CHECKSUM] {
        send(&mut rig, header, 60);
    }
    // Not by this driver: it may not ask for a checksum at all.
    send(&mut rig, [2, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 60);
    assert_eq!((rig.used(TX), rig.backend.sent()), (3, vec![[PLAIN.to_vec(), vec![7; 60]].concat()]));
    rig.put_buffer(0, 2048);
    rig.notify(RX);
    rig.backend.send([LACKS_CHECKSUM.to_vec(), vec![9; 60]].concat());
    rig.backend.send(vec![0; 11]);
    rig.backend.send([PLAIN.to_vec(), vec![8; 60]].concat());
    until("the frame it can take", || rig.used(RX) == 1);
    let mut got = [0; 14];
    rig.mem.read_slice(&mut got, GuestAddress(0x8_0000)).expect("read");
    assert_eq!(got, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 8, 8]);
    assert!(!rig.is_broken());
}

#[test]
fn a_restored_device_tells_its_backend_what_was_agreed_on() {
    let mut rig = Rig::in_front_of(ALL);
    rig.agree(CSUM);
    rig.quiesce();
    let other = Rig::in_front_of(ALL);
    other.quiesce();
    other.device.restore(&rig.state()).expect("restore");
    let checksum = Offloads { checksum: true, ..Offloads::NONE };
    assert_eq!(other.backend.agreed.lock().expect("agreed").last(), Some(&checksum));
    let plain = Rig::bare();
    plain.quiesce();
    let error = plain.device.restore(&rig.state()).expect_err("it cannot carry them").to_string();
    assert!(error.contains("features"), "{error}");
}
