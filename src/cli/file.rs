//! `--config FILE`: a file of flags without their dashes.
//!
//! Every key becomes the flag of its name and is read by the same code, with the flags of the
//! command line, which take the place of the file's. So the file can never differ from the flags in
//! what it takes or means.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use clap::{Arg, ArgAction, Command};
use toml::{Table, Value};

use super::exit::Failure;

/// Nobody writes a larger one on purpose.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The flags a file stands for, for the subcommand `name` of `mcd`.
pub(super) fn flags(path: &Path, mcd: &Command, name: &str) -> Result<Vec<OsString>, Failure> {
    let fail = |why: String| Failure::usage(format!("config file {}: {why}", path.display()));
    let text =
        read(path).map_err(|why| fail(format!("{why}; --config names a TOML file, see docs/mcd.toml.example")))?;
    let table: Table = toml::from_str(&text).map_err(|e| fail(describe(&text, &e)))?;
    let mut flags = Vec::new();
    for (key, value) in &table {
        check_key(mcd, name, key).map_err(fail)?;
        let values = match value {
            Value::Array(values) if is_repeated(mcd, name, key) => values.as_slice(),
            value => std::slice::from_ref(value),
        };
        for value in values {
            let value = match value {
                Value::String(text) => text.clone(),
                Value::Integer(number) => number.to_string(),
                Value::Boolean(value) => value.to_string(),
                _ => {
                    return Err(fail(format!(
                        "key `{key}`: the value must be a string, a whole number, true or false"
                    )));
                }
            };
            flags.push(OsString::from(format!("--{key}={value}")));
        }
    }
    Ok(flags)
}

fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let file = File::open(path).map_err(|e| e.to_string())?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it is larger than {FILE_BYTES_MAX} bytes"));
    }
    Ok(text)
}

/// One line for a file that is no TOML: where, and what.
fn describe(text: &str, error: &toml::de::Error) -> String {
    let what = error.message().lines().collect::<Vec<_>>().join(", ");
    let before = error.span().and_then(|span| text.get(..span.start));
    match before {
        Some(before) => format!("line {}: {what}", before.matches('\n').count() + 1),
        None => what,
    }
}

/// Whether a key is a flag of the command that may stand in a file.
fn check_key(mcd: &Command, name: &str, key: &str) -> Result<(), String> {
    let has =
        |command: &Command, key: &str| command.get_arguments().any(|arg| arg.get_long() == Some(key) && in_file(arg));
    let Some(command) = mcd.find_subcommand(name) else { return Ok(()) };
    if has(command, key) {
        return Ok(());
    }
    if command.get_arguments().any(|arg| arg.get_long() == Some(key) && !in_file(arg)) {
        return Err(format!("key `{key}` is only taken on the command line"));
    }
    let dashed = key.replace('_', "-").to_lowercase();
    if has(command, &dashed) {
        return Err(format!("unknown key `{key}`: write `{dashed}`"));
    }
    let other =
        mcd.get_subcommands().find(|other| matches!(other.get_name(), "primary" | "secondary") && has(other, key));
    match other {
        Some(other) => Err(format!("key `{key}` is for `mcd {}`, not for `mcd {name}`", other.get_name())),
        None => Err(format!("unknown key `{key}`: keys are the flags of `mcd {name}` without the dashes")),
    }
}

/// A file describes a node, not what an operator asserts of one moment or what one start goes on
/// from, and it names no further file.
fn in_file(arg: &Arg) -> bool {
    arg.get_id() != "config"
        && arg.get_id() != "restore"
        && matches!(arg.get_action(), ArgAction::Set | ArgAction::Append)
}

/// Whether a flag may be given more than once: in a file its values are a list.
fn is_repeated(mcd: &Command, name: &str, key: &str) -> bool {
    let command = mcd.find_subcommand(name);
    let mut arguments = command.into_iter().flat_map(Command::get_arguments);
    arguments.any(|arg| arg.get_long() == Some(key) && matches!(arg.get_action(), ArgAction::Append))
}

/// Takes out of the file's flags those that are given on the command line too: these win, they do
/// not add. `given` are the flags as they were typed.
pub(super) fn without_overridden(
    mut flags: Vec<OsString>,
    mcd: &Command,
    name: &str,
    given: &[OsString],
) -> Vec<OsString> {
    let is_key = |flag: &OsString, key: &str| {
        let text = flag.to_str().and_then(|flag| flag.strip_prefix("--")).and_then(|flag| flag.strip_prefix(key));
        text.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    };
    for argument in mcd.find_subcommand(name).into_iter().flat_map(Command::get_arguments) {
        if let Some(key) = argument.get_long()
            && given.iter().any(|flag| is_key(flag, key))
        {
            flags.retain(|flag| !is_key(flag, key));
        }
    }
    flags
}
