//! The pair that is broken: the hosts' network, the nodes, the arbiter, the clients and the traffic
//! checker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mcd::control::status::{NodeStatus, Role, State};
use mcd::testbed::client::{Dial, Gauge, Tally, monotonic_us};
use mcd::testbed::error::TestbedError;
use mcd::testbed::guest_client::connect_to_guest;
use mcd::testbed::guest_commands::answers_ping;
use mcd::testbed::load::{Load, LoadOptions, Phase};
use mcd::testbed::namespaces::{HostName, Namespaces};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::rng::Rng;
use mcd::testbed::wait::{WaitLimits, wait_on};

use crate::capture::Capture;
use crate::environment::ArbiterEnvironment;
use crate::partitions::Partitions;

/// How often a wait looks.
const LOOK: Duration = Duration::from_millis(2);
/// Longest wait for the guest to boot and serve.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a guest to be protected again.
pub const RESYNC_LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for a connection to be answered again: clients wait longer and longer before they
/// try again.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(90);

/// The clients of one guest's life.
pub struct Session {
    /// What they saw.
    pub tally: Arc<Tally>,
    /// They.
    pub load: Load,
}

/// A pair of nodes with everything around it.
pub struct TestPair<'a> {
    /// What nodes are told, beside the arbiter.
    pub settings: NodeSettings,
    /// Heartbeat timeout of every node, in ms.
    pub timeout_ms: u64,
    /// Connections of the load.
    pub connections: usize,
    /// Decides everything that is left to chance.
    pub rng: Rng,
    /// The networks.
    pub namespaces: Arc<Namespaces>,
    /// The arbiter.
    pub arbiter: Box<dyn ArbiterEnvironment + 'a>,
    /// What is broken between the hosts.
    pub partitions: Partitions,
    /// Checks every frame.
    pub capture: Capture,
    /// The clients, while there is a guest.
    pub session: Option<Session>,
    /// The host that runs the guest, as far as known.
    pub runner: HostName,
    /// Every change of that since the trial began.
    pub changes: Vec<HostName>,
    /// Takeovers that no fault explains: this machine was frozen.
    pub unplanned: u64,
    dir: &'a RunDir,
    stop: Arc<AtomicBool>,
    nodes: [Option<Node>; 2],
    frozen: [bool; 2],
    started: u32,
}

fn index(host: HostName) -> usize {
    match host {
        HostName::A => 0,
        HostName::B => 1,
    }
}

/// What a new pair is made of.
pub struct Parts<'a> {
    /// See [`TestPair::settings`].
    pub settings: NodeSettings,
    /// See [`TestPair::timeout_ms`].
    pub timeout_ms: u64,
    /// See [`TestPair::connections`].
    pub connections: usize,
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// See [`TestPair::namespaces`].
    pub namespaces: Arc<Namespaces>,
    /// See [`TestPair::arbiter`].
    pub arbiter: Box<dyn ArbiterEnvironment + 'a>,
    /// See [`TestPair::capture`].
    pub capture: Capture,
    /// Where sockets and logs are.
    pub dir: &'a RunDir,
    /// Set by a signal.
    pub stop: Arc<AtomicBool>,
}

impl<'a> TestPair<'a> {
    /// A pair in which nothing runs.
    pub fn new(parts: Parts<'a>) -> TestPair<'a> {
        let Parts { settings, timeout_ms, connections, seed, namespaces, arbiter, capture, dir, stop } = parts;
        TestPair {
            settings,
            timeout_ms,
            connections,
            rng: Rng::new(seed),
            namespaces,
            arbiter,
            partitions: Partitions::default(),
            capture,
            session: None,
            runner: HostName::A,
            changes: Vec::new(),
            unplanned: 0,
            dir,
            stop,
            nodes: [None, None],
            frozen: [false; 2],
            started: 0,
        }
    }

    /// Waits until `check` gives something.
    pub fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        check: impl FnMut(&mut TestPair<'a>) -> Result<Option<T>, TestbedError>,
    ) -> Result<T, TestbedError> {
        let interrupted =
            |pair: &mut TestPair<'a>| if pair.stop.load(Relaxed) { Err(TestbedError::Interrupted) } else { Ok(()) };
        let too_late = |pair: &mut TestPair<'a>| {
            let (limit_s, logs) = (limit.as_secs(), pair.logs());
            TestbedError::TooLate { what: what.to_owned(), limit_s, logs }
        };
        wait_on(self, WaitLimits { look: LOOK, limit }, check, interrupted, too_late)
    }

