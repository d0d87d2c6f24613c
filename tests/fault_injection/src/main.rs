//! `mcd-harness`: breaks real pairs, one fault after the other, and says whether anybody noticed.

mod capture;
mod environment;
mod etcd;
mod fault_matrix;
mod faults;
mod html;
mod packet;
mod partitions;
mod report;
mod test_pair;
mod traffic_checker;
mod trial;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use mcd::testbed::namespaces::{self, HostName, NamespaceError, Namespaces};
use mcd::testbed::nodes::{NodeSettings, RunDir, StartAs};
use mcd::testbed::rng::Rng;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use capture::Capture;
use environment::{ArbiterEnvironment, CommandEnvironment, FileEnvironment};
use etcd::EtcdEnvironment;
use fault_matrix::{ROWS, Row};
use mcd::testbed::error::{TestbedError, catch_signals};
use report::{Frame, Report};
use test_pair::{Parts, TestPair};
use trial::Counts;

/// The first argument with which this program is a node: then it is `mcd` with the arguments that
/// follow.
const AS_NODE: &str = "node";
/// The guest's Ethernet address, which the traffic checker looks for.
const MAC: [u8; 6] = [0x02, 0x6d, 0x63, 0x64, 0x00, 0x01];

/// Breaks real pairs of mcd nodes, one fault after the other, and says whether anybody noticed.
#[derive(Debug, Parser)]
#[command(name = "mcd-harness", version)]
struct Args {
    /// How many faults: first every one once, then at random
    #[arg(long, default_value_t = 27)]
    rounds: u32,
    /// The seed of every choice [default: another each time, printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults, by name, again and again in this order
    #[arg(long, value_delimiter = ',', value_parser = fault_name)]
    only: Vec<&'static str>,
    /// The most telling dozen, each once
    #[arg(long, conflicts_with = "only")]
    short: bool,
    /// Who decides
    #[arg(long, value_enum, default_value = "file")]
    arbiter: ArbiterKind,
    /// The mcd to break [default: the one this program was built with]
    #[arg(long)]
    mcd: Option<PathBuf>,
    /// The guest's memory, in MiB
    #[arg(long, default_value_t = 64)]
    memory: u32,
    /// The longest an epoch may last, in ms
    #[arg(long, default_value_t = 20)]
    interval_ms: u64,
    /// The nodes' heartbeat interval, in ms; the timeout is three times that
    #[arg(long, default_value_t = 50)]
    heartbeat_interval_ms: u64,
    /// Connections of the load
    #[arg(long, default_value_t = 6)]
    connections: usize,
    /// Where report.json and report.html are written
    #[arg(long)]
    out: Option<PathBuf>,
    /// Silences that are too long are told, but are no failure
    #[arg(long)]
    lenient: bool,
    /// Keep the nodes' logs and say where they are
    #[arg(long)]
    keep_logs: bool,
    /// Print the table of docs/operating/failover.md, and nothing else
    #[arg(long)]
    table: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ArbiterKind {
    File,
    Etcd,
    Command,
}

fn fault_name(text: &str) -> Result<&'static str, String> {
    let names = || ROWS.iter().map(|row| row.name).collect::<Vec<_>>().join(", ");
    fault_matrix::find(text).map(|row| row.name).ok_or_else(|| format!("there are: {}", names()))
}

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if arguments.get(1).is_some_and(|first| first == AS_NODE) {
        return mcd::cli::main(arguments.get(1..).unwrap_or_default());
    }
    let args = Args::parse();
    if args.table {
        print!("{}", fault_matrix::table());
        return ExitCode::SUCCESS;
    }
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("mcd-harness: {error}");
            error.exit_code()
        }
    }
}

fn run(args: &Args) -> Result<bool, TestbedError> {
    let stop = catch_signals().map_err(TestbedError::io("watch for signals"))?;
    namespaces::gain_rights()?;
    own_mounts().map_err(TestbedError::io("get mounts of its own"))?;
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    kvm.map_err(TestbedError::io("open /dev/kvm"))?;
    for (tool, package) in [("iptables-restore", "iptables"), ("tc", "iproute2")] {
        namespaces::find_tool(tool).ok_or(NamespaceError::NoTool { tool, package })?;
    }
    let seed = match args.seed {
        Some(seed) => seed,
        None => getrandom::u64().map_err(|e| TestbedError::io("get a random seed")(io::Error::other(e)))?,
    };
    let mut dir = RunDir::new().map_err(TestbedError::io("make a directory for the run"))?;
    if args.keep_logs {
        dir.keep();
        println!("the nodes' logs are in {}", dir.path().display());
    }
    let namespaces = Arc::new(Namespaces::new()?);
    let arbiter: Box<dyn ArbiterEnvironment> = match args.arbiter {
        ArbiterKind::File => {
            Box::new(FileEnvironment::new(dir.path()).map_err(TestbedError::io("make the arbiter's storage"))?)
        }
        ArbiterKind::Etcd => Box::new(EtcdEnvironment::new(&namespaces, dir.path())?),
        ArbiterKind::Command => {
            Box::new(CommandEnvironment::new(dir.path()).map_err(TestbedError::io("write the fencing scripts"))?)
        }
    };
    let capture = Capture::start(&namespaces, MAC).map_err(TestbedError::io("watch the clients' network"))?;
    let settings = settings(args, arbiter.as_ref())?;
    let timeout_ms = args.heartbeat_interval_ms * 3;
    let parts = Parts {
        settings,
        timeout_ms,
        connections: args.connections,
        seed,
        namespaces,
        arbiter,
        capture,
        dir: &dir,
        stop,
    };
    let report = play(args, seed, TestPair::new(parts))?;
    println!("\n{report}");
    write(args, &report)?;
    Ok(report.ok && (report.in_time || args.lenient))
}

