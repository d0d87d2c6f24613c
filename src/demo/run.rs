//! The demo proper: protect a guest, put a checked load on it, kill its host again and again, say
//! what came of it.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::error::DemoError;
use super::report::{ClientReport, EpochSamples, EpochShape, EpochsReport, LatencyReport, Pair, Report, Round};
use super::screen::{Moment, Screen};
use crate::control::status::{EpochCounts, NodeStatus, Role};
use crate::testbed::client::{Dial, Gauge, Tally};
use crate::testbed::error::{TestbedError, catch_signals};
use crate::testbed::guest_client::connect_to_guest;
use crate::testbed::guest_commands::{answers_ping, start_dirty_load};
use crate::testbed::load::{Load, LoadOptions, Phase};
use crate::testbed::namespaces::{self, HostName, Namespaces};
use crate::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use crate::testbed::probe::{Probe, ProbeMode};
use crate::testbed::rng::Rng;
use crate::testbed::wait::{WaitLimits, wait_on};

/// How often a wait looks, and so the precision of `resync_ms`.
pub(super) const LOOK: Duration = Duration::from_millis(5);
/// How often the nodes are asked for their epochs.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(250);
/// How long a latency is measured.
const MEASURE: Duration = Duration::from_secs(2);
/// How often the probe asks while the load runs.
const WATCH_INTERVAL: Duration = Duration::from_millis(20);

/// How long the load runs on after the last round.
const LINGER: Duration = Duration::from_millis(500);

/// Longest wait for the guest to boot and serve.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// Longest wait for a resync, on top of [`RESYNC_LIMIT_PER_GIB`].
pub(super) const RESYNC_LIMIT: Duration = Duration::from_secs(60);
const RESYNC_LIMIT_PER_GIB: Duration = Duration::from_secs(30);
/// Longest wait for a connection to be answered again.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(90);

/// What the demo is asked to do.
#[derive(Clone, Debug)]
pub struct DemoOptions {
    /// How often the primary is killed.
    pub rounds: u32,
    /// Where the report is written as JSON.
    pub json: Option<PathBuf>,
    /// Leave the pair up at the end, until a signal.
    pub interactive: bool,
    /// The seed of every random choice; another each time if not given.
    pub seed: Option<u64>,
    /// Connections of the load.
    pub connections: u32,
    /// The guest's memory, in MiB.
    pub memory_mib: u32,
    /// The guest's vCPUs.
    pub cpus: u8,
    /// The longest an epoch may last, in ms.
    pub interval_ms: u64,
    /// Time between two heartbeats of the nodes, in ms; the timeout is three times that.
    pub heartbeat_interval_ms: u64,
    /// Pages the guest writes, and page writes per second.
    pub dirty: Option<(u32, u32)>,
    /// Keep the nodes' logs.
    pub keep_logs: bool,
}

/// Runs the demo. What it finds is printed; the exit code is 0 only if no client noticed anything.
///
/// Call it from the main thread, before others are started: without root it moves the process into
/// a user namespace.
pub fn run(options: DemoOptions) -> ExitCode {
    match run_to_report(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mcd: demo: {error}");
            error.exit_code()
        }
    }
}

fn run_to_report(options: &DemoOptions) -> Result<bool, DemoError> {
    let stop = catch_signals().map_err(DemoError::io("watch for signals"))?;
    namespaces::gain_rights().map_err(TestbedError::from)?;
    fs::File::options().read(true).write(true).open("/dev/kvm").map_err(DemoError::NoKvm)?;
    let seed = match options.seed {
        Some(seed) => seed,
        None => getrandom::u64().map_err(|e| DemoError::io("get a random seed")(io::Error::other(e)))?,
    };
    let mut dir = RunDir::new().map_err(DemoError::io("make a directory for the run"))?;
    if options.keep_logs {
        dir.keep();
    }
    let namespaces = Arc::new(Namespaces::new().map_err(TestbedError::from)?);
    let mut demo = Demo::start(options, seed, stop, namespaces, &dir)?;
    let report = demo.play()?;
    demo.screen.say(format_args!("done\n\n{report}"));
    if let Some(path) = &options.json {
        let text = serde_json::to_string_pretty(&report).map_err(|e| DemoError::io("write the report")(e.into()))?;
        fs::write(path, text + "\n").map_err(DemoError::io(format!("write the report to {}", path.display())))?;
    }
    if options.keep_logs {
        println!("the nodes' logs are in {}", dir.path().display());
    }
    if options.interactive {
        demo.stay_interactive()?;
    }
    Ok(report.ok)
}