    /// Lets some time pass that belongs to the play.
    pub fn pass(&mut self, time: Duration) -> Result<(), TestbedError> {
        let end = Instant::now() + time;
        self.wait("time to pass", time + BOOT_LIMIT, |_| Ok((Instant::now() >= end).then_some(())))
    }

    /// The last lines of every node's log.
    pub fn logs(&self) -> String {
        let nodes = self.nodes.iter().flatten();
        nodes.map(Node::log_section).collect()
    }

    // ---- nodes ----

    /// The node on a host.
    pub fn node(&mut self, host: HostName) -> Option<&mut Node> {
        self.nodes.get_mut(index(host)).and_then(Option::as_mut)
    }

    /// What the node on a host says, if there is one that can speak.
    pub fn status(&mut self, host: HostName) -> Option<NodeStatus> {
        if self.frozen.get(index(host)).copied().unwrap_or(false) {
            return None;
        }
        self.node(host)?.status()
    }

    /// Starts a node.
    pub fn start(&mut self, role: StartAs, host: HostName) -> Result<(), TestbedError> {
        self.started += 1;
        let name = format!("{host}-{}", self.started);
        let settings = NodeSettings { arbiter: Some(self.arbiter.flag(host)), ..self.settings.clone() };
        let node = Node::start(role, host, &name, &settings, &self.namespaces, self.dir)
            .map_err(TestbedError::io("start a node"))?;
        self.arbiter.started(host, node.pid()).map_err(TestbedError::io("tell the arbiter of a node"))?;
        if let Some(place) = self.nodes.get_mut(index(host)) {
            *place = Some(node);
        }
        Ok(())
    }

    /// Sends a node SIGKILL and leaves it to be reaped by [`TestPair::bury`].
    pub fn kill(&mut self, host: HostName) -> Result<(), TestbedError> {
        let Some(node) = self.node(host) else { return Ok(()) };
        node.kill().map_err(TestbedError::io("kill a node"))
    }

    /// Waits for the end of a killed node's process and forgets it.
    pub fn bury(&mut self, host: HostName) {
        if let Some(place) = self.nodes.get_mut(index(host)) {
            *place = None;
        }
    }

    /// Stops a node's process or lets it go on.
    pub fn freeze(&mut self, host: HostName, freeze: bool) -> Result<(), TestbedError> {
        use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
        let signal = if freeze { SIGSTOP } else { SIGCONT };
        if let Some(place) = self.frozen.get_mut(index(host)) {
            *place = freeze;
        }
        let Some(node) = self.node(host) else { return Ok(()) };
        match node.signal(signal) {
            // A fencing script has ended it while it slept.
            Err(error) if !freeze && error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(TestbedError::io(format!("send {signal} to a node"))),
        }
    }

    /// Whether the node that runs the guest and the other one both call it protected; then its
    /// generation.
    pub fn protected(&mut self) -> Option<u64> {
        let runner = self.status(self.runner).filter(|s| s.protected && s.role == Role::Primary)?;
        let other = self.status(self.runner.other()).filter(|s| s.protected && s.role == Role::Secondary)?;
        (runner.generation == other.generation).then_some(runner.generation)
    }

