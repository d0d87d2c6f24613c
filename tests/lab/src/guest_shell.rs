//! Talking with the Linux guest: over its console, through the shell it has for the lab, and with
//! what watches its clocks.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mcd::testbed::client::connect;
use mcd::testbed::namespaces::GUEST_IPV4;

use crate::error::LabError;
use crate::guest_report::{CLOCKS_PORT, Clocks, DiskSpeed};
use crate::host::COMMAND_LIMIT;
use crate::lab::Lab;

/// The port on which the guest has a shell for the lab.
const SHELL_PORT: u16 = 7000;
/// Most that a command there may print, in bytes.
const OUTPUT_BYTES_MAX: u64 = 4 << 20;
/// What the exit status of a command there follows.
const STATUS: &str = "lab: status ";
/// How often the time is asked for: the quickest answer is the most exact one.
const TIME_QUESTIONS: u32 = 5;

/// What the guest's clocks did, and how far its wall clock is off.
#[derive(Clone, Debug)]
pub struct Times {
    /// What they did.
    pub clocks: Clocks,
    /// The guest's wall clock less this machine's, in ms.
    pub wall_off_ms: f64,
    /// It may be off by so much more or less, in ms.
    pub wall_unsure_ms: f64,
}

impl Lab {
    /// Types a line on the guest's console on the host where it runs, and waits until `answer` is
    /// on its screen.
    pub fn ask_console(&mut self, line: &str, answer: &str) -> Result<(), LabError> {
        let runner = self.runner;
        self.host(runner)?.run(&format!("ask-console '{line}' '{answer}'"), COMMAND_LIMIT).map(drop)
    }

    /// Runs a command in the guest, which must succeed, `limit` between two signs of life; what it
    /// prints.
    pub fn guest_run(&mut self, command: &str, limit: Duration) -> Result<String, LabError> {
        let address = SocketAddr::from((GUEST_IPV4, SHELL_PORT));
        let line = format!("{{ {command}\n}} 2>&1\necho \"{STATUS}$?\"\n");
        let ask = move || -> io::Result<String> {
            let mut stream = connect(address, COMMAND_LIMIT)?;
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(line.as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            let mut bytes = Vec::new();
            stream.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let said = self.network().run(ask)?.map_err(LabError::io(format!("run `{command}` in the guest")))?;
        let (output, status) = said.rsplit_once(STATUS).unwrap_or((said.as_str(), "unknown"));
        if status.trim() == "0" {
            return Ok(output.to_owned());
        }
        Err(LabError::Wrong(format!("in the guest `{command}` ended with {}: {output}", status.trim())))
    }

    /// The guest's kernel log.
    pub fn guest_log(&mut self) -> Result<Vec<String>, LabError> {
        Ok(self.guest_run("dmesg", COMMAND_LIMIT)?.lines().map(str::to_owned).collect())
    }

    /// What the guest's clocks did so far.
    pub fn guest_times(&mut self) -> Result<Times, LabError> {
        let address = SocketAddr::from((GUEST_IPV4, CLOCKS_PORT));
        let ask = move || -> io::Result<Times> {
            let stream = connect(address, COMMAND_LIMIT)?;
            stream.set_read_timeout(Some(COMMAND_LIMIT))?;
            let mut stream = BufReader::new(stream);
            let mut best: Option<Times> = None;
            for _ in 0..TIME_QUESTIONS {
                let (asked, wall) = (Instant::now(), SystemTime::now());
                stream.get_mut().write_all(b"?\n")?;
                let mut line = String::new();
                stream.by_ref().take(OUTPUT_BYTES_MAX).read_line(&mut line)?;
                let half_ms = asked.elapsed().as_secs_f64() * 500.0;
                let clocks: Clocks = serde_json::from_str(&line).map_err(io::Error::other)?;
                let asked_ms = wall.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1000.0);
                let wall_off_ms = clocks.realtime_ns as f64 / 1e6 - (asked_ms + half_ms);
                // The newest counts, with the best guess so far of how far the wall clock is off.
                best = Some(match best {
                    Some(old) if old.wall_unsure_ms <= half_ms => Times { clocks, ..old },
                    _ => Times { clocks, wall_off_ms, wall_unsure_ms: half_ms },
                });
            }
            best.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        self.network().run(ask)?.map_err(LabError::io("ask for the guest's clocks"))
    }

    /// Measures the guest's disk.
    pub fn guest_disk_speed(&mut self) -> Result<DiskSpeed, LabError> {
        const LIMIT: Duration = Duration::from_secs(240);
        let text = self.guest_run("mcd-lab-guest disk /data", LIMIT)?;
        serde_json::from_str(&text)
            .map_err(|error| LabError::Wrong(format!("the guest's disk was not measured: {error}: {text}")))
    }
}
