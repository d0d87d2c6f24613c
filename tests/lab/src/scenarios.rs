//! What the lab tries.

mod linux;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mcd::control::status::NodeStatus;
use mcd::demo::load::Phase;
use mcd::demo::namespaces::HostName;

use crate::error::LabError;
use crate::guest::Guest;
use crate::host::Site;
use crate::report::{Clients, Figures, NodeFigures, Outcome, Step};
use crate::world::{DECISION_LIMIT, World};

/// How long `mcd demo` may take in a host.
const DEMO_LIMIT: Duration = Duration::from_secs(400);

/// How long the guest serves untroubled before the next fault: so many replies.
const REPLIES_BETWEEN_FAULTS: u64 = 200;
/// How long a redis-benchmark has been at work when the fault comes.
const REPLIES_WHILE_BENCHMARK_STARTS: u64 = 50;

/// Something the lab can try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What it shows.
    pub shows: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Demo,
    Faults(Guest),
}

/// All of them, in the order in which they are tried.
pub const SCENARIOS: [Scenario; 4] = [
    Scenario { name: "demo", shows: "`mcd demo` passes on a host with ordinary KVM", kind: Kind::Demo },
    Scenario {
        name: "builtin",
        shows: "the built-in guest outlives power cuts of either host and a cut link",
        kind: Kind::Faults(Guest::BuiltIn),
    },
    Scenario {
        name: "linux",
        shows: "the same with Debian's unmodified cloud kernel and a real redis-server",
        kind: Kind::Faults(Guest::Linux { cpus: 1, stress: false }),
    },
    Scenario {
        name: "linux-smp",
        shows: "the same with two vCPUs, both of them busy, and files being written",
        kind: Kind::Faults(Guest::Linux { cpus: 2, stress: true }),
    },
];

/// What a scenario is told.
#[derive(Clone, Debug)]
pub struct Options {
    /// How often the primary's host loses its power, if it was said.
    pub rounds: Option<u32>,
    /// Connections of the load.
    pub connections: usize,
    /// Stay at the end until a signal comes.
    pub stay: bool,
}

/// Tries one scenario. What it does is told as it goes.
pub fn run(scenario: &Scenario, options: &Options, site: &Arc<Site>, stop: &Arc<AtomicBool>) -> Outcome {
    let mut play = Play { started: Instant::now(), steps: Vec::new(), clients: None, figures: Figures::default() };
    let result = match scenario.kind {
        Kind::Demo => play.demo(site, stop),
        Kind::Faults(guest) => play.faults(guest, options, site, stop),
    };
    let host_gone = matches!(result, Err(LabError::HostGone { .. }));
    let wrong = result.err().map(|error| error.to_string());
    let took_s = play.started.elapsed().as_secs_f64();
    Outcome {
        name: scenario.name.to_owned(),
        ok: wrong.is_none(),
        took_s,
        steps: play.steps,
        clients: play.clients,
        figures: play.figures,
        host_gone,
        repeated: None,
        wrong,
    }
}

struct Play {
    started: Instant,
    steps: Vec<Step>,
    clients: Option<Clients>,
    figures: Figures,
}

impl Play {
    /// Notes a step that began at `since`, and tells it.
    fn note(&mut self, what: impl Into<String>, since: Instant, silence_ms: Option<u64>) {
        let (what, took_s) = (what.into(), since.elapsed().as_secs_f64());
        let silence = silence_ms.map_or_else(String::new, |ms| format!("; longest silence a client saw {ms} ms"));
        println!("{:7.1} s  {what}: {took_s:.1} s{silence}", self.started.elapsed().as_secs_f64());
        self.steps.push(Step { what, took_s, silence_ms });
    }