/// What nodes are told.
fn settings(args: &Args, arbiter: &dyn ArbiterEnvironment) -> Result<NodeSettings, TestbedError> {
    let program = match &args.mcd {
        Some(path) => vec![path.clone().into_os_string()],
        None => {
            let me = std::env::current_exe().map_err(TestbedError::io("find this program"))?;
            vec![me.into_os_string(), AS_NODE.into()]
        }
    };
    let mut flags = vec!["--heartbeat-interval-ms".to_owned(), args.heartbeat_interval_ms.to_string()];
    if let Some(ms) = arbiter.question_ms() {
        flags.extend(["--arbiter-timeout-ms".to_owned(), ms.to_string()]);
    }
    let mac: Vec<String> = MAC.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(NodeSettings {
        memory_mib: args.memory,
        cpus: 1,
        interval_ms: args.interval_ms,
        program,
        arbiter: None,
        flags,
        boot_flags: vec!["--mac".to_owned(), mac.join(":")],
    })
}

/// Every trial.
fn play(args: &Args, seed: u64, mut pair: TestPair<'_>) -> Result<Report, TestbedError> {
    let started = Instant::now();
    let mut schedule = schedule(args, &mut Rng::split(seed, 1));
    schedule.retain(|row| pair.arbiter.knows(row.fault));
    println!("{} faults; --seed {seed} repeats the choices", schedule.len());
    pair.boot(StartAs::Primary, HostName::A)?;
    pair.settle()?;
    let (mut trials, mut client) = (Vec::new(), Counts::default());
    for (number, row) in schedule.iter().enumerate() {
        let at_s = started.elapsed().as_secs_f64();
        let trial = trial::run(&mut pair, row, &mut client)
            .inspect_err(|_| println!("{at_s:7.1} s  {:>3}  {}: no end", number + 1, row.name))?;
        let takeover = trial.takeover_ms.map_or_else(String::new, |ms| format!(", takeover {ms:.1} ms"));
        println!(
            "{at_s:7.1} s  {:>3}  {:<28} {}{takeover}, silence {:.1} ms, clients waited {:.0} ms{}",
            number + 1,
            row.name,
            trial.runs,
            trial.silence_ms,
            trial.client_gap_ms,
            if trial.wrongs.is_empty() { String::new() } else { format!("  WRONG: {}", trial.wrongs.join("; ")) }
        );
        if !trial.wrongs.is_empty() {
            println!("{}", pair.logs());
        }
        trials.push(trial);
    }
    let frame = Frame {
        seed,
        arbiter: args.arbiter.to_possible_value().map_or_else(String::new, |kind| kind.get_name().to_owned()),
        heartbeat_timeout_ms: pair.timeout_ms,
        interval_ms: args.interval_ms,
        memory_mib: args.memory,
        took_s: started.elapsed().as_secs_f64(),
        client,
        checked: pair.capture.totals(),
        unplanned_takeovers: pair.unplanned,
    };
    Ok(Report::new(frame, trials))
}

/// Which faults, in which order.
fn schedule(args: &Args, rng: &mut Rng) -> Vec<&'static Row> {
    if args.short {
        return ROWS.iter().filter(|row| row.short).collect();
    }
    let rounds = args.rounds as usize;
    let only: Vec<&Row> = args.only.iter().filter_map(|name| fault_matrix::find(name)).collect();
    if !only.is_empty() {
        return only.iter().copied().cycle().take(rounds).collect();
    }
    let mut all: Vec<&Row> = ROWS.iter().collect();
    for last in (1..all.len()).rev() {
        all.swap(last, rng.index(last + 1));
    }
    let sum: u64 = ROWS.iter().map(|row| row.weight).sum();
    let draw = |rng: &mut Rng| {
        let mut point = rng.below(sum);
        ROWS.iter().find(|row| point.checked_sub(row.weight).map(|left| point = left).is_none())
    };
    let more: Vec<&Row> = (all.len()..rounds).filter_map(|_| draw(rng)).collect();
    all.into_iter().chain(more).take(rounds).collect()
}

fn write(args: &Args, report: &Report) -> Result<(), TestbedError> {
    let Some(out) = &args.out else { return Ok(()) };
    let failed = || TestbedError::io(format!("write the report to {}", out.display()));
    fs::create_dir_all(out).map_err(failed())?;
    let text = serde_json::to_string_pretty(report).map_err(|error| failed()(error.into()))?;
    fs::write(out.join("report.json"), text + "\n").map_err(failed())?;
    fs::write(out.join("report.html"), html::page(report)).map_err(failed())?;
    println!("report: {}", out.join("report.html").display());
    Ok(())
}

/// Moves this process, which has one thread yet, into a mount namespace of its own: what it mounts
/// ends with it.
fn own_mounts() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    Ok(())
}
