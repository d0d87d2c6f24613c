//! Measures mcd on this machine with `mcd demo`, keeps the raw figures, and draws them.
//!
//! Whatever is in one picture was measured in one run, one thing after the other, on a machine that
//! should have nothing else to do.

mod draw;
mod figures;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};

use clap::Parser;

use figures::Demo;

/// Pages that the guest writes in an epoch, for the picture of pauses.
const DIRTY_PAGES: [u64; 6] = [50, 150, 500, 1000, 2000, 4000];
/// Lengths of an epoch in ms: for pauses, and for the picture of latency.
const DIRTY_INTERVAL_MS: u64 = 10;
const INTERVALS_MS: [u64; 6] = [1, 3, 10, 30, 100, 300];

/// Measures mcd on this machine and draws what it finds
#[derive(Debug, Parser)]
struct Args {
    /// The mcd to measure
    #[arg(long, default_value = "target/release/mcd")]
    mcd: PathBuf,
    /// Where the raw figures go, as JSON
    #[arg(long, default_value = "target/bench")]
    out: PathBuf,
    /// Where the pictures go, as SVG
    #[arg(long, default_value = "target/bench")]
    plots: PathBuf,
    /// How often the primary is killed
    #[arg(long, default_value_t = 20)]
    rounds: u32,
    /// Draw the figures that are there, and measure nothing
    #[arg(long)]
    draw_only: bool,
}

/// Why there are no figures or no pictures.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    /// A file or a program.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: io::Error,
    },
    /// A demo failed: what it measured means nothing.
    #[error("`mcd demo {arguments}` ended with {status}: look at what it printed")]
    Demo {
        /// Its arguments.
        arguments: String,
        /// How it ended.
        status: ExitStatus,
    },
    /// A report is not one.
    #[error("{} is no report of this mcd's demo: {source}; measure again", path.display())]
    Report {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A picture could not be drawn.
    #[error("cannot draw {}: {why}", path.display())]
    Picture {
        /// The file.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> BenchError {
    let action = action.into();
    move |source| BenchError::Io { action, source }
}

/// Where figures come from.
struct Bench<'a> {
    args: &'a Args,
}

impl Bench<'_> {
    /// One demo: run, if that is wanted, and read.
    fn demo(&self, name: &str, arguments: &[&str]) -> Result<Demo, BenchError> {
        let path = self.args.out.join(format!("{name}.json"));
        if !self.args.draw_only {
            let mut command = Command::new(&self.args.mcd);
            command.arg("demo").args(arguments).arg("--json").arg(&path);
            let status = command.status().map_err(io_error(format!("run {}", self.args.mcd.display())))?;
            if !status.success() {
                return Err(BenchError::Demo { arguments: arguments.join(" "), status });
            }
        }
        read(&path)
    }
}

fn read(path: &Path) -> Result<Demo, BenchError> {
    let text = fs::read_to_string(path).map_err(io_error(format!("read {}", path.display())))?;
    serde_json::from_str(&text).map_err(|source| BenchError::Report { path: path.to_owned(), source })
}

fn run(args: &Args) -> Result<(), BenchError> {
    for directory in [&args.out, &args.plots] {
        fs::create_dir_all(directory).map_err(io_error(format!("make {}", directory.display())))?;
    }
    let bench = Bench { args };
    let demo = bench.demo("demo", &["--rounds", &args.rounds.to_string()])?;
    let mut pauses = Vec::new();
    for pages in DIRTY_PAGES {
        let interval = DIRTY_INTERVAL_MS.to_string();
        // As many a second as fill each epoch.
        let dirty = format!("{pages},{}", pages * 1000 / DIRTY_INTERVAL_MS);
        let arguments = ["--rounds", "1", "--interval-ms", &interval, "--dirty", &dirty];
        pauses.extend(bench.demo(&format!("dirty-{pages}"), &arguments)?.quiet_epochs);
    }
    let mut latencies = Vec::new();
    for interval_ms in INTERVALS_MS {
        let arguments = ["--rounds", "1", "--interval-ms", &interval_ms.to_string()];
        latencies.push((interval_ms, bench.demo(&format!("interval-{interval_ms}"), &arguments)?.latency_us));
    }
    for (name, draw) in [
        ("takeover.svg", &(|path: &Path| draw::takeovers(path, &demo.rounds)) as &dyn Fn(&Path) -> Result<(), String>),
        ("pause.svg", &|path| draw::pauses(path, &pauses)),
        ("latency.svg", &|path| draw::latencies(path, &latencies)),
    ] {
        let path = args.plots.join(name);
        draw(&path).map_err(|why| BenchError::Picture { path: path.clone(), why })?;
        println!("bench: {}", path.display());
    }
    println!("bench: the raw figures are in {}", args.out.display());
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mcd-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
