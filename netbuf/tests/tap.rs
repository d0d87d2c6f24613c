//! A real tap in a network namespace of its own.

mod namespace;

use namespace::{in_namespace, next_packet, opened_once_free, packet_socket, until_readable};
use netbuf::{FRAME_BYTES_MAX, PacketPort, TapError, TunTapPort};
use std::io;
use std::os::fd::AsRawFd;

/// An EtherType for local experiments, so that nothing else the kernel sends is taken for ours.
const ETHERTYPE: u16 = 0x88b5;

fn frame(fill: u8, length: usize) -> Vec<u8> {
    let mut frame = vec![fill; length];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, fill]);
    frame[12..14].copy_from_slice(&ETHERTYPE.to_be_bytes());
    frame
}

/// Waits until the port is readable, then takes the next frame of our type.
fn next_frame(port: &TunTapPort, buf: &mut [u8]) -> usize {
    loop {
        match port.recv(buf) {
            Ok(length) if buf[12..14] == ETHERTYPE.to_be_bytes() => return length,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                until_readable(port.as_raw_fd());
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn frames_cross_a_tap_both_ways() {
    in_namespace("frames_cross_a_tap_both_ways", || {
        let port = TunTapPort::create("mcdtest0").unwrap();
        assert_eq!(port.name(), "mcdtest0");
        let down = port.send(&frame(1, 60)).unwrap_err();
        assert_ne!(down.kind(), io::ErrorKind::WouldBlock, "a tap that is down is no full one");
        let host = packet_socket("mcdtest0", ETHERTYPE).unwrap();

        let mut buf = vec![0; FRAME_BYTES_MAX];
        for (fill, length) in [(1, 60), (2, 1514), (3, 14)] {
            port.send(&frame(fill, length)).unwrap();
            assert_eq!(next_packet(&host), frame(fill, length), "to the host");
        }
        for (fill, length) in [(4, 60), (5, 1514)] {
            let sent = frame(fill, length);
            // SAFETY: the buffer is live and as long as said.
            let count = unsafe { libc::send(host.as_raw_fd(), sent.as_ptr().cast(), sent.len(), 0) };
            assert_eq!(count, sent.len() as isize);
            let got = next_frame(&port, &mut buf);
            assert_eq!(&buf[..got], sent, "to the guest");
        }
    });
}

#[test]
fn an_occupied_a_missing_and_a_wrong_interface_are_told_apart() {
    in_namespace("an_occupied_a_missing_and_a_wrong_interface_are_told_apart", || {
        assert!(matches!(TunTapPort::open("mcdtest1"), Err(TapError::Missing { .. })));
        let port = TunTapPort::create("mcdtest1").unwrap();
        assert!(matches!(TunTapPort::open("mcdtest1"), Err(TapError::Occupied { .. })));
        assert!(matches!(TunTapPort::create("mcdtest1"), Err(TapError::Occupied { .. })));
        assert!(matches!(TunTapPort::open("lo"), Err(TapError::NotATap { .. })));
        drop(port);
        opened_once_free(|| TunTapPort::create("mcdtest1"));
    });
}
