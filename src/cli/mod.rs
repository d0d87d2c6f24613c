//! The command line: flags and files become plain checked values, commands become exit codes.
//! Nothing else happens here.

mod arbiter;
mod args;
mod config;
mod console;
mod disk;
pub mod exit;
mod file;
mod log;
mod restore;
mod snapshot;
mod status;
mod values;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::FromArgMatches;
use clap::error::ErrorKind;
use tracing::Level;

use args::{Cli, ColdStartArgs, Command, DemoArgs, MachineArgs, NodeArgs, SecondaryArgs, SnapshotCommand};
pub use exit::ExitStatus;
use exit::Failure;

use crate::demo::{self, DemoOptions};
use crate::node::{self, NodeEnd, NodeError};

/// How long the last line on stderr may take.
const REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Runs `mcd` with these arguments, the program's name first. What goes wrong is one line on
/// stderr.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let command = match parse(arguments) {
        Ok(Parsed::Command(command)) => command,
        Ok(Parsed::Help(text)) => {
            // Nothing is to be done for a reader that went away.
            let _ = io::stdout().write_all(text.as_bytes());
            return ExitStatus::Ok.into();
        }
        Err(failure) => return report(&failure),
    };
    run(*command).unwrap_or_else(|failure| report(&failure))
}

/// Writes the reason to stderr. A reader of stderr that stalls does not keep the process from its
/// end.
fn report(failure: &Failure) -> ExitCode {
    let line = format!("mcd: {}\n", failure.line);
    let (done, written) = crossbeam::channel::bounded::<()>(1);
    let writing = std::thread::Builder::new().name("mcd-report".into()).spawn(move || {
        // There is no other place for it if this fails.
        let _ = io::stderr().write_all(line.as_bytes());
        drop(done);
    });
    match writing {
        // It ends with an error either way: the thread is done, or it is late.
        Ok(_) => drop(written.recv_timeout(REPORT_TIMEOUT)),
        Err(_) => drop(writeln!(io::stderr(), "mcd: {}", failure.line)),
    }
    failure.status.into()
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Primary(args) => primary(args.node, &args.machine, false),
        Command::ColdStart(args) => cold_start(args),
        Command::Secondary(args) => secondary(&args),
        Command::Demo(args) => run_demo(args),
        Command::Disk(args) => disk::run(&args.what).map(|()| ExitStatus::Ok.into()),
        Command::Snapshot(args) => match args.what {
            SnapshotCommand::Save(args) => snapshot::save(&args).map(|()| ExitStatus::Ok.into()),
            SnapshotCommand::Info(args) => snapshot::info(&args).map(|()| ExitStatus::Ok.into()),
            SnapshotCommand::Restore { file, flags } => {
                match parse(&snapshot::as_primary("mcd".into(), &file, &flags))? {
                    Parsed::Command(command) => run(*command),
                    Parsed::Help(text) => {
                        // Nothing is to be done for a reader that went away.
                        let _ = io::stdout().write_all(text.as_bytes());
                        Ok(ExitStatus::Ok.into())
                    }
                }
            }
        },
        Command::Status(args) => status::run(&args).map(|()| ExitStatus::Ok.into()),
        Command::Console(args) => console::run(&args).map(|()| ExitStatus::Ok.into()),
    }
}

fn primary(mut node: NodeArgs, machine: &MachineArgs, cold: bool) -> Result<ExitCode, Failure> {
    let restored = machine.restore.as_deref().map(|path| restore::adopt(path, &mut node, machine)).transpose()?;
    let (config, start) = (config::node(&node)?, config::primary(&node, machine, restored.as_ref(), cold)?);
    let _log = log::start(&node.log, Level::INFO);
    node::prepare_process();
    ended(node::run_primary(config, &start))
}

fn cold_start(args: ColdStartArgs) -> Result<ExitCode, Failure> {
    if !args.i_know_both_nodes_are_dead {
        return Err(Failure::usage(
            "mcd cold-start needs --i-know-both-nodes-are-dead: make sure that no node of this guest runs, then say so",
        ));
    }
    primary(args.node, &args.machine, true)
}

fn secondary(args: &SecondaryArgs) -> Result<ExitCode, Failure> {
    let (config, start) = (config::node(&args.node)?, config::secondary(args)?);
    let _log = log::start(&args.node.log, Level::INFO);
    node::prepare_process();
    ended(node::run_secondary(config, &start))
}

