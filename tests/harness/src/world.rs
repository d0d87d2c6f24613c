//! The world of a run: the hosts' network, the nodes, the arbiter's place, the clients and the
//! witness.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mcd::control::status::{NodeStatus, Role, State};
use mcd::demo::ask::answers_ping;
use mcd::demo::client::{Dial, Gauge, Tally, connect, monotonic_us};
use mcd::demo::load::{Load, LoadOptions, Phase};
use mcd::demo::namespaces::{GUEST_IPV4, HostName, Namespaces};
use mcd::demo::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::demo::rng::Rng;

use crate::capture::Capture;
use crate::cuts::Cuts;
use crate::place::Place;
use mcd::demo::trouble::Trouble;

/// The built-in guest's port.
const GUEST_PORT: u16 = 6379;
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

/// Everything there is.
pub struct World<'a> {
    /// What nodes are told, beside the arbiter.
    pub settings: NodeSettings,
    /// Heartbeat time-out of every node, in ms.
    pub timeout_ms: u64,
    /// Connections of the load.
    pub connections: usize,
    /// Decides everything that is left to chance.
    pub rng: Rng,
    /// The networks.
    pub namespaces: Arc<Namespaces>,
    /// The arbiter.
    pub place: Box<dyn Place + 'a>,
    /// What is broken between the hosts.
    pub cuts: Cuts,
    /// Judges every frame.
    pub capture: Capture,
    /// The clients, while there is a guest.
    pub session: Option<Session>,
    /// The host that runs the guest, as far as known.
    pub runner: HostName,
    /// Every change of that since the trial began.
    pub changes: Vec<HostName>,
    /// Takeovers that no fault explains: this machine stood still.
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

/// What a new world is made of.
pub struct Parts<'a> {
    /// See [`World::settings`].
    pub settings: NodeSettings,
    /// See [`World::timeout_ms`].
    pub timeout_ms: u64,
    /// See [`World::connections`].
    pub connections: usize,
    /// Decides everything that is left to chance.
    pub seed: u64,
    /// See [`World::namespaces`].
    pub namespaces: Arc<Namespaces>,
    /// See [`World::place`].
    pub place: Box<dyn Place + 'a>,
    /// See [`World::capture`].
    pub capture: Capture,
    /// Where sockets and logs are.
    pub dir: &'a RunDir,
    /// Set by a signal.
    pub stop: Arc<AtomicBool>,
}

