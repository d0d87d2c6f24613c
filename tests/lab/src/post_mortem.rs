//! What is looked at after a scenario went wrong, while everything still stands: who answers, and
//! where something waits. A client without a reply says nothing of where it got lost; this does.

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use mcd::testbed::namespaces::{HostName, find_tool};

use crate::channel::Output;
use crate::error::LabError;
use crate::lab::Lab;

/// How long a question may go without an answer.
const LIMIT: Duration = Duration::from_secs(20);

/// What is asked beside the clients: their connections, whom they take for the guest, and behind
/// which port the bridge has it.
const QUESTIONS_HERE: [(&str, &[&str]); 3] = [
    ("ss", &["--tcp", "--info", "--extended", "--options", "--numeric"]),
    ("ip", &["neigh"]),
    ("bridge", &["fdb", "show", "br", "br0"]),
];
/// What is asked in a host.
const QUESTIONS_HOST: [&str; 5] =
    ["mcd status", "cat /proc/net/dev", "cat /proc/interrupts", "top -b -n 1 | head -n 12", "dmesg | tail -n 20"];
/// What keeps the machine's state, and ends it.
const SAVE_MACHINE: &str = "mcd snapshot save /disk/post-mortem.snap --guest lab --stop";
const SAVE_LIMIT: Duration = Duration::from_secs(120);
/// What is asked in the guest, over its network and over its console.
const QUESTION_GUEST: &str = "cat /proc/interrupts; netstat -tn; ps; dmesg | tail -n 20";

impl Lab {
    /// Looks at everything, and writes it to a file.
    pub fn post_mortem(&mut self) -> Result<PathBuf, LabError> {
        let mut found = String::new();
        let mut section = |title: &str, text: &str| {
            // Writing to a string does not fail.
            let _ = writeln!(found, "== {title}\n{}\n", text.trim_end());
        };
        section("clients", &self.silences());
        section("a new client", if self.guest_serves() { "is served" } else { "is not served" });
        for (tool, arguments) in QUESTIONS_HERE {
            section(&format!("{tool} {}", arguments.join(" ")), &self.ask_here(tool, arguments));
        }
        for name in [HostName::A, HostName::B] {
            // A host without power has nothing to say.
            let Ok(host) = self.host(name) else { continue };
            for question in QUESTIONS_HOST {
                let said = match host.try_run(question, LIMIT) {
                    Ok(Output { code: 0, text }) => text,
                    Ok(Output { code, text }) => format!("{text}\nended with {code}"),
                    Err(error) => error.to_string(),
                };
                section(&format!("host {name}: {question}"), &said);
            }
        }
        if self.guest().is_linux() {
            let said = self.guest_run(QUESTION_GUEST, LIMIT).unwrap_or_else(|error| error.to_string());
            section(&format!("the guest: {QUESTION_GUEST}"), &said);
            let console = self.ask_console("echo a''live", "alive");
            section("the guest's console", &console.map_or_else(|error| error.to_string(), |()| "answers".to_owned()));
        }
        // The machine as it is, for whoever wants to see its registers. It stays on the host's
        // disk.
        let runner = self.runner;
        let saved = self.host(runner).and_then(|host| host.run(SAVE_MACHINE, SAVE_LIMIT));
        section(SAVE_MACHINE, &saved.unwrap_or_else(|error| error.to_string()));
        let path = self.logs().join("post-mortem.log");
        fs::write(&path, found).map_err(LabError::io(format!("write {}", path.display())))?;
        Ok(path)
    }

    /// Runs a program beside the clients; what it prints.
    fn ask_here(&self, tool: &str, arguments: &[&str]) -> String {
        let Some(program) = find_tool(tool) else { return format!("there is no {tool}") };
        let output = self.network().command(program).args(arguments).stdin(Stdio::null()).output();
        output.map_or_else(
            |error| error.to_string(),
            |output| [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat(),
        )
    }
}