fn ended(result: Result<NodeEnd, NodeError>) -> Result<ExitCode, Failure> {
    match result {
        Ok(NodeEnd::Quit | NodeEnd::GuestEnded(_)) => Ok(ExitStatus::Ok.into()),
        Ok(NodeEnd::Restart) => Err(Failure {
            status: ExitStatus::Restart,
            line: "the guest asked to be restarted, and is off now; start the node again with the same flags"
                .to_owned(),
        }),
        Ok(NodeEnd::Fenced) => Err(Failure {
            status: ExitStatus::Fenced,
            line: "this node lost the guest to the other one and fenced itself; \
                start `mcd secondary` here to protect it again"
                .to_owned(),
        }),
        Err(error) => Err(Failure { status: ExitStatus::of(&error), line: error.to_string() }),
    }
}

fn run_demo(args: DemoArgs) -> Result<ExitCode, Failure> {
    let memory = args.memory;
    let memory_mib = u32::try_from(memory.bytes >> 20).ok().filter(|_| memory.bytes.is_multiple_of(1 << 20));
    let Some(memory_mib) = memory_mib.filter(|mib| (16..=65_536).contains(mib)) else {
        return Err(Failure::usage(format!("--memory {memory}: give whole MiB from 16M to 64G, such as 128M")));
    };
    let _log = log::start(&args.log, Level::WARN);
    let ended = demo::run(DemoOptions {
        rounds: args.rounds,
        json: args.json,
        interactive: args.interactive,
        seed: args.seed,
        connections: args.connections,
        memory_mib,
        cpus: args.cpus,
        interval_ms: args.interval_ms,
        heartbeat_interval_ms: args.heartbeat_interval_ms,
        dirty: args.dirty.map(|load| (load.pages, load.per_second)),
        keep_logs: args.keep_logs,
    });
    Ok(ended)
}

enum Parsed {
    Command(Box<Command>),
    /// `--help` or `--version`: the text asked for.
    Help(String),
}

/// Reads the arguments, and those of the file they name.
fn parse(arguments: &[OsString]) -> Result<Parsed, Failure> {
    let command = match parse_flags(arguments)? {
        Parsed::Command(command) => command,
        help => return Ok(help),
    };
    let Some((name, path)) = config_file(&command) else { return Ok(Parsed::Command(command)) };
    let [program, subcommand, flags @ ..] = arguments else { return Ok(Parsed::Command(command)) };
    let from_file = file::flags(path, &args::command(), name)?;
    let start = [program.clone(), subcommand.clone()];
    // Once by itself, so that a bad value is blamed on the file and not on a flag nobody typed.
    parse_flags(&[&start[..], &from_file].concat())
        .map_err(|f| Failure { line: format!("config file {}: {}", path.display(), f.line), ..f })?;
    let from_file = file::without_overridden(from_file, &args::command(), name, flags);
    parse_flags(&[&start[..], &from_file, flags].concat())
}

fn config_file(command: &Command) -> Option<(&'static str, &Path)> {
    let (name, node) = match command {
        Command::Primary(args) => ("primary", &args.node),
        Command::ColdStart(args) => ("cold-start", &args.node),
        Command::Secondary(args) => ("secondary", &args.node),
        Command::Demo(_) | Command::Disk(_) | Command::Snapshot(_) | Command::Status(_) | Command::Console(_) => {
            return None;
        }
    };
    node.config.as_deref().map(|path| (name, path))
}

fn parse_flags(arguments: &[OsString]) -> Result<Parsed, Failure> {
    let matches = args::command().try_get_matches_from(arguments);
    match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => Ok(Parsed::Command(Box::new(cli.command))),
        Err(error) => match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(Parsed::Help(error.render().to_string())),
            _ => Err(Failure::usage(one_line(&error))),
        },
    }
}

/// clap's error in one line: the error, its tip, and where to read on.
fn one_line(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "which command? primary, secondary, cold-start, demo, disk, snapshot, status or console; see mcd --help"
            .to_owned();
    }
    let text = error.render().to_string();
    let trimmed = text.strip_prefix("error: ").unwrap_or(&text);
    let mut paragraphs = trimmed.split("\n\n");
    let flat = |part: &str| part.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut line = flat(paragraphs.next().unwrap_or_default());
    for part in paragraphs {
        if let Some(tip) = part.trim_start().strip_prefix("tip: ") {
            line.push_str("; ");
            line.push_str(&flat(tip));
        }
    }
    if !line.contains("--help") {
        line.push_str("; see --help");
    }
    line
}