    /// The host of a running primary, with what it says.
    pub fn leader(&mut self) -> Option<(HostName, NodeStatus)> {
        [self.runner, self.runner.other()].into_iter().find_map(|host| {
            let leads = |s: &NodeStatus| {
                s.role == Role::Primary && matches!(s.state, State::Solo | State::Resync | State::Protected)
            };
            Some((host, self.status(host).filter(leads)?))
        })
    }

    /// The guest is known to run on `host`.
    pub fn runs_on(&mut self, host: HostName) {
        if host != self.runner {
            self.runner = host;
            self.changes.push(host);
        }
    }

    /// Brings everything back: whoever is dead or fenced is started again as a secondary, and the
    /// guest is protected in the end.
    pub fn settle(&mut self) -> Result<(), TestbedError> {
        self.wait("the guest to be protected again", RESYNC_LIMIT, |pair| {
            if pair.protected().is_some() {
                return Ok(Some(()));
            }
            if let Some((host, _)) = pair.leader().filter(|(host, _)| *host != pair.runner) {
                pair.unplanned += 1;
                pair.runs_on(host);
            }
            let other = pair.runner.other();
            let gone = pair.node(other).is_none_or(|node| node.ended().is_some());
            if gone || pair.status(other).is_some_and(|status| status.role == Role::Fenced) {
                pair.bury(other);
                pair.start(StartAs::Secondary, other)?;
            }
            pair.still_there(pair.runner)?;
            Ok(None)
        })
    }

    /// Makes sure that the node that runs the guest has not ended.
    fn still_there(&mut self, host: HostName) -> Result<(), TestbedError> {
        let Some(node) = self.node(host) else { return Ok(()) };
        match node.ended() {
            None => Ok(()),
            Some(status) => Err(TestbedError::died(node, status)),
        }
    }

    // ---- the guest and its clients ----

    /// Boots the guest on `host` and opens the clients' connections.
    pub fn boot(&mut self, role: StartAs, host: HostName) -> Result<(), TestbedError> {
        self.start(role, host)?;
        self.runner = host;
        let dial = self.dial();
        self.wait("the guest to boot and serve", BOOT_LIMIT, |pair| {
            pair.still_there(host)?;
            Ok(answers_ping(&dial).then_some(()))
        })?;
        let tally = Arc::new(Tally::default());
        let options =
            LoadOptions { connections: self.connections, seed: self.rng.next_u64(), ..LoadOptions::default() };
        let load = Load::open(&options, &dial, &tally).map_err(TestbedError::io("connect to the guest"))?;
        load.ask(Phase::Run);
        self.session = Some(Session { tally, load });
        Ok(())
    }

    fn dial(&self) -> Dial {
        const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
        let namespaces = self.namespaces.clone();
        Arc::new(move || connect_to_guest(&namespaces.lan, CONNECT_TIMEOUT))
    }

    /// The waiting times of the connections.
    pub fn gauges(&self) -> &[Arc<Gauge>] {
        self.session.as_ref().map_or(&[], |session| session.load.gauges())
    }

    /// Waits until no connection waits for an answer since before now.
    pub fn answered(&mut self) -> Result<(), TestbedError> {
        let now_us = monotonic_us();
        self.wait("every connection to be answered again", ANSWER_LIMIT, |pair| {
            Ok(pair.gauges().iter().all(|gauge| !gauge.waits_since_before(now_us)).then_some(()))
        })
    }

    /// Brings the load to rest, reads back every key, and lets it run again.
    pub fn verify(&mut self) -> Result<(), TestbedError> {
        for phase in [Phase::Hold, Phase::Verify, Phase::Run] {
            let reached = |pair: &TestPair<'_>| pair.session.as_ref().is_none_or(|s| s.load.has_reached(phase));
            if let Some(session) = &self.session {
                session.load.ask(phase);
            }
            self.wait("every connection to come to rest", ANSWER_LIMIT, |pair| Ok(reached(pair).then_some(())))?;
        }
        Ok(())
    }
}

impl Drop for TestPair<'_> {
    fn drop(&mut self) {
        // The clients first: they would only complain.
        self.session = None;
    }
}
