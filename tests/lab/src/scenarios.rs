//! What the lab tries.

mod linux;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mcd::control::status::NodeStatus;
use mcd::testbed::error::TestbedError;
use mcd::testbed::load::Phase;
use mcd::testbed::namespaces::HostName;

use crate::error::LabError;
use crate::guest::Guest;
use crate::host::Site;
use crate::lab::{DECISION_LIMIT, Lab};
use crate::report::{Clients, Figures, NodeFigures, Outcome, Step};

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

/// The options of a scenario.
#[derive(Clone, Debug)]
pub struct Options {
    /// How often the primary's host loses its power, if it was said.
    pub rounds: Option<u32>,
    /// Connections of the load.
    pub connections: usize,
    /// Stay at the end until a signal comes.
    pub interactive: bool,
}

/// Tries one scenario. What it does is printed as it goes.
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
        let mut lab = Lab::new(Guest::BuiltIn, 0, site.clone(), stop.clone())?;
        let since = Instant::now();
        lab.power_on(&[HostName::A])?;
        self.note("host a boots", since, None);
        let since = Instant::now();
        let command = "mcd demo --rounds 2 --memory 64M --connections 4 --heartbeat-interval-ms 1000";
        let text = lab.host(HostName::A)?.run(command, DEMO_LIMIT)?;
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
        let mut lab = Lab::new(guest, options.connections, site.clone(), stop.clone())?;
        let result = self.faults_in(&mut lab, options);
        if let Err(error) = &result
            && !matches!(error, LabError::Run(TestbedError::Interrupted) | LabError::HostGone { .. })
        {
            match lab.post_mortem() {
                Ok(path) => println!("what was found then is in {}", path.display()),
                Err(error) => println!("nobody could look what was wrong: {error}"),
            }
        }
        result
    }

    fn faults_in(&mut self, lab: &mut Lab, options: &Options) -> Result<(), LabError> {
        let guest = lab.guest();
        let since = Instant::now();
        lab.power_on(&[HostName::A, HostName::B])?;
        self.note("both hosts boot", since, None);
        let since = Instant::now();
        lab.start_guest(HostName::A)?;
        self.note("the guest boots on host a and serves", since, None);
        let before = if guest.is_linux() { Some(self.check_boot(lab)?) } else { None };
        self.protect(lab)?;
        if guest.is_linux() {
            self.measure_disk(lab, true)?;
        }
        let rounds = options.rounds.unwrap_or(guest.power_cuts());
        for round in 1..=rounds {
            self.lose_primary(lab, round, rounds)?;
        }
        self.lose_secondary(lab)?;
        self.cut_link(lab)?;
        let since = Instant::now();
        let keys = lab.read_back()?;
        self.clients = lab.clients();
        self.note(format!("{keys} keys are read back for the last time"), since, None);
        if let Some(before) = &before {
            self.check_kernel_log(lab, before)?;
        }
        if options.interactive {
            println!("{}Ctrl-C ends it", lab.access_instructions());
            let forever = Duration::from_secs(u64::from(u32::MAX));
            match lab.wait("a signal", forever, |_| Ok(None::<()>)) {
                Err(LabError::Run(TestbedError::Interrupted)) => {}
                other => other?,
            }
        }
        if let Some(before) = &before {
            self.start_server_anew(lab)?;
            self.compare_images(lab, before)?;
            self.lose_both(lab)?;
        }
        Ok(())
    }

    /// After a fault: every acknowledged write is there, read over the connections that lived
    /// through it, and the clocks went on.
    fn read_back(&mut self, lab: &mut Lab, after: &str) -> Result<(), LabError> {
        let since = Instant::now();
        let keys = lab.read_back()?;
        lab.bring_clients_to(Phase::Run)?;
        self.note(format!("{keys} keys are read back over the same connections"), since, None);
        if lab.guest().is_linux() { self.check_clocks(lab, after).map(drop) } else { Ok(()) }
    }

    /// Keeps what the node that runs the guest says of itself.
    fn note_node(&mut self, lab: &mut Lab, when: String) -> Result<(), LabError> {
        let NodeStatus { pause_us, commit_us, hold_us, dirty_pages, epochs, .. } = lab.status(lab.runner)?;
        let committed = epochs.committed;
        self.figures.nodes.push(NodeFigures { when, pause_us, commit_us, hold_us, dirty_pages, committed });
        Ok(())
    }

    /// Protects the guest by a secondary on the other host, which is switched on if need be.
    fn protect(&mut self, lab: &mut Lab) -> Result<(), LabError> {
        let other = lab.runner.other();
        let since = Instant::now();
        lab.power_on(&[other])?;
        let marks = lab.marks();
        lab.start_secondary()?;
        lab.wait_protected(marks)?;
        self.note(format!("host {other} protects the guest"), since, None);
        lab.check_clients()
    }

    /// Cuts the power of the host that runs the guest; the other one must go on with it.
    fn lose_primary(&mut self, lab: &mut Lab, round: u32, rounds: u32) -> Result<(), LabError> {
        lab.wait_served(REPLIES_BETWEEN_FAULTS)?;
        self.note_node(lab, format!("before power cut {round}"))?;
        // The last time an unmodified client is in the middle of something too.
        let mut benchmark = if round == rounds { Some(lab.start_benchmark()?) } else { None };
        lab.wait_served(REPLIES_WHILE_BENCHMARK_STARTS)?;
        if let Some(benchmark) = &mut benchmark
            && benchmark.is_over()?
        {
            return Err(LabError::Wrong("redis-benchmark was over before the power cut".to_owned()));
        }
        let (old, new_primary) = (lab.runner, lab.runner.other());
        let marks = lab.marks();
        let (since, since_us) = (Instant::now(), lab.begin());
        lab.cut_power(old)?;
        lab.wait("the other host to take over", DECISION_LIMIT, |lab| {
            Ok(lab.event_line(marks, new_primary, "MC_TAKEOVER").map(drop))
        })?;
        lab.runner = new_primary;
        let silence_ms = lab.wait_answers(since_us)?;
        self.note(
            format!("power cut {round} of {rounds}: host {old} is lost, host {new_primary} goes on"),
            since,
            Some(silence_ms),
        );
        lab.check_clients()?;
        lab.expect_one_runner()?;
        self.read_back(lab, &format!("power cut {round}"))?;
        self.protect(lab)?;
        if let Some(benchmark) = benchmark {
            let since = Instant::now();
            lab.finish_benchmark(benchmark)?;
            self.note("redis-benchmark, which ran meanwhile, ends well; redis-cli finds every INCR", since, None);
        }
        Ok(())
    }

    /// Cuts the power of the host that protects the guest; the guest must go on where it is.
    fn lose_secondary(&mut self, lab: &mut Lab) -> Result<(), LabError> {
        lab.wait_served(REPLIES_BETWEEN_FAULTS)?;
        let (runner, lost) = (lab.runner, lab.runner.other());
        let marks = lab.marks();
        let (since, since_us) = (Instant::now(), lab.begin());
        lab.cut_power(lost)?;
        lab.wait("the primary to go on alone", DECISION_LIMIT, |lab| {
            Ok(lab.event_line(marks, runner, "MC_UNPROTECTED").map(drop))
        })?;
        let silence_ms = lab.wait_answers(since_us)?;
        self.note(format!("the secondary's power is cut: host {lost} is lost"), since, Some(silence_ms));
        lab.check_clients()?;
        lab.expect_one_runner()?;
        self.read_back(lab, "the secondary's power cut")?;
        self.protect(lab)
    }

    /// Cuts the link between the hosts; exactly one of them must go on with the guest.
    fn cut_link(&mut self, lab: &mut Lab) -> Result<(), LabError> {
        lab.wait_served(REPLIES_BETWEEN_FAULTS)?;
        let (old, other) = (lab.runner, lab.runner.other());
        let marks = lab.marks();
        let (since, since_us) = (Instant::now(), lab.begin());
        lab.host(old)?.plug_wire(false)?;
        let new_primary = lab.wait("a node to be given the guest", DECISION_LIMIT, |lab| {
            let takeover = lab
                .event_line(marks, other, "MC_TAKEOVER")
                .filter(|_| lab.event_line(marks, old, "MC_FENCED").is_some());
            let alone = lab.event_line(marks, old, "MC_UNPROTECTED");
            Ok(takeover.map(|_| other).or(alone.map(|_| old)))
        })?;
        lab.runner = new_primary;
        let silence_ms = lab.wait_answers(since_us)?;
        self.note(format!("the link is cut: host {new_primary} goes on"), since, Some(silence_ms));
        lab.check_clients()?;
        lab.expect_one_runner()?;
        self.read_back(lab, "the cut link")?;
        let since = Instant::now();
        let marks = lab.marks();
        lab.host(old)?.plug_wire(true)?;
        if new_primary == other {
            lab.end_node(old)?;
            lab.start_secondary()?;
        }
        // A secondary that lost joins again by itself.
        lab.wait_protected(marks)?;
        self.note(format!("the link is back: host {} protects the guest", new_primary.other()), since, None);
        lab.check_clients()
    }
}
