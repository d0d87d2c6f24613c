//! A secondary whose memory takes long to prefault. A cgroup would make a real one slow; here the
//! secondary is the test's own, which says that it lives and is not ready yet.

use std::time::{Duration, Instant};

use mcd::control::status::State;
use mcd::protocol::messages::{Activity, Channel, Heartbeat, Message};
use mcd::protocol::types::{Generation, InstanceId};

use super::environment::{PRIMARY, run};
use super::fake::{Peer, hello};

/// Longer than the 30 s after which a primary once gave up whoever had not joined.
const PREFAULT: Duration = Duration::from_secs(60);
const HEARTBEAT: Duration = Duration::from_millis(200);

#[test]
fn a_secondary_that_prefaults_for_a_minute_is_not_given_up() {
    run("slow_prefault::a_secondary_that_prefaults_for_a_minute_is_not_given_up", |host| {
        let primary = host.primary();
        let newcomer = InstanceId(1);
        let join = |channel, port| {
            let mut peer = Peer::connect(port);
            peer.send(&Message::Hello(hello(channel, newcomer.0)));
            match peer.read() {
                Ok(Message::Welcome(welcome)) => (peer, welcome.generation),
                other => panic!("not welcomed: {other:?}"),
            }
        };
        let (_data, generation): (_, Generation) = join(Channel::Data, PRIMARY[0]);
        let (mut heartbeat, _) = join(Channel::Heartbeat, PRIMARY[1]);
        // Heartbeats and nothing else: no epoch is acked while the memory is being prefaulted.
        let began = Instant::now();
        for sequence in 1.. {
            let activity = Activity::Building { done_bytes: sequence << 20 };
            let beat = Heartbeat { instance: newcomer, generation, sequence, committed: None, activity };
            heartbeat.send(&Message::Heartbeat(beat));
            let status = primary.status();
            assert!(status.running, "{status}");
            // The newcomer may need some beats before the status knows it.
            if began.elapsed() >= PREFAULT {
                assert_eq!((status.state, status.peer), (State::Resync, Some(newcomer.to_string())));
                return;
            }
            std::thread::park_timeout(HEARTBEAT);
        }
    });
}
