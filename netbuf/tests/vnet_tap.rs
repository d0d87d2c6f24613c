//! A real tap with virtio-net headers, in a network namespace of its own.

mod namespace;

use namespace::{in_namespace, opened_once_free, until_readable};
use netbuf::{FRAME_BYTES_MAX, PacketPort, TapError, TunTapPort, VNET_HEADER_BYTES, VnetTapPort};
use std::io;
use std::net::UdpSocket;
use std::process::Command;
use std::time::Duration;

const HOST: [u8; 4] = [10, 9, 0, 1];
const GUEST: [u8; 4] = [10, 9, 0, 2];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const PORT: u16 = 7000;

/// Header: the checksum is to be filled in, from byte 34 on, at 34 + 6 (UDP behind Ethernet and
/// IPv4).
const LACKS_CHECKSUM: [u8; VNET_HEADER_BYTES] = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("ip");
    assert!(status.success(), "ip {arguments}");
}

/// Brings the tap up with the host's address on it, and tells the host where the guest is.
fn connect(name: &str) -> [u8; 6] {
    ip(&format!("addr add 10.9.0.1/24 dev {name}"));
    ip(&format!("link set {name} up"));
    ip(&format!("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev {name} nud permanent"));
    let shown = Command::new("ip").args(["-br", "link", "show", name]).output().expect("ip");
    let line = String::from_utf8(shown.stdout).expect("text");
    let text = line.split_whitespace().find(|word| word.matches(':').count() == 5).expect("an address");
    let mut mac = [0; 6];
    for (byte, part) in mac.iter_mut().zip(text.split(':')) {
        *byte = u8::from_str_radix(part, 16).expect("hex");
    }
    mac
}

fn sum(bytes: &[u8], start: u32) -> u32 {
    bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0))).sum::<u32>() + start
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum over what UDP's checksum covers besides UDP.
fn pseudo_header(udp_bytes: usize) -> u32 {
    sum(&[HOST, GUEST].concat(), 17 + udp_bytes as u32)
}

/// An Ethernet frame with a UDP datagram from the guest to the host that lacks its checksum as the
/// header says: the field holds what is not covered by it.
fn datagram(to: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let udp_bytes = 8 + payload.len();
    let mut packet = vec![0x45, 0];
    packet.extend((20 + udp_bytes as u16).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    packet.extend([GUEST, HOST].concat());
    let checksum = !fold(sum(&packet, 0));
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet.extend([PORT.to_be_bytes(), PORT.to_be_bytes()].concat());
    packet.extend((udp_bytes as u16).to_be_bytes());
    packet.extend(fold(pseudo_header(udp_bytes)).to_be_bytes());
    packet.extend(payload);
    [&to[..], &GUEST_MAC, &[8, 0], &packet].concat()
}

fn receive(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    let mut bytes = [0; 2048];
    socket.recv(&mut bytes).map(|length| bytes[..length].to_vec())
}

/// The next UDP frame that the port gives: header and frame.
fn next_udp(port: &VnetTapPort) -> ([u8; VNET_HEADER_BYTES], Vec<u8>) {
    let mut buf = vec![0; FRAME_BYTES_MAX];
    loop {
        match port.recv(&mut buf) {
            Ok(length) => {
                let (header, frame) = buf[..length].split_first_chunk().expect("header");
                if frame[12..14] == [8, 0] && frame[23] == 17 {
                    return (*header, frame.to_vec());
                }
            }
            Err(error) => {
                assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                until_readable(port.as_raw_fd());
            }
        }
    }
}

#[test]
fn checksums_are_left_to_the_other_side_as_headers_say() {
    in_namespace("checksums_are_left_to_the_other_side_as_headers_say", || {
        let port = VnetTapPort::create("mcdtest2").unwrap();
        assert_eq!((port.name(), port.has_headers()), ("mcdtest2", true));
        let mac = connect("mcdtest2");
        let socket = UdpSocket::bind(("10.9.0.1", PORT)).expect("socket");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("timeout");
        // To the host: without its checksum and without a header that says so the first is wrong,
        // so only the second arrives.
        port.send(&[vec![0; VNET_HEADER_BYTES], datagram(mac, b"wrong")].concat()).expect("send");
        port.send(&[LACKS_CHECKSUM.to_vec(), datagram(mac, b"right")].concat()).expect("send");
        assert_eq!(receive(&socket).expect("datagram"), b"right");
        // To the guest: with a checksum, unless it may lack it.
        for allowed in [false, true, false] {
            port.receive_unchecked(allowed).expect("offload");
            socket.send_to(b"to the guest", ("10.9.0.2", PORT)).expect("send");
            let (header, frame) = next_udp(&port);
            let udp = &frame[34..];
            assert_eq!(&udp[8..], b"to the guest");
            let whole = fold(sum(udp, pseudo_header(udp.len()))) == 0xffff;
            assert_eq!((header[0] & 1 == 1, whole), (allowed, !allowed), "{header:?}");
        }
    });
}

#[test]
fn a_large_segment_goes_out_as_one_frame_and_a_wrong_header_does_not() {
    in_namespace("a_large_segment_goes_out_as_one_frame_and_a_wrong_header_does_not", || {
        let port = VnetTapPort::create("mcdtest3").unwrap();
        let mac = connect("mcdtest3");
        let host = namespace::packet_socket("mcdtest3", 0x0800).expect("packet socket");
        // TCP over IPv4 with 40,000 bytes, to be cut into pieces of 1448.
        let mut frame = datagram(mac, &vec![5; 40_012]);
        frame[23] = 6;
        frame[46] = 5 << 4;
        frame[24..26].fill(0);
        let checksum = !fold(sum(&frame[14..34], 0));
        frame[24..26].copy_from_slice(&checksum.to_be_bytes());
        let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
        port.send(&[header.to_vec(), frame.clone()].concat()).expect("send");
        assert_eq!(namespace::next_packet(&host), frame);
        let beyond_the_frame = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 16, 0, 0, 0];
        let refused = port.send(&[beyond_the_frame.to_vec(), frame].concat());
        assert_eq!(refused.expect_err("refused by the kernel").kind(), io::ErrorKind::InvalidInput);
    });
}

#[test]
fn a_tap_can_be_used_with_and_without_headers_in_turn() {
    in_namespace("a_tap_can_be_used_with_and_without_headers_in_turn", || {
        assert!(matches!(VnetTapPort::open("mcdtest4"), Err(TapError::Missing { .. })));
        ip("tuntap add dev mcdtest4 mode tap");
        let port = VnetTapPort::open("mcdtest4").unwrap();
        assert!(matches!(TunTapPort::open("mcdtest4"), Err(TapError::Occupied { .. })));
        assert!(matches!(VnetTapPort::open("mcdtest4"), Err(TapError::Occupied { .. })));
        let mac = connect("mcdtest4");
        port.send(&[LACKS_CHECKSUM.to_vec(), datagram(mac, b"x")].concat()).expect("with a header");
        drop(port);
        let plain = opened_once_free(|| TunTapPort::open("mcdtest4"));
        assert!(!plain.has_headers());
        plain.send(&datagram(mac, b"x")).expect("without one");
        drop(plain);
        assert!(matches!(VnetTapPort::open("lo"), Err(TapError::NotATap { .. })));
        opened_once_free(|| VnetTapPort::open("mcdtest4"));
    });
}
