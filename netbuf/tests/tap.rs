//! A real tap in a network namespace of its own.

use netbuf::{FRAME_BYTES_MAX, PacketPort, TapError, TunTapPort};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;

/// An EtherType for local experiments, so that nothing else the kernel sends is taken for ours.
const ETHERTYPE: u16 = 0x88b5;

/// Set in a test binary that runs again in a user namespace.
const INSIDE: &str = "NETBUF_TEST_INSIDE";

/// Runs `test`, the body of the test `name`, on a thread inside a fresh network namespace; says why if that cannot be had. An
/// ordinary user's test binary has too many threads to move into a user namespace, so it starts itself again inside one.
fn in_namespace(name: &str, test: fn()) {
    let skipped = std::thread::spawn(move || {
        if let Err(error) = std::fs::metadata("/dev/net/tun") {
            return Some(format!("/dev/net/tun: {error}"));
        }
        // SAFETY: unshare touches only this thread, which ends with the test.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return Some(format!("cannot make a network namespace: {}", io::Error::last_os_error()));
        }
        test();
        None
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    let Some(reason) = skipped else { return };
    let user_namespace = || Command::new("unshare").args(["--user", "--map-root-user", "true"]).status();
    if std::env::var_os(INSIDE).is_none() && user_namespace().is_ok_and(|status| status.success()) {
        let exe = std::env::current_exe().expect("a test binary knows its own path");
        let mut again = Command::new("unshare");
        again.args(["--user", "--map-root-user"]).arg(exe).args([name, "--exact", "--nocapture"]).env(INSIDE, "1");
        assert!(again.status().expect("it started before").success(), "the test failed inside a user namespace");
        return;
    }
    assert_ne!(std::env::var("MCD_REQUIRE_KVM").as_deref(), Ok("1"), "{reason}");
    println!("skipped: {reason}");
}

/// Brings the interface up and returns a packet socket on it: the host's side of the tap.
fn host_side(name: &str) -> io::Result<OwnedFd> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: plain system calls; every pointer is to a live local of the right type.
    unsafe {
        let fd = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ETHERTYPE.to_be())))?;
        let fd = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        check(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ETHERTYPE.to_be();
        address.sll_ifindex = libc::if_nametoindex(CString::new(name)?.as_ptr()) as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length))?;
        Ok(fd)
    }
}

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
                let mut wait = libc::pollfd { fd: port.as_raw_fd(), events: libc::POLLIN, revents: 0 };
                // SAFETY: one live pollfd, and the count says one.
                assert_eq!(unsafe { libc::poll(&mut wait, 1, 10_000) }, 1, "no frame came");
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
        let host = host_side("mcdtest0").unwrap();

        let mut buf = vec![0; FRAME_BYTES_MAX];
        for (fill, length) in [(1, 60), (2, 1514), (3, 14)] {
            port.send(&frame(fill, length)).unwrap();
            // SAFETY: the buffer is live and as long as said.
            let got = unsafe { libc::recv(host.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) };
            assert_eq!(&buf[..got as usize], frame(fill, length), "to the host");
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
        TunTapPort::create("mcdtest1").unwrap();
    });
}