pub(super) struct Demo<'a> {
    pub(super) options: &'a DemoOptions,
    settings: NodeSettings,
    seed: u64,
    pub(super) rng: Rng,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) namespaces: Arc<Namespaces>,
    dir: &'a RunDir,
    nodes_started: u32,
    /// Takeovers that nobody ordered.
    pub(super) unplanned: u32,
    /// Runs the guest.
    pub(super) primary: Node,
    pub(super) secondary: Option<Node>,
    /// What the primary said last.
    pub(super) status: Option<NodeStatus>,
    sampled: Instant,
    epochs: EpochSamples,
    /// The epochs of nodes that are gone.
    counts: EpochCounts,
    wire_bytes: u64,
    /// Being collected, or collected.
    quiet: Option<EpochSamples>,
    tally: Arc<Tally>,
    pub(super) probe: Option<Probe>,
    pub(super) load: Option<Load>,
    latency: LatencyReport,
    pub(super) screen: Screen,
}

impl<'a> Demo<'a> {
    fn start(
        options: &'a DemoOptions,
        seed: u64,
        stop: Arc<AtomicBool>,
        namespaces: Arc<Namespaces>,
        dir: &'a RunDir,
    ) -> Result<Demo<'a>, DemoError> {
        let &DemoOptions { memory_mib, cpus, interval_ms, .. } = options;
        let flags = vec!["--heartbeat-interval-ms".to_owned(), options.heartbeat_interval_ms.to_string()];
        let settings = NodeSettings { memory_mib, cpus, interval_ms, flags, ..NodeSettings::default() };
        let screen = Screen::new();
        screen.say(format_args!(
            "a guest with {memory_mib} MiB and {cpus} vCPU, epochs of at most {interval_ms} ms; \
                --seed {seed} repeats the choices"
        ));
        let primary = Node::start(StartAs::Primary, HostName::A, "a-1", &settings, &namespaces, dir)
            .map_err(DemoError::io("start a node"))?;
        Ok(Demo {
            options,
            settings,
            seed,
            rng: Rng::new(seed),
            stop,
            namespaces,
            dir,
            nodes_started: 1,
            unplanned: 0,
            primary,
            secondary: None,
            status: None,
            sampled: Instant::now(),
            epochs: EpochSamples::new(),
            counts: EpochCounts::default(),
            wire_bytes: 0,
            quiet: None,
            tally: Arc::default(),
            probe: None,
            load: None,
            latency: LatencyReport::default(),
            screen,
        })
    }

    /// The whole play, from the first boot to the last check.
    fn play(&mut self) -> Result<Report, DemoError> {
        let dial = self.dial();
        self.wait("the guest to boot and serve", BOOT_LIMIT, |_| Ok(answers_ping(&dial).then_some(())))?;
        self.screen.say("host a runs the guest, which serves; nothing protects it yet");
        let probe = Probe::open(&dial, &self.tally, WATCH_INTERVAL).map_err(DemoError::io("connect to the guest"))?;
        self.probe = Some(probe);
        if let Some((pages, per_second)) = self.options.dirty {
            start_dirty_load(&dial, pages, per_second).map_err(DemoError::io("make the guest write memory"))?;
        }
        self.latency.solo = self.measure()?;
        self.protect()?;
        let quiet = match self.options.dirty {
            Some(_) => Some(self.steadily(Demo::watch_quiet_epochs)?),
            None => None,
        };
        self.latency.protected = self.steadily(Demo::measure)?;

        let load =
            LoadOptions { connections: self.options.connections as usize, seed: self.seed, ..LoadOptions::default() };
        let load = Load::open(&load, &dial, &self.tally).map_err(DemoError::io("connect to the guest"))?;
        load.ask(Phase::Run);
        self.load = Some(load);
        self.steadily(|demo| demo.probe_mode(ProbeMode::Watch))?;
        self.screen
            .say(format_args!("{} connections now read and write; every reply is checked", self.options.connections));

        let mut rounds = Vec::new();
        for number in 1..=self.options.rounds {
            self.steadily(|demo| demo.come_to_the_moment())?;
            let round = self.kill(number)?;
            rounds.push(Round { resync_ms: self.steadily(Demo::protect)?, ..round });
        }
        self.steadily(|demo| demo.pass(LINGER))?;
        self.steadily(Demo::verify)?;
        Ok(self.report(rounds, quiet))
    }

    fn dial(&self) -> Dial {
        const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
        let namespaces = self.namespaces.clone();
        Arc::new(move || connect_to_guest(&namespaces.lan, CONNECT_TIMEOUT))
    }

    /// Waits until `check` gives something; meanwhile the nodes are watched and the screen is kept
    /// going.
    pub(super) fn wait<T>(
        &mut self,
        what: &str,
        limit: Duration,
        check: impl FnMut(&mut Demo<'a>) -> Result<Option<T>, DemoError>,
    ) -> Result<T, DemoError> {
        let limits = WaitLimits { look: LOOK, limit };
        wait_on(self, limits, check, Demo::tick, |demo| demo.too_late(what, limit))
    }

    /// Lets some time pass, which belongs to the play: a measurement, or a guest's life until it is
    /// killed.
    pub(super) fn pass(&mut self, time: Duration) -> Result<(), DemoError> {
        let end = Instant::now() + time;
        self.wait("time to pass", time * 2 + RESYNC_LIMIT, |_| Ok((Instant::now() >= end).then_some(())))
    }

    /// What has to be looked at all the time.
    fn tick(&mut self) -> Result<(), DemoError> {
        if self.stop.load(Relaxed) {
            return Err(TestbedError::Interrupted.into());
        }
        if let Some(status) = self.primary.ended() {
            return Err(TestbedError::died(&self.primary, status).into());
        }
        if let Some(node) = &mut self.secondary
            && let Some(status) = node.ended()
        {
            return Err(TestbedError::died(node, status).into());
        }
        if self.primary_is_fenced() {
            return Err(DemoError::Fenced);
        }
        if self.screen.is_due() {
            self.line();
        }
        Ok(())
    }

    /// Takes samples when they are due, and sees whether the other node has been given the guest.
    pub(super) fn primary_is_fenced(&mut self) -> bool {
        if self.sampled.elapsed() >= SAMPLE_INTERVAL {
            self.sample();
        }
        self.status.as_ref().is_some_and(|status| status.role == Role::Fenced)
    }

    /// Takes the primary's newest epochs.
    pub(super) fn sample(&mut self) {
        self.sampled = Instant::now();
        if let Some(reply) = self.primary.new_epochs() {
            self.epochs.add(&reply.epochs);
            self.screen.add(&reply.epochs);
            if let Some(quiet) = &mut self.quiet {
                quiet.add(&reply.epochs);
            }
        }
        self.status = self.primary.status().or(self.status.take());
    }

    fn line(&mut self) {
        let latency_us = match &self.probe {
            Some(probe) if self.load.is_some() => Some(probe.take()).filter(|seen| !seen.is_empty()),
            _ => None,
        };
        let latency_us = latency_us.map(|seen| (Pair::of(&seen).p50, self.latency.solo.p50));
        let host = if self.primary.host() == HostName::A { 'a' } else { 'b' };
        let replies = self.tally.replies.load(Relaxed);
        self.screen.line(&Moment { status: self.status.as_ref(), host, replies, latency_us });
    }

    /// Sets the probe's mode and waits until nothing of the one before is in flight.
    fn probe_mode(&mut self, mode: ProbeMode) -> Result<(), DemoError> {
        if let Some(probe) = &self.probe {
            probe.ask(mode);
        }
        self.wait("the guest to answer the probe", ANSWER_LIMIT, |demo| {
            Ok(demo.probe.as_ref().is_none_or(|probe| probe.has_reached(mode)).then_some(()))
        })
    }

    fn measure(&mut self) -> Result<Pair, DemoError> {
        const WARM_UP: Duration = Duration::from_millis(200);
        self.probe_mode(ProbeMode::Measure)?;
        self.pass(WARM_UP)?;
        self.probe.as_ref().map(Probe::take);
        self.pass(MEASURE)?;
        let seen = self.probe.as_ref().map(Probe::take);
        self.probe_mode(ProbeMode::Idle)?;
        self.probe.as_ref().map(Probe::take);
        Ok(seen.map_or(Pair::default(), |seen| Pair::of(&seen)))
    }

    /// Lets the guest write memory while nobody asks it anything: every epoch is as long as it may
    /// be.
    fn watch_quiet_epochs(&mut self) -> Result<EpochShape, DemoError> {
        self.sample();
        self.quiet = Some(EpochSamples::new());
        self.pass(MEASURE)?;
        self.sample();
        Ok(self.quiet.take().unwrap_or_default().shape())
    }

    /// Starts a secondary on the other host, if it has none, and waits until the guest is
    /// protected. Returns how long that took, in ms.
    pub(super) fn protect(&mut self) -> Result<f64, DemoError> {
        let started = Instant::now();
        let host = self.primary.host().other();
        if self.secondary.is_none() {
            self.nodes_started += 1;
            let name = format!("{host}-{}", self.nodes_started);
            let node = Node::start(StartAs::Secondary, host, &name, &self.settings, &self.namespaces, self.dir);
            self.secondary = Some(node.map_err(DemoError::io("start a node"))?);
        }
        let limit = RESYNC_LIMIT + RESYNC_LIMIT_PER_GIB * self.options.memory_mib.div_ceil(1024);
        self.wait("the guest to be protected", limit, |demo| {
            let status = demo.primary.status();
            let protected = status.as_ref().is_some_and(|status| status.protected);
            demo.status = status.or(demo.status.take());
            Ok(protected.then_some(()))
        })?;
        let took_ms = started.elapsed().as_secs_f64() * 1000.0;
        self.screen.say(format_args!(
            "protected: host {host} has the whole guest, {took_ms:.0} ms after its node was started"
        ));
        Ok(took_ms)
    }

    pub(super) fn gauges(&self) -> impl Iterator<Item = &Arc<Gauge>> {
        let load = self.load.iter().flat_map(Load::gauges);
        load.chain(self.probe.iter().map(Probe::gauge))
    }

    /// Adds up what the primary told last: it is gone, or the play is over.
    pub(super) fn bury_primary(&mut self) {
        if let Some(status) = self.status.take() {
            self.counts.committed += status.epochs.committed;
            self.counts.aborted += status.epochs.aborted;
            self.wire_bytes += status.wire_bytes;
        }
    }

    /// Brings everything to rest and reads back every key.
    fn verify(&mut self) -> Result<(), DemoError> {
        self.probe_mode(ProbeMode::Idle)?;
        for phase in [Phase::Hold, Phase::Verify] {
            if let Some(load) = &self.load {
                load.ask(phase);
            }
            self.wait("every connection to come to rest", ANSWER_LIMIT, |demo| {
                Ok(demo.load.as_ref().is_none_or(|load| load.has_reached(phase)).then_some(()))
            })?;
        }
        self.probe_mode(ProbeMode::Verify)?;
        self.screen.say("every key has been read back");
        self.sample();
        Ok(())
    }

    fn report(&mut self, rounds: Vec<Round>, quiet_epochs: Option<EpochShape>) -> Report {
        self.bury_primary();
        let tally = &self.tally;
        let client = ClientReport {
            requests: tally.requests.load(Relaxed),
            replies: tally.replies.load(Relaxed),
            acknowledged_writes: tally.acknowledged_writes.load(Relaxed),
            lost_writes: tally.lost_writes.load(Relaxed),
            wrong_replies: tally.wrong_replies.load(Relaxed),
            resets: tally.resets.load(Relaxed),
            silent: tally.silent.load(Relaxed),
            connections: self.gauges().count() as u64,
        };
        let complaints = tally.complaints.lock().clone();
        Report {
            ok: tally.is_clean() && client.requests == client.replies,
            rounds,
            client,
            epochs: EpochsReport {
                committed: self.counts.committed,
                aborted: self.counts.aborted,
                shape: self.epochs.shape(),
                wire_bytes: self.wire_bytes,
            },
            quiet_epochs,
            latency_us: self.latency,
            complaints,
            unplanned_takeovers: self.unplanned,
            seed: self.seed,
        }
    }

    fn too_late(&mut self, what: &str, limit: Duration) -> DemoError {
        let nodes = std::iter::once(&mut self.primary).chain(&mut self.secondary);
        let logs = nodes.map(|node| node.log_section());
        TestbedError::TooLate { what: what.to_owned(), limit_s: limit.as_secs(), logs: logs.collect() }.into()
    }
}
