//! The node's commands on the control socket: each with its parameters and what carries it out.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, bounded};
use serde::Serialize;
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::events::{NodeEvent, SnapshotRequest};
use super::inbox::{CommandNotTaken, InboxSender};
use super::status::StatusStore;
use crate::control::{Handler, QmpError};
use crate::protocol::command::{AnnounceSeries, Command, DiskChoice};

/// How long a command may take to take effect before its client gets an error.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);
/// The same for a snapshot, which has to be written: an hour is enough for a terabyte.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(3600);

/// Why a command has no answer but this.
#[derive(Debug, Error)]
enum CommandError {
    /// There is no command of this name.
    #[error("The command {0} has not been found")]
    NotFound(String),
    /// It has no parameter of the name that was given.
    #[error("{0} was given a parameter that it does not have")]
    UnknownParameter(&'static str),
    /// A parameter's value is of no use.
    #[error("'{name}' must be {what}")]
    BadParameter {
        /// The parameter.
        name: &'static str,
        /// What it has to be.
        what: &'static str,
    },
    /// It did not reach the driver.
    #[error("{0}")]
    NotTaken(#[from] CommandNotTaken),
    /// The rules do not allow it now.
    #[error("{0}")]
    Refused(String),
    /// The driver has not answered yet.
    #[error("{0} in time; see mc-query for the state")]
    TimedOut(&'static str),
    /// There is nothing to report on.
    #[error("no disk was verified yet: ask for it with mc-disk-verify")]
    NothingVerified,
    /// The answer cannot be written as JSON.
    #[error("{0}")]
    Answer(#[from] serde_json::Error),
}

impl From<CommandError> for QmpError {
    fn from(error: CommandError) -> QmpError {
        match error {
            CommandError::NotFound(_) => QmpError::not_found(error.to_string()),
            _ => QmpError::generic(error.to_string()),
        }
    }
}

type Arguments = Map<String, Value>;
type Answer = Result<Value, CommandError>;

/// One command.
struct QmpCommand {
    name: &'static str,
    parameters: &'static [&'static str],
    run: fn(&Commands, &Arguments) -> Answer,
}

impl QmpCommand {
    const fn new(
        name: &'static str,
        parameters: &'static [&'static str],
        run: fn(&Commands, &Arguments) -> Answer,
    ) -> QmpCommand {
        QmpCommand { name, parameters, run }
    }
}

const TABLE: [QmpCommand; 12] = [
    QmpCommand::new("query-status", &[], |node, _| Ok(node.status.status().query_status())),
    QmpCommand::new("query-name", &[], |node, _| Ok(json!({ "name": node.status.guest() }))),
    QmpCommand::new("mc-query", &[], |node, _| to_value(&node.status.status())),
    QmpCommand::new("mc-query-epochs", &["since"], Commands::query_epochs),
    QmpCommand::new("mc-checkpoint", &[], |node, _| node.carry_out(Command::Checkpoint)),
    QmpCommand::new("mc-disk-verify", &["disk"], |node, arguments| {
        node.carry_out(Command::VerifyDisks(disk_choice(arguments.get("disk"))?))
    }),
    QmpCommand::new("mc-query-disk-verify", &[], |node, _| {
        to_value(&node.status.verify_report().ok_or(CommandError::NothingVerified)?)
    }),
    QmpCommand::new("mc-snapshot", &["path", "stop"], Commands::snapshot),
    QmpCommand::new("announce-self", &["initial", "max", "rounds", "step"], |node, arguments| {
        node.carry_out(Command::AnnounceSelf(announce_series(arguments)?))
    }),
    QmpCommand::new("stop", &[], |node, _| node.carry_out(Command::Stop)),
    QmpCommand::new("cont", &[], |node, _| node.carry_out(Command::Cont)),
    QmpCommand::new("quit", &[], |node, _| node.quit()),
];

const NAMES: [&str; TABLE.len()] = {
    let mut names = [""; TABLE.len()];
    let mut at = 0;
    while at < names.len() {
        names[at] = TABLE[at].name;
        at += 1;
    }
    names
};

/// Carries out commands: queries from the status snapshot, the others through the driver.
pub(super) struct Commands {
    status: Arc<StatusStore>,
    inbox: InboxSender,
}

impl Commands {
    /// The commands of the node that `status` is of and whose driver reads `inbox`.
    pub(super) fn new(status: Arc<StatusStore>, inbox: InboxSender) -> Arc<Commands> {
        Arc::new(Commands { status, inbox })
    }

    fn query_epochs(&self, arguments: &Arguments) -> Answer {
        let since = arguments.get("since").map_or(Some(0), Value::as_u64);
        let since = since.ok_or(CommandError::BadParameter { name: "since", what: "a number, 0 or more" })?;
        to_value(&self.status.epochs_since(since))
    }

    /// Has the driver carry out a command, and waits for its answer.
    fn carry_out(&self, command: Command) -> Answer {
        let (reply, result) = bounded(1);
        self.inbox.command(NodeEvent::Command { command, reply: Some(reply) })?;
        wait_for(&result, COMMAND_TIMEOUT, "the command did not take effect")
    }

    /// A node that ends may end before it answers: that it was asked to is enough.
    fn quit(&self) -> Answer {
        match self.carry_out(Command::Quit) {
            Err(CommandError::TimedOut(_)) => Ok(json!({})),
            answer => answer,
        }
    }

    /// Has a snapshot written, which may take a while.
    fn snapshot(&self, arguments: &Arguments) -> Answer {
        let path = arguments.get("path").and_then(Value::as_str).map(PathBuf::from).filter(|path| path.is_absolute());
        let path = path.ok_or(CommandError::BadParameter { name: "path", what: "a path that begins at the root" })?;
        let stop = arguments.get("stop").map_or(Some(false), Value::as_bool);
        let stop = stop.ok_or(CommandError::BadParameter { name: "stop", what: "true or false" })?;
        let (reply, result) = bounded(1);
        self.inbox.command(NodeEvent::Snapshot { request: SnapshotRequest { path, stop }, reply })?;
        wait_for(&result, SNAPSHOT_TIMEOUT, "the snapshot was not written")
    }
}

/// Waits for the driver's answer. A driver that went away without one is one that has not answered.
fn wait_for(result: &Receiver<Result<Value, String>>, timeout: Duration, what: &'static str) -> Answer {
    match result.recv_timeout(timeout) {
        Ok(answer) => answer.map_err(CommandError::Refused),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(CommandError::TimedOut(what)),
    }
}

impl Handler for Commands {
    fn commands(&self) -> &[&str] {
        &NAMES
    }

    fn execute(&self, command: &str, arguments: &Arguments) -> Result<Value, QmpError> {
        let found = TABLE.iter().find(|entry| entry.name == command);
        let Some(entry) = found else { return Err(CommandError::NotFound(command.to_owned()).into()) };
        if arguments.keys().any(|key| !entry.parameters.contains(&key.as_str())) {
            return Err(CommandError::UnknownParameter(entry.name).into());
        }
        Ok((entry.run)(self, arguments)?)
    }
}

/// The series of `announce-self`, with QEMU's names and bounds; what is not given is as the node
/// does it by itself.
fn announce_series(arguments: &Arguments) -> Result<AnnounceSeries, CommandError> {
    let number = |name: &'static str, max: u64, what: &'static str, default: u64| match arguments.get(name) {
        None => Ok(default),
        Some(value) => value.as_u64().filter(|number| *number <= max).ok_or(CommandError::BadParameter { name, what }),
    };
    let pause = |name, max, what, default: Duration| {
        let default = u64::try_from(default.as_millis()).unwrap_or(max);
        number(name, max, what, default).map(Duration::from_millis)
    };
    let AnnounceSeries { initial, max, rounds, step } = AnnounceSeries::DEFAULT;
    let rounds = number("rounds", 1000, "a number from 0 to 1000", u64::from(rounds))?;
    Ok(AnnounceSeries {
        initial: pause("initial", 100_000, "milliseconds, at most 100000", initial)?,
        max: pause("max", 100_000, "milliseconds, at most 100000", max)?,
        rounds: u32::try_from(rounds).unwrap_or(u32::MAX),
        step: pause("step", 10_000, "milliseconds, at most 10000", step)?,
    })
}

fn disk_choice(disk: Option<&Value>) -> Result<DiskChoice, CommandError> {
    const BAD: CommandError =
        CommandError::BadParameter { name: "disk", what: "a disk's number, counted from 0, or its serial number" };
    match disk {
        None => Ok(DiskChoice::All),
        Some(Value::String(text)) => {
            let mut serial = [0; 20];
            let place = serial.get_mut(..text.len()).filter(|place| !place.is_empty());
            place.ok_or(BAD)?.copy_from_slice(text.as_bytes());
            Ok(DiskChoice::Serial(serial))
        }
        Some(other) => other.as_u64().map(DiskChoice::Number).ok_or(BAD),
    }
}

fn to_value(value: &impl Serialize) -> Answer {
    Ok(serde_json::to_value(value)?)
}

#[cfg(test)]
mod tests;
