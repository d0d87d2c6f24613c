//! What a secondary finds at its `--peer`.

use std::net::TcpListener;

use mcd::control::status::State;
use mcd::machine::{CpuModel, host_cpu};
use mcd::protocol::machine_shape::MachineShape;
use mcd::protocol::messages::{Message, PROTOCOL_VERSION, RefuseReason, Welcome};

use super::environment::{HOST, PRIMARY, REFUSED, run};
use super::fake::{FakePrimary, Peer, frame_of_version, garbage, welcome};
use super::process::Node;

#[test]
fn a_secondary_ends_where_the_peer_speaks_no_mcd_or_another_version() {
    run("joining::a_secondary_ends_where_the_peer_speaks_no_mcd_or_another_version", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let other = frame_of_version(&Message::Welcome(welcome()), PROTOCOL_VERSION + 1);
        let answers: [(&[u8], &str); 3] = [
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the peer does not speak mcd"),
            (&garbage(4096), "the peer does not speak mcd"),
            (&other, "speaks version 4"),
        ];
        for (answer, part) in answers {
            let mut node = host.secondary(&[]);
            let (mut peer, _) = fake.accept_data();
            peer.send_bytes(answer);
            node.fails(REFUSED, &["no primary to join at --peer", part]);
        }
        // The data port is right, the heartbeat port is somebody else's.
        let mut node = host.secondary(&[]);
        let (mut data, _) = fake.accept_data();
        data.send(&Message::Welcome(welcome()));
        let (mut heartbeat, _) = fake.accept_heartbeat();
        heartbeat.send_bytes(b"-ERR unknown command\r\n-ERR unknown command\r\n");
        node.fails(REFUSED, &["the peer does not speak mcd"]);
    });
}

#[test]
fn a_secondary_ends_where_the_primary_does_not_match_its_flags() {
    run("joining::a_secondary_ends_where_the_primary_does_not_match_its_flags", |host| {
        let primary = host.primary();
        host.secondary(&["--guest=mail"]).fails(REFUSED, &["runs guest 'web', not 'mail'", "--peer"]);
        host.secondary(&["--staging-max=4M"]).fails(REFUSED, &["at most 4 MiB", "--staging-max"]);
        let swapped = [format!("--peer={}", PRIMARY[1]), format!("--peer-heartbeat={}", PRIMARY[0])];
        host.secondary(&[&swapped[0], &swapped[1]]).fails(REFUSED, &["this is the heartbeat port"]);
        primary.assert_serves_alone();
    });
}

#[test]
fn a_large_guest_is_protected_without_a_word_about_staging() {
    run("joining::a_large_guest_is_protected_without_a_word_about_staging", |host| {
        // An epoch of it may hold more than the 512 MiB that a small guest's secondary stages.
        let mut primary = Node::start(host.primary_command(&["--memory=544M"]));
        primary.wait_guest();
        host.secondary(&["--staging-max=512M"]).fails(REFUSED, &["at most 512 MiB", "--staging-max"]);
        let mut secondary = host.secondary(&[]);
        primary.wait_state(State::Protected);
        secondary.wait_line("protected in g");
    });
}

#[test]
fn a_secondary_ends_at_a_final_refusal() {
    run("joining::a_secondary_ends_at_a_final_refusal", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        for reason in [RefuseReason::Version, RefuseReason::Guest, RefuseReason::Cpu, RefuseReason::Malformed] {
            let mut node = host.secondary(&[]);
            let (mut peer, _) = fake.accept_data();
            peer.send(&Message::Refuse { reason, detail: "not with you".into() });
            node.fails(REFUSED, &["the primary refused this node: not with you"]);
        }
    });
}

#[test]
fn a_secondary_refuses_a_welcome_with_impossible_values() {
    run("joining::a_secondary_refuses_a_welcome_with_impossible_values", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let ends_with = |flags: &[&str], bad: Welcome, code: i32, part: &str| {
            let mut node = host.secondary(flags);
            let (mut peer, _) = fake.accept_data();
            peer.send(&Message::Welcome(bad.clone()));
            // What the host cannot do shows when the machine is built, with both connections open.
            let _heartbeat = (code == HOST).then(|| {
                let (mut heartbeat, _) = fake.accept_heartbeat();
                heartbeat.send(&Message::Welcome(bad));
                heartbeat
            });
            node.fails(code, &[part]);
        };
        let ends = |bad: Welcome, code: i32, part: &str| ends_with(&[], bad, code, part);
        let welcomes = |bad: Welcome, part: &str| ends(bad, REFUSED, part);
        let shaped = |memory_bytes: u64, cpus: u8| Welcome {
            shape: MachineShape { memory_bytes, cpus, ..welcome().shape },
            ..welcome()
        };
        ends_with(&["--staging-max=512M"], shaped(1 << 40, 1), REFUSED, "raise --staging-max");
        ends(shaped(1 << 40, 1), HOST, "to have 1048576 MiB of memory");
        welcomes(shaped(u64::MAX, 1), "no machine has this shape");
        welcomes(shaped(0, 1), "no machine has this shape");
        welcomes(shaped((16 << 20) + 1, 1), "no machine has this shape");
        welcomes(shaped(16 << 20, 0), "no machine has this shape");
        ends(shaped(16 << 20, 255), HOST, "cannot hold the guest");
        // It could not be restored here: that is found before anybody counts on it.
        if !host_cpu(CpuModel::Host).expect("KVM").tsc_scales {
            let faster = Welcome { tsc_khz: welcome().tsc_khz * 2, ..welcome() };
            ends(faster, HOST, "cannot hold the guest: vCPU 0: the guest's TSC runs at");
        }
        welcomes(Welcome { heartbeat_interval_us: 0, ..welcome() }, "heartbeats every 0");
        welcomes(Welcome { heartbeat_timeout_us: 1, ..welcome() }, "a timeout of 1");
    });
}

