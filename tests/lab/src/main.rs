//! `mcd-lab`: two virtual hosts with ordinary KVM, a guest, and power cuts.
//!
//! QEMU's software processor has SVM, so KVM inside it is what users have on their hosts, even
//! where this machine has none that is like it. `docs/internals/testing.md` has a picture.

mod attach;
mod benchmark;
mod channel;
mod console;
mod cpio;
mod disk;
mod error;
mod etcd;
mod guest;
mod guest_report;
mod guest_shell;
mod host;
mod image;
mod kernel;
mod lab;
mod net;
mod post_mortem;
mod report;
mod scenarios;
mod time_server;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use clap::Parser;
use mcd::testbed::error::{TestbedError, catch_signals};
use mcd::testbed::namespaces;
use mcd::testbed::nodes::RunDir;

use error::LabError;
use host::{HostSettings, Site};
use image::Images;
use report::{Outcome, Report};
use scenarios::{Options, SCENARIOS, Scenario};

/// Two virtual hosts with ordinary KVM, a guest, and power cuts.
#[derive(Debug, Parser)]
#[command(name = "mcd-lab", version)]
struct Args {
    /// What to try, by name [default: all]
    #[arg(value_parser = scenario)]
    scenarios: Vec<&'static Scenario>,
    /// Say what there is to try, and nothing else
    #[arg(long)]
    list: bool,
    /// Connect this terminal to the shell of a host that runs (see --interactive)
    #[arg(long, value_name = "SOCKET")]
    attach: Option<PathBuf>,
    /// How often the primary's host loses its power in a row [default: 5 for linux, else 2]
    #[arg(long)]
    rounds: Option<u32>,
    /// Connections of the load
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// The memory of each host, in MiB
    #[arg(long, default_value_t = 1536)]
    memory: u32,
    /// The processors of each host. With two of them QEMU's emulation loses races: guests and whole
    /// hosts were reset as guests booted
    #[arg(long, default_value_t = 1)]
    host_cpus: u32,
    /// Leave everything up at the end of a scenario and say how to look around; Ctrl-C ends it
    #[arg(long, alias = "stay")]
    interactive: bool,
    /// The mcd to try
    #[arg(long, default_value = "target/release/mcd")]
    mcd: PathBuf,
    /// Where `make setup-lab` has put the kernels, and where images, logs and report.json go
    #[arg(long, default_value = "target/lab")]
    dir: PathBuf,
}

fn scenario(text: &str) -> Result<&'static Scenario, String> {
    let names = || SCENARIOS.map(|scenario| scenario.name).join(", ");
    SCENARIOS.iter().find(|scenario| scenario.name == text).ok_or_else(|| format!("there are: {}", names()))
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.list {
        SCENARIOS.iter().for_each(|scenario| println!("{:<14} {}", scenario.name, scenario.shows));
        return ExitCode::SUCCESS;
    }
    let result = match &args.attach {
        Some(path) => attach::attach(path).map(|()| true).map_err(LabError::io(format!("talk to {}", path.display()))),
        None => run(&args),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mcd-lab: {error}");
            error.exit_code()
        }
    }
}

fn run(args: &Args) -> Result<bool, LabError> {
    let started = Instant::now();
    let stop = catch_signals().map_err(LabError::io("watch for signals"))?;
    namespaces::gain_rights()?;
    let images = Images::build(&args.dir, &args.mcd)?;
    let sockets = RunDir::new().map_err(LabError::io("make a directory for the run"))?;
    let site = Arc::new(Site {
        settings: HostSettings { memory_mib: args.memory, cpus: args.host_cpus, tsc_khz: host::tsc_khz() },
        images,
        network: Arc::new(net::new()?),
        sockets: PathBuf::new(),
        disks: PathBuf::new(),
        logs: PathBuf::new(),
    });
    let mut run = Run { site, directory: args.dir.clone(), sockets, tries: 0 };
    let options = Options { rounds: args.rounds, connections: args.connections, interactive: args.interactive };
    let all: Vec<&Scenario> =
        if args.scenarios.is_empty() { SCENARIOS.iter().collect() } else { args.scenarios.clone() };
    let mut outcomes = Vec::new();
    for scenario in all {
        println!("{}: {}", scenario.name, scenario.shows);
        let mut outcome = try_one(scenario, scenario.name, &options, &mut run, &stop)?;
        if outcome.host_gone && !stop.load(Relaxed) {
            // No program in a host can do that to it: it was the emulated processor. Once is
            // enough; the report says that it was.
            let why = outcome.wrong.unwrap_or_default().lines().next().unwrap_or_default().to_owned();
            println!("{}: once more, because {why}", scenario.name);
            outcome = try_one(scenario, &format!("{}-again", scenario.name), &options, &mut run, &stop)?;
            outcome.repeated = Some(why);
        }
        outcomes.push(outcome);
        if stop.load(Relaxed) && !args.interactive {
            return Err(LabError::Run(TestbedError::Interrupted));
        }
    }
    let ok = outcomes.iter().all(|outcome| outcome.ok);
    let report = Report { ok, took_s: started.elapsed().as_secs_f64(), scenarios: outcomes };
    report.scenarios.iter().for_each(|outcome| println!("{outcome}"));
    let path = args.dir.join("report.json");
    let text = serde_json::to_string_pretty(&report).map_err(|error| LabError::io("write the report")(error.into()))?;
    fs::write(&path, text + "\n").map_err(LabError::io(format!("write {}", path.display())))?;
    println!("{:.0} s; report: {}", report.took_s, path.display());
    Ok(ok)
}

/// What all scenarios of a run share.
struct Run {
    site: Arc<Site>,
    directory: PathBuf,
    sockets: RunDir,
    tries: u32,
}

/// Tries a scenario, with its disks and logs in directories of the name `directory_name`, and
/// prints what came of it.
fn try_one(
    scenario: &Scenario,
    directory_name: &str,
    options: &Options,
    run: &mut Run,
    stop: &Arc<AtomicBool>,
) -> Result<Outcome, LabError> {
    run.tries += 1;
    let Run { site, directory, sockets, tries } = run;
    let alone = Arc::get_mut(site).ok_or_else(|| LabError::Wrong("a scenario did not end".to_owned()))?;
    alone.disks = directory.join("disk").join(directory_name);
    alone.logs = directory.join("log").join(directory_name);
    // Of its own, because a socket's name can be used once only.
    alone.sockets = sockets.path().join(tries.to_string());
    for directory in [&alone.sockets, &alone.logs] {
        fs::create_dir_all(directory).map_err(LabError::io(format!("make {}", directory.display())))?;
    }
    let outcome = scenarios::run(scenario, options, site, stop);
    println!("{outcome}\n");
    if let Some(wrong) = &outcome.wrong {
        println!("{wrong}\nthe hosts' consoles are in {}\n", site.logs.display());
    }
    Ok(outcome)
}