    fn demo(&mut self, site: &Arc<Site>, stop: &Arc<AtomicBool>) -> Result<(), LabError> {
        let mut world = World::new(Guest::BuiltIn, 0, site.clone(), stop.clone())?;
        let since = Instant::now();
        world.power_on(&[HostName::A])?;
        self.note("host a boots", since, None);
        let since = Instant::now();
        let command = "mcd demo --rounds 2 --memory 64M --connections 4 --heartbeat-interval-ms 1000";
        let text = world.host(HostName::A)?.run(command, DEMO_LIMIT)?;
        self.note("mcd demo --rounds 2", since, None);
        println!("{}", text.lines().skip_while(|line| !line.starts_with("takeover ")).collect::<Vec<_>>().join("\n"));
        Ok(())
    }

    fn faults(
        &mut self,
        guest: Guest,
        options: &Options,
        site: &Arc<Site>,
        stop: &Arc<AtomicBool>,
    ) -> Result<(), LabError> {
        let mut world = World::new(guest, options.connections, site.clone(), stop.clone())?;
        let result = self.faults_in(&mut world, options);
        if let Err(error) = &result
            && !matches!(error, LabError::Interrupted | LabError::HostGone { .. })
        {
            match world.post_mortem() {
                Ok(path) => println!("what was found then is in {}", path.display()),
                Err(error) => println!("nobody could look what was wrong: {error}"),
            }
        }
        result
    }

    fn faults_in(&mut self, world: &mut World, options: &Options) -> Result<(), LabError> {
        let guest = world.guest();
        let since = Instant::now();
        world.power_on(&[HostName::A, HostName::B])?;
        self.note("both hosts boot", since, None);
        let since = Instant::now();
        world.start_guest(HostName::A)?;
        self.note("the guest boots on host a and serves", since, None);
        let before = if guest.is_linux() { Some(self.meet(world)?) } else { None };
        self.protect(world)?;
        if guest.is_linux() {
            self.measure_disk(world, true)?;
        }
        let rounds = options.rounds.unwrap_or(guest.power_cuts());
        for round in 1..=rounds {
            self.lose_primary(world, round, rounds)?;
        }
        self.lose_secondary(world)?;
        self.cut_link(world)?;
        let since = Instant::now();
        let keys = world.read_back()?;
        self.clients = world.clients();
        self.note(format!("{keys} keys are read back for the last time"), since, None);
        if let Some(before) = &before {
            self.question(world, before)?;
        }
        if options.stay {
            println!("{}Ctrl-C ends it", world.doors());
            let forever = Duration::from_secs(u64::from(u32::MAX));
            match world.wait("a signal", forever, |_| Ok(None::<()>)) {
                Err(LabError::Interrupted) => {}
                other => other?,
            }
        }
        if let Some(before) = &before {
            self.start_server_anew(world)?;
            self.compare_images(world, before)?;
            self.lose_both(world)?;
        }
        Ok(())
    }

    /// After a fault: every acknowledged write is there, read over the connections that lived
    /// through it, and the clocks went on.
    fn read_back(&mut self, world: &mut World, after: &str) -> Result<(), LabError> {
        let since = Instant::now();
        let keys = world.read_back()?;
        world.bring_clients_to(Phase::Run)?;
        self.note(format!("{keys} keys are read back over the same connections"), since, None);
        if world.guest().is_linux() { self.check_clocks(world, after).map(drop) } else { Ok(()) }
    }

    /// Keeps what the node that runs the guest says of itself.
    fn note_node(&mut self, world: &mut World, when: String) -> Result<(), LabError> {
        let NodeStatus { pause_us, commit_us, hold_us, dirty_pages, epochs, .. } = world.status(world.runner)?;
        let committed = epochs.committed;
        self.figures.nodes.push(NodeFigures { when, pause_us, commit_us, hold_us, dirty_pages, committed });
        Ok(())
    }

    /// Protects the guest by a secondary on the other host, which is switched on if need be.
    fn protect(&mut self, world: &mut World) -> Result<(), LabError> {
        let other = world.runner.other();
        let since = Instant::now();
        world.power_on(&[other])?;
        let marks = world.marks();
        world.start_secondary()?;
        world.wait_protected(marks)?;
        self.note(format!("host {other} protects the guest"), since, None);
        world.check_clients()
    }