#[test]
fn a_temporary_refusal_is_retried_and_logged_once() {
    run("joining::a_temporary_refusal_is_retried_and_logged_once", |host| {
        let mut node = host.secondary(&[]);
        node.wait_warning("no primary to join yet: cannot connect to 127.0.0.1:7401");
        let status = node.wait_state(State::Connecting);
        assert!(status.alarms.iter().any(|alarm| alarm.contains("cannot connect")), "{status}");

        let fake = FakePrimary::listen(PRIMARY);
        for _ in 0..4 {
            let (mut peer, _) = fake.accept_data();
            peer.send(&Message::Refuse { reason: RefuseReason::Busy, detail: "one is enough".into() });
            peer.is_closed();
        }
        node.wait_warning("no primary to join yet: one is enough");
        for _ in 0..4 {
            let (mut peer, _) = fake.accept_data();
            peer.send(&Message::Refuse { reason: RefuseReason::NotPrimary, detail: "ask my neighbour".into() });
            peer.is_closed();
        }
        node.wait_warning("ask my neighbour");
        assert_eq!(node.status().state, State::Connecting);
        node.terminate();
        node.ends_well();
        for part in ["cannot connect", "one is enough", "ask my neighbour"] {
            assert_eq!(node.seen(part), 1, "{part}");
        }
    });
}

#[test]
fn a_primary_that_does_not_answer_times_out_and_is_retried() {
    run("joining::a_primary_that_does_not_answer_times_out_and_is_retried", |host| {
        let mute = TcpListener::bind(PRIMARY[0]).expect("a port");
        let mut node = host.secondary(&[]);
        let (first, _) = mute.accept().expect("a newcomer");
        node.wait_warning("the primary did not answer in time");
        let (mut second, _) = mute.accept().expect("it tries again");
        // Half a word, and silence: it can still be told to end.
        std::io::Write::write_all(&mut second, b"MCD1\x01\0").expect("it listens");
        node.terminate();
        node.ends_well();
        drop((first, second));
    });
}

#[test]
fn a_second_secondary_is_refused_as_busy() {
    run("joining::a_second_secondary_is_refused_as_busy", |host| {
        host.ip("tuntap add dev tap2 mode tap");
        host.ip("link set tap2 up");
        let mut primary = host.primary();
        let mut secondary = host.secondary(&[]);
        primary.wait_state(State::Protected);
        primary.wait_line("protected in g");
        // Whoever asks a secondary for the guest is sent on.
        let mut unknown_peer = Peer::connect("127.0.0.1:7411");
        unknown_peer.send(&Message::Hello(super::fake::hello(mcd::protocol::messages::Channel::Data, 1)));
        assert!(unknown_peer.refusal(RefuseReason::NotPrimary).contains("this node is a secondary"));
        let mut unknown_peer = Peer::connect(PRIMARY[0]);
        unknown_peer.send(&Message::Hello(super::fake::hello(mcd::protocol::messages::Channel::Data, 1)));
        unknown_peer.refusal(RefuseReason::Busy);
        assert!(primary.status().protected && secondary.status().protected);
        // A real one tries again and again, at longer and longer intervals: told once, then
        // counted.
        let counted = primary.status().refused_newcomers;
        let third = ["--tap=tap2", "--listen=127.0.0.1:7421", &format!("--control={}", host.path("t.sock").display())];
        let mut third = host.secondary(&third);
        third.wait_warning("MC_NO_PRIMARY");
        primary.wait_status("asked again", |status| status.refused_newcomers >= counted + 4);
        secondary.terminate();
        secondary.ends_well();
        // What kept it waiting is over.
        third.wait_line("protected in g");
        let line = primary.wait_line("protected in g");
        assert!(line.contains("INFO"), "{line}");
        assert_eq!(primary.seen("MC_REFUSED"), 1);
    });
}
