//! The lab as a scenario has it: the hosts, their nodes, the arbiter, and the clients who must not
//! notice anything.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use mcd::control::status::{NodeStatus, Role};
use mcd::testbed::client::{Dial, Gauge, Tally, monotonic_us};
use mcd::testbed::error::TestbedError;
use mcd::testbed::etcd::EtcdProcess;
use mcd::testbed::guest_client::connect_to_guest;
use mcd::testbed::guest_commands::answers_ping;
use mcd::testbed::load::{Load, LoadOptions, Phase};
use mcd::testbed::namespaces::{CLIENT_IPV4, GUEST_IPV4, HostName, Namespace};
use mcd::testbed::wait::{WaitLimits, wait_on};

use crate::benchmark::Benchmark;
use crate::channel::Output;
use crate::disk::Disks;
use crate::error::LabError;
use crate::etcd;
use crate::guest::Guest;
use crate::host::{COMMAND_LIMIT, Host, Site};
use crate::report::Clients;
use crate::time_server::TimeServer;

/// The nodes' port on the link.
const NODE_PORT: u16 = 7401;
/// How often a wait looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long a host may take from its power on until it is up.
const HOST_BOOT_LIMIT: Duration = Duration::from_secs(180);
/// How long a node may take to come to a decision.
pub const DECISION_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take until a guest is protected.
const RESYNC_LIMIT: Duration = Duration::from_secs(240);
/// How long a connection may take to be answered again: clients wait longer and longer before they
/// try again.
const ANSWER_LIMIT: Duration = Duration::from_secs(90);
/// How long a redis-benchmark may take.
const BENCHMARK_LIMIT: Duration = Duration::from_secs(300);
/// What a host's console says when its node ends; its exit status follows.
const NODE_ENDED: &str = "lab: the node ended with";
/// An emulated host with two cores between all of them freezes now and then; suspicion must
/// allow for that.
const NODE_FLAGS: &str = "--heartbeat-interval-ms 1000 --heartbeat-timeout-ms 4000 --arbiter-timeout-ms 5000 \
                          --interval-ms 50 --staging-max 320M";

/// The clients of a guest's life.
struct Session {
    tally: Arc<Tally>,
    load: Load,
}

/// The lab.
pub struct Lab {
    guest: Guest,
    connections: usize,
    site: Arc<Site>,
    disks: Disks,
    _arbiter: EtcdProcess,
    _time: TimeServer,
    stop: Arc<AtomicBool>,
    session: Option<Session>,
    hosts: [Option<Host>; 2],
    lives: [u32; 2],
    /// From which line of each host's console on its node must not end.
    nodes_since: [Option<usize>; 2],
    /// The host that runs the guest.
    pub runner: HostName,
}

fn index(host: HostName) -> usize {
    match host {
        HostName::A => 0,
        HostName::B => 1,
    }
}

/// Whether a console's line is this event of a node.
fn is_event(line: &str, event: &str) -> bool {
    line.contains(&format!("event=\"{event}\""))
}

impl Lab {
    /// A lab with an arbiter, in which no host has power.
    pub fn new(guest: Guest, connections: usize, site: Arc<Site>, stop: Arc<AtomicBool>) -> Result<Lab, LabError> {
        let arbiter = etcd::start(&site.network, &site.sockets)?;
        let time = TimeServer::start(&site.network)?;
        let disks = Disks::make(&site.disks, HostName::A)?;
        Ok(Lab {
            guest,
            connections,
            site,
            disks,
            _arbiter: arbiter,
            _time: time,
            stop,
            session: None,
            hosts: [None, None],
            lives: [0; 2],
            nodes_since: [None; 2],
            runner: HostName::A,
        })
    }