    /// Cuts the power of the host that runs the guest; the other one must go on with it.
    fn lose_primary(&mut self, world: &mut World, round: u32, rounds: u32) -> Result<(), LabError> {
        world.wait_served(REPLIES_BETWEEN_FAULTS)?;
        self.note_node(world, format!("before power cut {round}"))?;
        // The last time an unmodified client is in the middle of something too.
        let mut benchmark = if round == rounds { Some(world.start_benchmark()?) } else { None };
        world.wait_served(REPLIES_WHILE_BENCHMARK_STARTS)?;
        if let Some(benchmark) = &mut benchmark
            && benchmark.is_over()?
        {
            return Err(LabError::Wrong("redis-benchmark was over before the power cut".to_owned()));
        }
        let (old, new_primary) = (world.runner, world.runner.other());
        let marks = world.marks();
        let (since, since_us) = (Instant::now(), world.begin());
        world.cut_power(old)?;
        world.wait("the other host to take over", DECISION_LIMIT, |world| {
            Ok(world.told(marks, new_primary, "MC_TAKEOVER").map(drop))
        })?;
        world.runner = new_primary;
        let silence_ms = world.wait_answers(since_us)?;
        self.note(
            format!("power cut {round} of {rounds}: host {old} is lost, host {new_primary} goes on"),
            since,
            Some(silence_ms),
        );
        world.check_clients()?;
        world.expect_one_runner()?;
        self.read_back(world, &format!("power cut {round}"))?;
        self.protect(world)?;
        if let Some(benchmark) = benchmark {
            let since = Instant::now();
            world.finish_benchmark(benchmark)?;
            self.note("redis-benchmark, which ran meanwhile, ends well; redis-cli finds every INCR", since, None);
        }
        Ok(())
    }

    /// Cuts the power of the host that protects the guest; the guest must go on where it is.
    fn lose_secondary(&mut self, world: &mut World) -> Result<(), LabError> {
        world.wait_served(REPLIES_BETWEEN_FAULTS)?;
        let (runner, lost) = (world.runner, world.runner.other());
        let marks = world.marks();
        let (since, since_us) = (Instant::now(), world.begin());
        world.cut_power(lost)?;
        world.wait("the primary to go on alone", DECISION_LIMIT, |world| {
            Ok(world.told(marks, runner, "MC_UNPROTECTED").map(drop))
        })?;
        let silence_ms = world.wait_answers(since_us)?;
        self.note(format!("the secondary's power is cut: host {lost} is lost"), since, Some(silence_ms));
        world.check_clients()?;
        world.expect_one_runner()?;
        self.read_back(world, "the secondary's power cut")?;
        self.protect(world)
    }

    /// Cuts the link between the hosts; exactly one of them must go on with the guest.
    fn cut_link(&mut self, world: &mut World) -> Result<(), LabError> {
        world.wait_served(REPLIES_BETWEEN_FAULTS)?;
        let (old, other) = (world.runner, world.runner.other());
        let marks = world.marks();
        let (since, since_us) = (Instant::now(), world.begin());
        world.host(old)?.plug_wire(false)?;
        let new_primary = world.wait("a node to be given the guest", DECISION_LIMIT, |world| {
            let takeover =
                world.told(marks, other, "MC_TAKEOVER").filter(|_| world.told(marks, old, "MC_FENCED").is_some());
            let alone = world.told(marks, old, "MC_UNPROTECTED");
            Ok(takeover.map(|_| other).or(alone.map(|_| old)))
        })?;
        world.runner = new_primary;
        let silence_ms = world.wait_answers(since_us)?;
        self.note(format!("the link is cut: host {new_primary} goes on"), since, Some(silence_ms));
        world.check_clients()?;
        world.expect_one_runner()?;
        self.read_back(world, "the cut link")?;
        let since = Instant::now();
        let marks = world.marks();
        world.host(old)?.plug_wire(true)?;
        if new_primary == other {
            world.end_node(old)?;
            world.start_secondary()?;
        }
        // A secondary that lost joins again by itself.
        world.wait_protected(marks)?;
        self.note(format!("the link is back: host {} protects the guest", new_primary.other()), since, None);
        world.check_clients()
    }
}
