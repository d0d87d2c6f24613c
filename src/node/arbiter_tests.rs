//! What people and programs see of an arbiter that is out of reach, for each kind of it.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};

use super::arbiter_thread::{ArbiterThread, Contact};
use super::config::{ArbiterConfig, Compress, NodeConfig, OnPeerLoss};
use super::events::NodeEvent;
use super::inbox::{Next, inbox};
use super::open_arbiter;
use super::status::StatusStore;
use crate::arbiter::etcd::EtcdConfig;
use crate::arbiter::{Arbiter, ArbiterError, Swap};
use crate::control::console::ConsoleTo;
use crate::control::status::Role;
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};
use crate::protocol::failure_detector::HeartbeatConfig;
use crate::protocol::record::Record;
use crate::protocol::types::{GuestName, InstanceId};

const WAIT_MAX: Duration = Duration::from_secs(1);

/// The configuration of a node with this arbiter.
pub(super) fn config(arbiter: ArbiterConfig) -> NodeConfig {
    NodeConfig {
        guest: GuestName::new("web").unwrap(),
        tap: "tap0".into(),
        cpu: Default::default(),
        listen: ([127, 0, 0, 1], 7401).into(),
        heartbeat_listen: ([127, 0, 0, 1], 7402).into(),
        arbiter,
        interval: Duration::from_millis(20),
        interval_min: Duration::from_micros(200),
        commit_on_output: true,
        stall_max: Duration::from_secs(2),
        heartbeat: HeartbeatConfig { interval: Duration::from_millis(50), timeout: Duration::from_millis(150) },
        compress: Compress::Auto,
        staging_bytes_max: Some(1 << 20),
        output_bytes_max: 1 << 20,
        output_packets_max: 1 << 10,
        control: "/nonexistent".into(),
        disks: Vec::new(),
        force_disk: false,
        guest_clock: Default::default(),
        console: ConsoleTo::None,
    }
}

/// Has an arbiter out of reach asked for a secondary's swap: why it did not answer, and the status
/// of the node that asked.
fn asked(arbiter: ArbiterConfig) -> (String, crate::control::status::NodeStatus) {
    let config = config(arbiter);
    let (events, inbox) = inbox();
    let status = StatusStore::new(&config, Role::Secondary);
    let noticed = {
        let status = status.clone();
        move |contact: Contact| status.arbiter_contacted(contact.lost)
    };
    let thread = ArbiterThread::start(open_arbiter(&config, false).unwrap(), events, noticed).unwrap();
    assert!(status.status().alarms.is_empty() && status.status().arbiter.reachable);
    let expected = Record::first(InstanceId(1)).next_paired(InstanceId(1), InstanceId(2));
    let new = expected.next_solo(InstanceId(2));
    thread.ask(ArbiterCall { ticket: 7, request: ArbiterRequest::Swap { expected: Some(expected), new } });
    let Next::Event(NodeEvent::Answer { ticket: 7, answer: ArbiterAnswer::Unreachable(why) }) = inbox.next(None) else {
        panic!("no answer, or the wrong one");
    };
    (why, status.status())
}

#[test]
fn each_kind_says_what_is_wrong_and_what_it_means() {
    // A port that is held and not listened on refuses connections, and nobody else can listen
    // there.
    let unheard = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    unheard.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let closed = format!("http://{}", unheard.local_addr().unwrap().as_socket().unwrap());
    let etcd = EtcdConfig {
        endpoints: vec![closed.clone()],
        prefix: "/mcd".into(),
        tls: None,
        login: None,
        timeout: WAIT_MAX,
    };
    let kinds = [
        (
            ArbiterConfig::File { directory: "/nonexistent/mcd".into(), timeout: WAIT_MAX },
            "file",
            "mount the shared storage",
        ),
        (ArbiterConfig::Etcd(etcd), "etcd", "check that the cluster has a quorum"),
        (
            ArbiterConfig::Command { script: "/nonexistent/fence".into(), timeout: WAIT_MAX },
            "command",
            "make it executable",
        ),
        (ArbiterConfig::None { on_peer_loss: OnPeerLoss::Wait }, "none", "told to wait"),
    ];
    for (arbiter, kind, what_to_do) in kinds {
        let (why, status) = asked(arbiter);
        assert!(why.contains(what_to_do) && !why.contains('\n'), "{kind}: {why}");
        assert_eq!(status.arbiter.kind, kind);
        assert!(!status.arbiter.reachable && status.arbiter.detail == why, "{kind}");
        let [alarm] = status.alarms.as_slice() else { panic!("{kind}: {:?}", status.alarms) };
        assert!(alarm.starts_with("arbiter out of reach: ") && alarm.contains(&why), "{alarm}");
        assert!(alarm.contains("cannot become protected until it answers"), "{alarm}");
        let screen = status.to_string();
        assert!(screen.contains("OUT OF REACH") && screen.contains("ALARM"), "{screen}");
    }
}

