//! Taps that are down, deleted or taken away, and what a node tells the network about its guest.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use mcd::control::status::{NodeStatus, State};
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{MsgFlags, recv, setsockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Value, json};

use super::environment::{HOST, run};
use super::process::{Node, WAIT_MAX};

#[test]
fn a_tap_that_is_down_is_refused_at_the_start() {
    run("taps::a_tap_that_is_down_is_refused_at_the_start", |host| {
        host.ip("link set tap0 down");
        host.ip("link set tap1 down");
        Node::start(host.primary_command(&[])).fails(HOST, &["tap tap0 is down", "ip link set tap0 up"]);
        host.secondary(&[]).fails(HOST, &["tap tap1 is down", "ip link set tap1 up"]);
    });
}

/// True if the guest's server answers a client on this host.
fn answers() -> bool {
    let deadline = Instant::now() + WAIT_MAX;
    let address = SocketAddr::from(([10, 0, 0, 2], 6379));
    while Instant::now() < deadline {
        // The thread of the test is in the network.
        if let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            let mut reply = [0; 7];
            let asked =
                stream.set_read_timeout(Some(WAIT_MAX)).and_then(|()| stream.write_all(b"*1\r\n$4\r\nPING\r\n"));
            return asked.and_then(|()| stream.read_exact(&mut reply)).is_ok_and(|()| reply == *b"+PONG\r\n");
        }
    }
    false
}

/// The alarm about the tap, if there is one.
fn tap_alarm(status: &NodeStatus) -> Option<&String> {
    status.alarms.iter().find(|alarm| alarm.starts_with("MC_TAP_LOST"))
}

#[test]
fn a_tap_that_is_lost_under_a_running_node_raises_an_alarm_and_comes_back_by_itself() {
    run("taps::a_tap_that_is_lost_under_a_running_node_raises_an_alarm_and_comes_back_by_itself", |host| {
        host.ip("link add br0 type bridge");
        host.ip("link set br0 up");
        host.ip("link set tap0 master br0");
        host.ip("addr add 10.0.0.1/24 dev br0");
        let mut primary = host.primary();
        let mut secondary = host.secondary(&[]);
        primary.wait_state(State::Protected);
        assert!(answers(), "the guest answers");
        let alarmed = |node: &Node, part: &str| {
            node.wait_status(part, |status| tap_alarm(status).is_some_and(|alarm| alarm.contains(part)));
        };
        let quiet = |node: &Node| drop(node.wait_status("quiet", |status| tap_alarm(status).is_none()));

        host.ip("link set tap0 down");
        alarmed(&primary, "tap tap0 is down: ip link set tap0 up");
        primary.wait_warning("MC_TAP_LOST");
        host.ip("link set tap0 up");
        quiet(&primary);
        primary.wait_line("MC_TAP_BACK");
        host.ip("link set tap0 nomaster");
        alarmed(&primary, "no port of its bridge");
        host.ip("link set tap0 master br0");
        quiet(&primary);
        assert!(answers(), "the guest answers again");

        host.ip("link del tap0");
        alarmed(&primary, "tap tap0 was deleted; make it again");
        host.ip("tuntap add dev tap0 mode tap");
        host.ip("link set tap0 up");
        // It is opened again, but nobody put it into the bridge.
        alarmed(&primary, "no port of its bridge");
        host.ip("link set tap0 master br0");
        quiet(&primary);
        assert!(answers(), "the guest answers through the new tap");
        // A takeover onto a tap that is down would be none: the secondary says so too.
        host.ip("link set tap1 down");
        alarmed(&secondary, "tap tap1 is down");
        secondary.wait_warning("MC_TAP_LOST");
        assert!(primary.status().protected);
    });
}

#[test]
fn frames_that_the_tap_does_not_take_are_counted() {
    run("taps::frames_that_the_tap_does_not_take_are_counted", |host| {
        let mut primary = host.primary();
        host.ip("link set tap0 down");
        primary.wait_warning("MC_TAP_LOST");
        // The node's own frame is as good as one of the guest's.
        primary.client().execute("announce-self", Value::Null, WAIT_MAX).expect("announced");
        let status = primary.wait_status("losing frames", |status| status.lost_frames > 0);
        assert!(status.to_string().contains("frames that the tap did not take"), "{status}");
        host.ip("link set tap0 up");
        let line = primary.wait_line("MC_TAP_BACK");
        assert!(line.contains("frames of the guest were lost"), "{line}");
    });
}

/// Hears the announcements of guests (RARP) in the network of the calling thread.
struct Listener(OwnedFd);

impl Listener {
    const ETHERTYPE_RARP: u16 = 0x8035;

    fn new() -> Listener {
        let protocol = libc::c_int::from(Self::ETHERTYPE_RARP.to_be());
        // SAFETY: the call takes three numbers and touches no memory.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just made and is nobody else's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let timeout = TimeVal::seconds(WAIT_MAX.as_secs().try_into().expect("some seconds"));
        setsockopt(&fd, ReceiveTimeout, &timeout).expect("a timeout");
        Listener(fd)
    }

    /// Waits for so many announcements.
    fn hear(&self, count: usize) {
        for heard in 0..count {
            let mut frame = [0; 128];
            let length = recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty());
            assert_eq!(length, Ok(60), "announcement {heard} of {count}");
        }
    }
}

#[test]
fn all_of_an_announcement_leaves_although_a_newcomer_joins_at_once() {
    run("taps::all_of_an_announcement_leaves_although_a_newcomer_joins_at_once", |host| {
        let listener = Listener::new();
        let secondary = host.secondary(&[]);
        let primary = host.primary();
        primary.wait_state(State::Protected);
        // Most of it is held, and released with the guest's own output.
        listener.hear(7);
        let announce = |node: &Node, series| node.client().execute("announce-self", series, WAIT_MAX);
        announce(&primary, json!({ "rounds": 3, "initial": 10, "step": 10, "max": 20 })).expect("announced");
        listener.hear(3);
        let refused = announce(&secondary, Value::Null).expect_err("it does not run the guest").to_string();
        assert!(refused.contains("ask the primary"), "{refused}");
        let wrong = announce(&primary, json!({ "rounds": 1001 })).expect_err("too often").to_string();
        assert!(wrong.contains("'rounds' must be a number from 0 to 1000"), "{wrong}");
    });
}