    /// Waits until `check` gives something.
    pub fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        check: impl FnMut(&mut Lab) -> Result<Option<T>, LabError>,
    ) -> Result<T, LabError> {
        let too_late = |lab: &mut Lab| {
            let (what, logs) = (what.to_owned(), lab.tails());
            TestbedError::TooLate { what, limit_s: limit.as_secs(), logs }.into()
        };
        wait_on(self, WaitLimits { look: LOOK, limit }, check, |lab| lab.check_hosts(what), too_late)
    }

    /// An error if a signal came, a host has lost its power, or a node has ended by itself.
    fn check_hosts(&mut self, waited_for: &str) -> Result<(), LabError> {
        if self.stop.load(Relaxed) {
            return Err(TestbedError::Interrupted.into());
        }
        for host in self.hosts.iter_mut().flatten() {
            host.check_power()?;
        }
        let Some(line) = self.node_that_ended() else { return Ok(()) };
        self.wait_consoles_quiet();
        Err(LabError::Wrong(format!("waited for {waited_for}, but {line}{}", self.tails())))
    }

    fn tails(&self) -> String {
        self.hosts.iter().flatten().map(|host| format!("\nhost {}:{}", host.name(), host.console().tail())).collect()
    }

    /// What the console says of a node that has ended although nobody ended it.
    fn node_that_ended(&self) -> Option<String> {
        self.hosts.iter().zip(self.nodes_since).find_map(|(host, since)| {
            let line = host.as_ref()?.console().find(since?, |line| line.starts_with(NODE_ENDED))?;
            Some(format!("on host {}: {line}", host.as_ref()?.name()))
        })
    }

    /// Waits until no host says anything any more: what a guest said last comes through slow lines.
    fn wait_consoles_quiet(&self) {
        const QUIET: Duration = Duration::from_secs(1);
        const LIMIT: Duration = Duration::from_secs(15);
        let began = Instant::now();
        let (mut heard, mut since) = (self.marks(), began);
        while since.elapsed() < QUIET && began.elapsed() < LIMIT {
            std::thread::park_timeout(LOOK);
            let now = self.marks();
            if now != heard {
                (heard, since) = (now, Instant::now());
            }
        }
    }

    /// A host that has power.
    pub fn host(&mut self, name: HostName) -> Result<&mut Host, LabError> {
        let missing = || LabError::Wrong(format!("host {name} has no power"));
        self.hosts.get_mut(index(name)).and_then(Option::as_mut).ok_or_else(missing)
    }

    /// A position in the consoles from which [`Lab::event_line`] looks.
    pub fn marks(&self) -> [usize; 2] {
        self.hosts.each_ref().map(|host| host.as_ref().map_or(0, |host| host.console().mark()))
    }

    /// The line of `event` in the log of the node on this host, since `marks`.
    pub fn event_line(&self, marks: [usize; 2], name: HostName, event: &str) -> Option<String> {
        let console = self.hosts.get(index(name))?.as_ref()?.console();
        console.find(*marks.get(index(name))?, |line| is_event(line, event))
    }

    /// Switches hosts on that have no power, all at once, and waits until they are up.
    pub fn power_on(&mut self, names: &[HostName]) -> Result<(), LabError> {
        let has_none = |name: &HostName| self.hosts.get(index(*name)).is_some_and(Option::is_none);
        let fresh: Vec<HostName> = names.iter().copied().filter(has_none).collect();
        for &name in &fresh {
            self.lives[index(name)] += 1;
            self.hosts[index(name)] =
                Some(Host::power_on(name, self.lives[index(name)], &self.site, &self.disks.of(name))?);
        }
        for name in fresh {
            self.wait("a host to boot", HOST_BOOT_LIMIT, |lab| {
                let host = lab.host(name)?;
                let fault = |line| LabError::Wrong(format!("host {name}: {line}{}", host.console().tail()));
                host.fault().map_or(Ok(host.is_up().then_some(())), |line| Err(fault(line)))
            })?;
            let host = self.host(name)?;
            host.wait_shell()?;
            host.set_clock()?;
        }
        Ok(())
    }

    /// Cuts a host's power.
    pub fn cut_power(&mut self, name: HostName) -> Result<(), LabError> {
        self.nodes_since[index(name)] = None;
        let host = self.hosts.get_mut(index(name)).and_then(Option::take);
        host.map_or(Ok(()), Host::cut_power)
    }

    fn node_command(&self, name: HostName, role: &str) -> String {
        let (arbiter, listen) = (etcd::flag(), SocketAddr::from((name.link_ipv4(), NODE_PORT)));
        let flags = format!("--guest lab --tap mcd0 --listen {listen} --arbiter {arbiter} {NODE_FLAGS}");
        format!("mcd {role} {flags} {} --console socket", self.guest.node_flags())
    }

    /// Makes sure that a node started by the command `role` on a host ends at once because of its
    /// disk; what it says.
    pub fn refused_start(&mut self, name: HostName, role: &str) -> Result<String, LabError> {
        let command = self.node_command(name, &format!("{role} {}", self.guest.boot_flags()));
        let Output { code, text } = self.host(name)?.try_run(&command, COMMAND_LIMIT)?;
        match text.lines().find(|line| line.starts_with("mcd: disk image")) {
            Some(line) if code != 0 => Ok(line.to_owned()),
            _ => Err(LabError::Wrong(format!(
                "host {name} should have refused its image, but ended with {code}: {text}"
            ))),
        }
    }

    /// Starts a node on a host; its log is on the host's console.
    fn start_node(&mut self, name: HostName, role: &str) -> Result<(), LabError> {
        let node = self.node_command(name, role);
        // Through a pipe: the node must not wait for the console.
        let node =
            format!("({node}; printf '\\n{NODE_ENDED} %s\\n' $?) </dev/null 2>&1 | cat >/dev/ttyS0 2>/dev/null &");
        // What the guest says is of use to whoever reads the log.
        let guest = "(for look in $(seq 100); do sleep 0.1; mcd console --guest lab && break; done) \
            </dev/null >/dev/ttyS0 2>/dev/null &";
        let command = format!("{node} {guest}");
        let mark = self.marks()[index(name)];
        self.host(name)?.run(&command, COMMAND_LIMIT)?;
        self.nodes_since[index(name)] = Some(mark);
        Ok(())
    }

    /// Boots the guest on a host and lets the clients in.
    pub fn start_guest(&mut self, name: HostName) -> Result<(), LabError> {
        self.boot_guest(name, "primary")?;
        let dial = self.dial();
        let tally = Arc::new(Tally::default());
        let options = LoadOptions {
            connections: self.connections,
            pipeline_max: 8,
            think_us_max: 50_000,
            ..LoadOptions::default()
        };
        let load = Load::open(&options, &dial, &tally).map_err(LabError::io("connect to the guest"))?;
        load.ask(Phase::Run);
        self.session = Some(Session { tally, load });
        Ok(())
    }

    /// Boots the guest on a host by the command `role`, and waits until it serves.
    pub fn boot_guest(&mut self, name: HostName, role: &str) -> Result<(), LabError> {
        self.start_node(name, &format!("{role} {}", self.guest.boot_flags()))?;
        self.runner = name;
        self.wait_guest_answers()
    }

    /// Waits until the guest's server answers.
    pub fn wait_guest_answers(&mut self) -> Result<(), LabError> {
        let dial = self.dial();
        self.wait("the guest to boot and serve", self.guest.boot_limit(), |_| Ok(answers_ping(&dial).then_some(())))
    }

    /// Whether the guest's server answers a new client.
    pub fn guest_serves(&self) -> bool {
        answers_ping(&self.dial())
    }

    /// Which guest it is about.
    pub fn guest(&self) -> Guest {
        self.guest
    }

    /// What the clients are in, and the guest with them.
    pub fn network(&self) -> Arc<Namespace> {
        self.site.network.clone()
    }

    fn dial(&self) -> Dial {
        const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
        let network = self.site.network.clone();
        Arc::new(move || connect_to_guest(&network, CONNECT_TIMEOUT))
    }

    /// Starts a redis-benchmark.
    pub fn start_benchmark(&self) -> Result<Benchmark, LabError> {
        Benchmark::start(&self.site.network, &self.site.logs, self.guest.benchmark_requests())
    }

    /// Waits until a redis-benchmark has ended well, and checks what it counted.
    pub fn finish_benchmark(&mut self, mut benchmark: Benchmark) -> Result<(), LabError> {
        self.wait("redis-benchmark to end", BENCHMARK_LIMIT, |_| Ok(benchmark.is_over()?.then_some(())))?;
        benchmark.check_counter(&self.site.network)
    }

    /// Starts a secondary on the host that does not run the guest.
    pub fn start_secondary(&mut self) -> Result<(), LabError> {
        let (host, peer) = (self.runner.other(), SocketAddr::from((self.runner.link_ipv4(), NODE_PORT)));
        self.start_node(host, &format!("secondary --peer {peer}"))
    }

    /// Waits until both nodes say that the guest is protected.
    pub fn wait_protected(&mut self, marks: [usize; 2]) -> Result<(), LabError> {
        for name in [self.runner, self.runner.other()] {
            self.wait("the guest to be protected", RESYNC_LIMIT, |lab| {
                Ok(lab.event_line(marks, name, "MC_PROTECTED").map(drop))
            })?;
        }
        let status = self.status(self.runner)?;
        let is_so = status.protected && status.running;
        if is_so {
            Ok(())
        } else {
            Err(LabError::Wrong(format!("host {}'s node does not say so:\n{status}", self.runner)))
        }
    }

    /// What the node on a host says of itself.
    pub fn status(&mut self, name: HostName) -> Result<NodeStatus, LabError> {
        let text = self.host(name)?.run("mcd status --json", COMMAND_LIMIT)?;
        let garbled =
            |error| LabError::Garbled { host: name.to_string(), what: format!("mcd status: {error}: {text}") };
        serde_json::from_str(&text).map_err(garbled)
    }

    /// Makes sure that exactly the node of `runner` runs the guest.
    pub fn expect_one_runner(&mut self) -> Result<(), LabError> {
        for name in [HostName::A, HostName::B] {
            if self.hosts.get(index(name)).is_none_or(Option::is_none) {
                continue;
            }
            let status = self.status(name)?;
            if status.running != (name == self.runner) || (status.role == Role::Primary) != (name == self.runner) {
                return Err(LabError::Wrong(format!(
                    "host {} should run the guest, but host {name} says:\n{status}",
                    self.runner
                )));
            }
        }
        Ok(())
    }

    /// Ends the node of a host whose guest is not there, and waits for its end.
    pub fn end_node(&mut self, name: HostName) -> Result<(), LabError> {
        let marks = self.marks();
        self.nodes_since[index(name)] = None;
        self.host(name)?.run("kill $(pidof mcd)", COMMAND_LIMIT)?;
        self.wait_node_end(marks, name).map(drop)
    }

    fn gauges(&self) -> impl Iterator<Item = &Arc<Gauge>> {
        self.session.iter().flat_map(|session| session.load.gauges())
    }

    /// How long each client has not been answered, for people.
    pub fn silences(&self) -> String {
        let line =
            |(number, gauge): (usize, &Arc<Gauge>)| format!("client {number}: {} ms\n", gauge.silence_us() / 1000);
        self.gauges().enumerate().map(line).collect()
    }

    /// Where the scenario's logs go.
    pub fn logs(&self) -> &Path {
        &self.site.logs
    }

    /// Forgets how long clients have waited, and tells the time.
    pub fn begin(&mut self) -> u64 {
        self.gauges().for_each(|gauge| gauge.reset());
        monotonic_us()
    }

    /// Waits until every client has been answered after `since_us`. Returns the longest silence any
    /// of them saw, in ms.
    pub fn wait_answers(&mut self, since_us: u64) -> Result<u64, LabError> {
        self.wait("every client to be answered", ANSWER_LIMIT, |lab| {
            Ok((lab.has_complaints() || lab.gauges().all(|gauge| gauge.last_reply_us() > since_us)).then_some(()))
        })?;
        Ok(self.gauges().map(|gauge| gauge.silence_us()).max().unwrap_or(0) / 1000)
    }

    /// Waits until the guest has served a while: so many replies.
    pub fn wait_served(&mut self, replies: u64) -> Result<(), LabError> {
        let wanted = self.replies() + replies;
        self.wait("the guest to serve its clients", ANSWER_LIMIT, |lab| {
            Ok((lab.has_complaints() || lab.replies() >= wanted).then_some(()))
        })
    }

    /// Whether a client has noticed anything: then there is nothing more to wait for.
    fn has_complaints(&self) -> bool {
        self.session.as_ref().is_some_and(|session| !session.tally.is_clean())
    }

    /// An error with the clients' complaints, if there are any.
    pub fn check_clients(&self) -> Result<(), LabError> {
        if self.has_complaints() { Err(self.complaints()) } else { Ok(()) }
    }

    fn complaints(&self) -> LabError {
        let lines = self.session.as_ref().map(|session| session.tally.complaints.lock().join("\n  "));
        LabError::Wrong(format!("clients noticed:\n  {}", lines.unwrap_or_default()))
    }

    /// Brings the clients to `phase`.
    pub fn bring_clients_to(&mut self, phase: Phase) -> Result<(), LabError> {
        if let Some(session) = &self.session {
            session.load.ask(phase);
        }
        self.wait("every client to come to rest", ANSWER_LIMIT, |lab| {
            Ok(lab.session.as_ref().is_none_or(|session| session.load.has_reached(phase)).then_some(()))
        })
    }

    /// Lets the clients read every key back over the connections they have, and then leaves them at
    /// rest. Returns how many replies that were.
    pub fn read_back(&mut self) -> Result<u64, LabError> {
        self.bring_clients_to(Phase::Hold)?;
        let before = self.replies();
        self.bring_clients_to(Phase::Verify)?;
        self.check_clients()?;
        self.some_replies_since(before)
    }

    /// The same over new connections, for a server that was started anew. What happened to the old
    /// connections does not matter, nor to writes that were on their way.
    pub fn read_back_anew(&mut self) -> Result<u64, LabError> {
        let seen = |lab: &Lab| {
            let tally = lab.session.as_ref().map(|session| Clients::of(&session.tally));
            tally.map_or((0, 0), |seen| (seen.lost_writes, seen.wrong_replies))
        };
        self.bring_clients_to(Phase::Hold)?;
        let before = self.replies();
        self.bring_clients_to(Phase::VerifyAnew)?;
        if seen(self) != (0, 0) {
            return Err(self.complaints());
        }
        self.some_replies_since(before)
    }

    fn some_replies_since(&self, before: u64) -> Result<u64, LabError> {
        match self.replies() - before {
            0 => Err(LabError::Wrong("no key was read back: there is nothing to compare with".to_owned())),
            replies => Ok(replies),
        }
    }

    fn replies(&self) -> u64 {
        self.session.as_ref().map_or(0, |session| session.tally.replies.load(Relaxed))
    }

    /// What the clients saw so far.
    pub fn clients(&self) -> Option<Clients> {
        self.session.as_ref().map(|session| Clients::of(&session.tally))
    }

    /// From now on nodes may end.
    pub fn let_nodes_end(&mut self) -> [usize; 2] {
        self.nodes_since = [None; 2];
        self.marks()
    }

    /// Waits until the node of a host has ended since `marks`; its exit status.
    pub fn wait_node_end(&mut self, marks: [usize; 2], name: HostName) -> Result<String, LabError> {
        self.wait("a node to end", DECISION_LIMIT, |lab| {
            let line = lab.host(name)?.console().find(marks[index(name)], |line| line.starts_with(NODE_ENDED));
            Ok(line.map(|line| line.trim_start_matches(NODE_ENDED).trim().to_owned()))
        })
    }

    /// What a person needs to look around.
    pub fn access_instructions(&self) -> String {
        let mut text = format!("clients' network: nsenter --net={}\n", self.site.network.path().display());
        text.push_str(&format!("the guest: redis-cli -h {GUEST_IPV4}; the arbiter: etcd at {CLIENT_IPV4}\n"));
        for host in self.hosts.iter().flatten() {
            text.push_str(&format!("host {}: mcd-lab --attach {}\n", host.name(), host.shell_path().display()));
        }
        text
    }
}
