//! What the tap tests share: a network namespace for each, and the host's side of a tap.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::Command;
use std::time::{Duration, Instant};

use netbuf::TapError;

/// Set in a test binary that runs again in a user namespace.
const INSIDE: &str = "NETBUF_TEST_INSIDE";

/// Runs `test`, the body of the test `name`, on a thread inside a fresh network namespace; says why
/// if that cannot be had. An ordinary user's test binary has too many threads to move into a user
/// namespace, so it starts itself again inside one.
pub fn in_namespace(name: &str, test: fn()) {
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

/// Brings the interface up and returns a packet socket on it for frames of one EtherType: the
/// host's side of the tap.
pub fn packet_socket(name: &str, ethertype: u16) -> io::Result<OwnedFd> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    // SAFETY: plain system calls; every pointer is to a live local of the right type.
    unsafe {
        let fd = check(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(ethertype.to_be())))?;
        let fd = OwnedFd::from_raw_fd(fd);
        let mut request: libc::ifreq = std::mem::zeroed();
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
        check(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &request))?;
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ethertype.to_be();
        address.sll_ifindex = libc::if_nametoindex(CString::new(name)?.as_ptr()) as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length))?;
        Ok(fd)
    }
}

/// The next frame that reaches the host's side.
#[allow(dead_code)] // not every test looks at it
pub fn next_packet(host: &OwnedFd) -> Vec<u8> {
    until_readable(host.as_raw_fd());
    let mut buf = vec![0; 1 << 17];
    // SAFETY: the buffer is live and as long as said.
    let got = unsafe { libc::recv(host.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), 0) };
    buf.truncate(usize::try_from(got).expect("a frame"));
    buf
}

/// Waits until there is something to read.
pub fn until_readable(fd: RawFd) {
    let mut wait = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one live pollfd, and the count says one.
    assert_eq!(unsafe { libc::poll(&mut wait, 1, 30_000) }, 1, "no frame came");
}

/// Opens a tap that has just been let go: a child that another test is starting has a copy of its
/// descriptor until it runs its program.
#[allow(dead_code)] // not every test needs it
pub fn opened_once_free<P: std::fmt::Debug>(open: impl Fn() -> Result<P, TapError>) -> P {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match open() {
            Err(TapError::Occupied { .. }) if Instant::now() < deadline => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}
