//! An etcd process: for tests of the arbiter, for the fault injection and for the lab.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

use super::error::TestbedError;
use super::namespaces::{Namespace, NamespaceError, find_tool};
use super::nodes::die_with_parent;

/// The port clients use, where it need not be another.
pub const ETCD_PORT: u16 = 2379;
/// How long it may take to start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// What it logs when it serves clients: version 3.4 the one, newer ones the other.
const SERVES: [&str; 2] = ["client requests on", "serving client traffic"];
/// Longest line of its log that is taken whole, in bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// What an etcd is started with.
#[derive(Clone, Debug)]
pub struct EtcdSettings {
    /// The network it runs in; `None`: that of this process.
    pub network: Option<Arc<Namespace>>,
    /// Its name in its cluster.
    pub name: String,
    /// Where its data is.
    pub data: PathBuf,
    /// Where it serves clients.
    pub url: String,
    /// More flags, with their dashes and values.
    pub flags: Vec<String>,
    /// The file for its log, overwritten by each start.
    pub log: PathBuf,
}

/// An etcd that can be started and stopped. Dropping it ends it.
#[derive(Debug)]
pub struct EtcdProcess {
    settings: EtcdSettings,
    child: Option<Child>,
    served: Option<Receiver<()>>,
}

impl EtcdProcess {
    /// One that does not run yet.
    pub fn new(settings: EtcdSettings) -> EtcdProcess {
        EtcdProcess { settings, child: None, served: None }
    }

    /// Starts it, with the data it has, and waits until it serves.
    ///
    /// # Errors
    /// If there is no etcd, or it does not serve in time.
    pub fn start(&mut self) -> Result<(), TestbedError> {
        self.spawn()?;
        self.wait_serving()
    }

    /// Starts it and does not wait: a member of a cluster serves nobody until there is a quorum.
    ///
    /// # Errors
    /// If there is no etcd, or the system refuses a process.
    pub fn spawn(&mut self) -> Result<(), TestbedError> {
        let EtcdSettings { network, name, data, url, flags, log } = &self.settings;
        let program = find_tool("etcd").ok_or(NamespaceError::NoTool { tool: "etcd", package: "etcd-server" })?;
        let mut command = match network {
            Some(network) => network.command(program),
            None => Command::new(program),
        };
        command.arg("--data-dir").arg(data).args(["--name", name]);
        command.args(["--listen-client-urls", url, "--advertise-client-urls", url]).args(flags);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        let log = File::create(log).map_err(TestbedError::io("make a log for etcd"))?;
        let mut child = command.spawn().map_err(TestbedError::io("start etcd"))?;
        let (serves, served) = bounded(1);
        if let Some(stderr) = child.stderr.take() {
            let follow = std::thread::Builder::new().name("etcd's log".to_owned());
            follow
                .spawn(move || {
                    // A full disk costs the log, not the run.
                    let _ = follow_log(stderr, log, &serves);
                })
                .map_err(TestbedError::io("follow etcd's log"))?;
        }
        (self.child, self.served) = (Some(child), Some(served));
        Ok(())
    }

    /// Waits until one that was spawned serves.
    ///
    /// # Errors
    /// If it ends instead, or takes too long; with the log.
    pub fn wait_serving(&self) -> Result<(), TestbedError> {
        let Some(served) = &self.served else { return Ok(()) };
        served.recv_timeout(START_LIMIT).map_err(|_| {
            let said = std::fs::read_to_string(&self.settings.log).unwrap_or_default();
            TestbedError::TooLate {
                what: "etcd to serve".to_owned(),
                limit_s: START_LIMIT.as_secs(),
                logs: format!("\n{said}"),
            }
        })
    }

    /// Ends it as a crash would, and waits for the end.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; either way it must be waited for.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Sends a signal. A stop is waited for: on a busy machine a process goes on answering until
    /// one of its threads has noticed.
    ///
    /// # Errors
    /// If it does not run.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let child = self.child.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let pid = Pid::from_raw(i32::try_from(child.id()).map_err(io::Error::other)?);
        kill(pid, signal)?;
        if signal == Signal::SIGSTOP {
            waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED)?;
        }
        Ok(())
    }

    /// Where it serves clients.
    pub fn url(&self) -> &str {
        &self.settings.url
    }
}

impl Drop for EtcdProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Copies the log to its end, so that the pipe never fills, and reports the line that says that
/// clients are served.
fn follow_log(stderr: ChildStderr, mut log: File, serves: &Sender<()>) -> io::Result<()> {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    while io::Read::take(&mut lines, LINE_BYTES_MAX).read_until(b'\n', &mut line)? > 0 {
        let written = log.write_all(&line);
        let text = String::from_utf8_lossy(&line);
        if SERVES.iter().any(|words| text.contains(words)) {
            // Full or closed: an earlier line was reported, or nobody waits any more.
            let _ = serves.try_send(());
        }
        if written.is_err() {
            return io::copy(&mut lines, &mut io::sink()).map(drop);
        }
        line.clear();
    }
    Ok(())
}