/// Answers reads by turns with an error and with nothing.
struct Moody {
    well: bool,
}

impl Arbiter for Moody {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        self.well = !self.well;
        let error = || ArbiterError::Unreachable { arbiter: self.describe(), why: "moody".into() };
        if self.well { Ok(None) } else { Err(error()) }
    }

    fn swap(&mut self, _: Option<&Record>, _: &Record) -> Result<Swap, ArbiterError> {
        Ok(Swap::Won)
    }

    fn describe(&self) -> String {
        "moody".into()
    }
}

#[test]
fn an_arbiter_that_nobody_asks_is_looked_at() {
    let (events, _inbox) = inbox();
    let (seen, looks) = unbounded();
    let noticed = move |contact: Contact| {
        // The test has seen enough.
        let _ = seen.send((contact.lost.is_some(), contact.event.map(|event| event.name())));
    };
    let watch = Duration::from_millis(1);
    let _thread = ArbiterThread::start_watching(Box::new(Moody { well: true }), events, watch, noticed).unwrap();
    let seen: Vec<_> = looks.iter().take(4).collect();
    let (lost, back) = ((true, Some("MC_ARBITER_LOST")), (false, Some("MC_ARBITER_BACK")));
    assert_eq!(seen, [lost, back, lost, back]);
}

/// Says what it was asked, and thinks until it may answer.
struct Slow {
    asked: Sender<&'static str>,
    may_answer: Receiver<()>,
}

impl Slow {
    fn think(&self, about: &'static str) {
        // The test may be over.
        let _ = self.asked.send(about);
        let _ = self.may_answer.recv();
    }
}

impl Arbiter for Slow {
    fn read(&mut self) -> Result<Option<Record>, ArbiterError> {
        self.think("read");
        Ok(None)
    }

    fn swap(&mut self, _: Option<&Record>, _: &Record) -> Result<Swap, ArbiterError> {
        self.think("swap");
        Ok(Swap::Won)
    }

    fn describe(&self) -> String {
        "slow".into()
    }
}

#[test]
fn a_swap_waits_for_no_read_that_nobody_wants_any_more() {
    let (events, inbox) = inbox();
    let ((asked, questions), (answer, may_answer)) = (unbounded(), unbounded());
    let watch = Duration::from_secs(600);
    let arbiter = Box::new(Slow { asked, may_answer });
    let thread = ArbiterThread::start_watching(arbiter, events, watch, |_| {}).unwrap();
    let expected = Record::first(InstanceId(1));
    let swap = ArbiterRequest::Swap { expected: Some(expected), new: expected.next_solo(InstanceId(2)) };
    thread.ask(ArbiterCall { ticket: 1, request: ArbiterRequest::Read });
    assert_eq!(questions.recv(), Ok("read"));
    thread.ask(ArbiterCall { ticket: 2, request: ArbiterRequest::Read });
    thread.ask(ArbiterCall { ticket: 3, request: swap });
    for ticket in [1, 3] {
        answer.send(()).unwrap();
        match inbox.next(None) {
            Next::Event(NodeEvent::Answer { ticket: answered, .. }) => assert_eq!(answered, ticket),
            _ => panic!("no answer to {ticket}"),
        }
    }
    assert_eq!(questions.try_iter().collect::<Vec<_>>(), ["swap"]);
}

#[test]
fn a_node_that_ends_does_not_wait_for_its_script() {
    if !Path::new("/usr/bin/yes").exists() {
        println!("skipped: there is no /usr/bin/yes to take for a script that never ends");
        return;
    }
    let config = config(ArbiterConfig::Command { script: "/usr/bin/yes".into(), timeout: Duration::from_secs(600) });
    let (events, inbox) = inbox();
    let thread = ArbiterThread::start(open_arbiter(&config, false).unwrap(), events, |_| {}).unwrap();
    let expected = Record::first(InstanceId(1)).next_paired(InstanceId(1), InstanceId(2));
    let request = ArbiterRequest::Swap { expected: Some(expected), new: expected.next_solo(InstanceId(2)) };
    thread.ask(ArbiterCall { ticket: 1, request });
    // Ends the run, or calls it off before it began.
    drop(thread);
    let Next::Event(NodeEvent::Answer { answer: ArbiterAnswer::Unreachable(why), .. }) = inbox.next(None) else {
        panic!("no answer, or the wrong one");
    };
    assert!(why.contains("this node is ending"), "{why}");
}