impl<'a> World<'a> {
    /// A world in which nothing runs.
    pub fn new(parts: Parts<'a>) -> World<'a> {
        let Parts { settings, timeout_ms, connections, seed, namespaces, place, capture, dir, stop } = parts;
        World {
            settings,
            timeout_ms,
            connections,
            rng: Rng::new(seed),
            namespaces,
            place,
            cuts: Cuts::default(),
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
        mut check: impl FnMut(&mut World<'a>) -> Result<Option<T>, Trouble>,
    ) -> Result<T, Trouble> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(found) = check(self)? {
                return Ok(found);
            }
            if self.stop.load(Relaxed) {
                return Err(Trouble::Interrupted);
            }
            if Instant::now() >= deadline {
                let (limit_s, logs) = (limit.as_secs(), self.logs());
                return Err(Trouble::TooLate { what: what.to_owned(), limit_s, logs });
            }
            std::thread::park_timeout(LOOK);
        }
    }

    /// Lets some time pass that belongs to the play.
    pub fn pass(&mut self, time: Duration) -> Result<(), Trouble> {
        let end = Instant::now() + time;
        self.wait("time to pass", time + BOOT_LIMIT, |_| Ok((Instant::now() >= end).then_some(())))
    }

    /// The last lines of every node's log.
    pub fn logs(&self) -> String {
        let nodes = self.nodes.iter().flatten();
        nodes.map(|node| format!("\n--- the last lines of {}'s log:\n{}", node.name(), node.log_tail(16))).collect()
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
    pub fn start(&mut self, role: StartAs, host: HostName) -> Result<(), Trouble> {
        self.started += 1;
        let name = format!("{host}-{}", self.started);
        let settings = NodeSettings { arbiter: Some(self.place.flag(host)), ..self.settings.clone() };
        let node = Node::start(role, host, &name, &settings, &self.namespaces, self.dir)
            .map_err(Trouble::io("start a node"))?;
        self.place.started(host, node.pid()).map_err(Trouble::io("tell the arbiter of a node"))?;
        if let Some(place) = self.nodes.get_mut(index(host)) {
            *place = Some(node);
        }
        Ok(())
    }

    /// Sends a node SIGKILL and leaves it to be reaped by [`World::bury`].
    pub fn kill(&mut self, host: HostName) -> Result<(), Trouble> {
        let Some(node) = self.node(host) else { return Ok(()) };
        node.kill().map_err(Trouble::io("kill a node"))
    }

    /// Waits for the end of a killed node's process and forgets it.
    pub fn bury(&mut self, host: HostName) {
        if let Some(place) = self.nodes.get_mut(index(host)) {
            *place = None;
        }
    }

    /// Stops a node's process or lets it go on.
    pub fn freeze(&mut self, host: HostName, freeze: bool) -> Result<(), Trouble> {
        use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
        let signal = if freeze { SIGSTOP } else { SIGCONT };
        if let Some(place) = self.frozen.get_mut(index(host)) {
            *place = freeze;
        }
        let Some(node) = self.node(host) else { return Ok(()) };
        match node.signal(signal) {
            // A fencing script has ended it while it slept.
            Err(error) if !freeze && error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.map_err(Trouble::io(format!("send {signal} to a node"))),
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
    pub fn settle(&mut self) -> Result<(), Trouble> {
        self.wait("the guest to be protected again", RESYNC_LIMIT, |world| {
            if world.protected().is_some() {
                return Ok(Some(()));
            }
            if let Some((host, _)) = world.leader().filter(|(host, _)| *host != world.runner) {
                world.unplanned += 1;
                world.runs_on(host);
            }
            let other = world.runner.other();
            let gone = world.node(other).is_none_or(|node| node.ended().is_some());
            if gone || world.status(other).is_some_and(|status| status.role == Role::Fenced) {
                world.bury(other);
                world.start(StartAs::Secondary, other)?;
            }
            world.still_there(world.runner)?;
            Ok(None)
        })
    }

    /// Makes sure that the node that runs the guest has not ended.
    fn still_there(&mut self, host: HostName) -> Result<(), Trouble> {
        let Some(node) = self.node(host) else { return Ok(()) };
        match node.ended() {
            None => Ok(()),
            Some(status) => Err(Trouble::died(node, status)),
        }
    }

    // ---- the guest and its clients ----

    /// Boots the guest on `host` and opens the clients' connections.
    pub fn boot(&mut self, role: StartAs, host: HostName) -> Result<(), Trouble> {
        self.start(role, host)?;
        self.runner = host;
        let dial = self.dial();
        self.wait("the guest to boot and serve", BOOT_LIMIT, |world| {
            world.still_there(host)?;
            Ok(answers_ping(&dial).then_some(()))
        })?;
        let tally = Arc::new(Tally::default());
        let options =
            LoadOptions { connections: self.connections, seed: self.rng.next_u64(), ..LoadOptions::default() };
        let load = Load::open(&options, &dial, &tally).map_err(Trouble::io("connect to the guest"))?;
        load.ask(Phase::Run);
        self.session = Some(Session { tally, load });
        Ok(())
    }

    fn dial(&self) -> Dial {
        const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
        let namespaces = self.namespaces.clone();
        let address = SocketAddr::from((GUEST_IPV4, GUEST_PORT));
        Arc::new(move || -> io::Result<TcpStream> {
            namespaces.lan.run(|| connect(address, CONNECT_TIMEOUT)).map_err(io::Error::other)?
        })
    }

    /// The waiting times of the connections.
    pub fn gauges(&self) -> &[Arc<Gauge>] {
        self.session.as_ref().map_or(&[], |session| session.load.gauges())
    }

    /// Waits until no connection waits for an answer since before now.
    pub fn answered(&mut self) -> Result<(), Trouble> {
        let now_us = monotonic_us();
        self.wait("every connection to be answered again", ANSWER_LIMIT, |world| {
            Ok(world.gauges().iter().all(|gauge| !gauge.waits_since_before(now_us)).then_some(()))
        })
    }

    /// Brings the load to rest, reads back every key, and lets it run again.
    pub fn verify(&mut self) -> Result<(), Trouble> {
        for phase in [Phase::Hold, Phase::Verify, Phase::Run] {
            let reached = |world: &World<'_>| world.session.as_ref().is_none_or(|s| s.load.has_reached(phase));
            if let Some(session) = &self.session {
                session.load.ask(phase);
            }
            self.wait("every connection to come to rest", ANSWER_LIMIT, |world| Ok(reached(world).then_some(())))?;
        }
        Ok(())
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        // The clients first: they would only complain.
        self.session = None;
    }
}
