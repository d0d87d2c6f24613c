//! Who knocks at a primary.

use std::net::TcpStream;

use crossbeam::channel::RecvTimeoutError;
use mcd::control::status::State;
use mcd::protocol::cpu::HostCpu;
use mcd::protocol::messages::{Activity, Channel, Hello, Message, PROTOCOL_VERSION, RefuseReason};
use mcd::protocol::types::{GuestName, InstanceId};

use super::environment::{Environment, PRIMARY, run};
use super::fake::{Peer, bulk, frame, frame_of_version, garbage, hello};
use super::process::Node;

/// After all that: the primary serves, and a newcomer gets the guest protected.
fn is_well(host: &Environment, primary: &mut Node) {
    primary.assert_serves_alone();
    let secondary = host.secondary(&[]);
    primary.wait_state(State::Protected);
    secondary.wait_status("standing by", |status| status.protected);
}

#[test]
fn bytes_that_are_no_mcd_frames_close_the_connection() {
    run("unknown_peers::bytes_that_are_no_mcd_frames_close_the_connection", |host| {
        let mut primary = host.primary();
        for port in PRIMARY {
            let mut unknown_peer = Peer::connect(port);
            unknown_peer.send_bytes(&garbage(4096));
            unknown_peer.is_closed();
            primary.wait_warning("the peer does not speak mcd");

            let mut unknown_peer = Peer::connect(port);
            unknown_peer.send_bytes(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
            unknown_peer.is_closed();
            primary.wait_warning("the peer does not speak mcd");

            // Gone before it said anything, and in the middle of a word.
            Peer::connect(port).hang_up();
            primary.wait_warning("the peer closed the connection");
            let mut unknown_peer = Peer::connect(port);
            unknown_peer.send_bytes(b"MCD1");
            unknown_peer.hang_up();
            primary.wait_warning("in the middle of a frame");
        }
        is_well(host, &mut primary);
    });
}

#[test]
fn an_incomplete_hello_times_out_however_slowly_it_arrives() {
    run("unknown_peers::an_incomplete_hello_times_out_however_slowly_it_arrives", |host| {
        let mut primary = host.primary();
        let words = frame(&Message::Hello(hello(Channel::Data, 1)));
        let mut silent = Peer::connect(PRIMARY[0]);
        silent.send_bytes(&words[..words.len() / 2]);
        silent.is_closed();
        primary.wait_warning("it said no hello in time");
        // One that never falls silent, and never says the whole of it: the time is for the hello,
        // not for each byte.
        let mut slow = TcpStream::connect(PRIMARY[0]).expect("a connection");
        let (done, wait) = crossbeam::channel::bounded::<()>(0);
        let drip = std::thread::spawn(move || {
            use std::io::Write;
            for byte in &words {
                // The only clock of this test: a pace far below the limit.
                let pace = wait.recv_timeout(std::time::Duration::from_millis(300));
                if pace == Err(RecvTimeoutError::Disconnected) || slow.write_all(&[*byte]).is_err() {
                    return;
                }
            }
            panic!("it could say all of it, slowly");
        });
        primary.wait_warning("it said no hello in time");
        drop(done);
        drip.join().expect("it was cut off");
        is_well(host, &mut primary);
    });
}

/// Says `bytes` at `port`: the sentence of the refusal.
#[track_caller]
fn refused_bytes(primary: &mut Node, port: &str, bytes: &[u8], reason: RefuseReason) -> String {
    let mut unknown_peer = Peer::connect(port);
    unknown_peer.send_bytes(bytes);
    let sentence = unknown_peer.refusal(reason);
    primary.wait_warning(&sentence);
    sentence
}

#[track_caller]
fn refused(primary: &mut Node, hello: Hello, reason: RefuseReason, part: &str) {
    let port = if hello.channel == Channel::Data { PRIMARY[0] } else { PRIMARY[1] };
    let sentence = refused_bytes(primary, port, &frame(&Message::Hello(hello)), reason);
    assert!(sentence.contains(part), "`{part}` is missing in: {sentence}");
}

#[test]
fn a_hello_that_does_not_match_the_primary_is_refused() {
    run("unknown_peers::a_hello_that_does_not_match_the_primary_is_refused", |host| {
        let mut primary = host.primary();
        let good = || hello(Channel::Data, 1);
        let newer = PROTOCOL_VERSION + 1;
        refused(&mut primary, Hello { version: newer, ..good() }, RefuseReason::Version, "run the same mcd");
        let guest = GuestName::new("mail").expect("a name");
        refused(&mut primary, Hello { guest, ..good() }, RefuseReason::Guest, "'web', not 'mail'");
        refused(&mut primary, Hello { staging_bytes_max: 1 << 20, ..good() }, RefuseReason::Staging, "--staging-max");
        let other = HostCpu { digest: good().cpu.digest ^ 1, ..good().cpu };
        refused(&mut primary, Hello { cpu: other, ..good() }, RefuseReason::Cpu, "other CPU features");
        // A hundredth faster, on a host that cannot scale: told now, not at the takeover.
        let tsc_khz = good().cpu.tsc_khz / 100 * 101;
        let faster = HostCpu { tsc_khz, tsc_scales: false, ..good().cpu };
        let sentence = format!("has a TSC of {tsc_khz} kHz and cannot scale it");
        refused(&mut primary, Hello { cpu: faster, ..good() }, RefuseReason::Cpu, &sentence);
        refused(&mut primary, hello(Channel::Heartbeat, 1), RefuseReason::Malformed, "comes second");

        let (data, heartbeat) = (Message::Hello(good()), Message::Hello(hello(Channel::Heartbeat, 1)));
        let mut says = |port, bytes: &[u8], reason| refused_bytes(&mut primary, port, bytes, reason);
        let sentence = says(PRIMARY[0], &frame_of_version(&data, newer), RefuseReason::Version);
        assert!(sentence.contains("speaks version 4") && sentence.contains("same mcd release"), "{sentence}");
        assert!(says(PRIMARY[0], &frame(&heartbeat), RefuseReason::Malformed).contains("this is the data port"));
        assert!(says(PRIMARY[1], &frame(&data), RefuseReason::Malformed).contains("this is the heartbeat port"));
        let bye = Message::Bye { reason: "good day".into() };
        assert!(says(PRIMARY[0], &frame(&bye), RefuseReason::Malformed).contains("begins with a hello, not bye"));
        let pages = bulk(mcd::wire::FrameKind::Pages, b"no pages");
        assert!(says(PRIMARY[0], &pages, RefuseReason::Malformed).contains("malformed"));
        let mut damaged = frame(&data);
        *damaged.last_mut().expect("bytes") ^= 1;
        assert!(says(PRIMARY[0], &damaged, RefuseReason::Malformed).contains("arrived damaged"));
        let mut huge = frame(&data);
        huge[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(says(PRIMARY[0], &huge, RefuseReason::Malformed).contains("over the 1024 allowed"));
        is_well(host, &mut primary);
    });
}

#[test]
fn a_welcomed_newcomer_that_breaks_the_protocol_is_disconnected() {
    run("unknown_peers::a_welcomed_newcomer_that_breaks_the_protocol_is_disconnected", |host| {
        let mut primary = host.primary();
        let welcomed = |instance: u128| {
            let mut data = Peer::connect(PRIMARY[0]);
            data.send(&Message::Hello(hello(Channel::Data, instance)));
            assert!(matches!(data.read(), Ok(Message::Welcome(_))));
            data
        };
        let heart_of = |instance: u128| {
            let mut heartbeat = Peer::connect(PRIMARY[1]);
            heartbeat.send(&Message::Hello(hello(Channel::Heartbeat, instance)));
            assert!(matches!(heartbeat.read(), Ok(Message::Welcome(_))));
            heartbeat
        };
        // Nobody opens a second connection who has not said hello on the first. One that only said
        // hello holds nobody up, and has nothing else to say.
        let mut idle = welcomed(1);
        refused(&mut primary, hello(Channel::Heartbeat, 2), RefuseReason::Malformed, "comes second");
        idle.send(&Message::Ack { id: super::fake::epoch(9), staged_bytes: 0 });
        idle.refusal(RefuseReason::Malformed);
        primary.wait_warning("what does not belong here (ack)");

        // While one joins, others have to wait.
        let mut first = welcomed(2);
        let _first_heart = heart_of(2);
        refused(&mut primary, hello(Channel::Data, 8), RefuseReason::Busy, "try again later");
        first.send_bytes(&garbage(100));
        first.is_closed();
        primary.wait_warning("the guest runs on alone");

        // An ack of what was never sent, in the middle of nothing.
        let mut second = welcomed(3);
        let _second_heart = heart_of(3);
        second.send(&Message::Ack { id: super::fake::epoch(9), staged_bytes: 0 });
        second.is_closed();
        primary.wait_warning("it acknowledged epoch");

        // A heartbeat connection of its own, then another; then an unknown peer's instance id in a
        // heartbeat.
        let mut third = welcomed(4);
        let mut heartbeat = heart_of(4);
        refused(&mut primary, hello(Channel::Heartbeat, 4), RefuseReason::Malformed, "comes second");
        let beat = mcd::protocol::messages::Heartbeat {
            instance: InstanceId(5),
            generation: mcd::protocol::types::Generation(1),
            sequence: 1,
            committed: None,
            activity: Activity::Ready,
        };
        heartbeat.send(&Message::Heartbeat(beat));
        third.is_closed();
        primary.wait_warning("what does not belong here (heartbeat)");

        // Pages, and messages of the data connection, on the heartbeat connection.
        let pages = bulk(mcd::wire::FrameKind::Background, &super::fake::pages(&[1]));
        let ack = frame(&Message::Ack { id: super::fake::epoch(0), staged_bytes: 0 });
        for (instance, bytes, part) in [(6, pages, "a background frame"), (7, ack, "a heartbeat connection (ack)")] {
            let mut data = welcomed(instance);
            let mut heartbeat = heart_of(instance);
            heartbeat.send_bytes(&bytes);
            data.is_closed();
            primary.wait_warning(part);
        }
        is_well(host, &mut primary);
    });
}

#[test]
fn connections_beyond_the_limit_are_refused_as_busy() {
    run("unknown_peers::connections_beyond_the_limit_are_refused_as_busy", |host| {
        let mut primary = host.primary();
        let mut crowd: Vec<Peer> = (0..100).map(|_| Peer::connect(PRIMARY[0])).collect();
        // Some are told to come again, the others are given up when they say nothing.
        let mut told = 0;
        for unknown_peer in &mut crowd {
            match unknown_peer.read() {
                Ok(Message::Refuse { reason: RefuseReason::Busy, detail }) => {
                    assert!(detail.contains("connections are open"), "{detail}");
                    told += 1;
                }
                Err(error) => assert!(error.is_disconnect(), "{error}"),
                Ok(other) => panic!("{other:?}"),
            }
        }
        assert!(told >= 100 - 32, "only {told} were turned away at once");
        primary.wait_warning("connections are open");
        is_well(host, &mut primary);
    });
}
