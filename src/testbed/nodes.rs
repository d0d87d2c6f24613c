//! Nodes as real processes: started in a host's network, asked over their control sockets, killed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::error::TestbedError;
use super::namespaces::{GUEST_IPV4, GUEST_PREFIX_LEN, HostName, Namespaces, TAP};
use super::wait::{WAIT_MAX, WaitLimits, wait_on};
use crate::control::metrics::EpochsReply;
use crate::control::status::NodeStatus;
use crate::control::{Client, ClientError};

/// Where each node listens on the link between the hosts.
const PORT: u16 = 7401;
/// The name of the guest.
const GUEST: &str = "demo";
/// How long a node may take to answer on its control socket.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a test waits for a node, and how often it looks: a node has no event for most of what
/// its status shows.
const WAIT: WaitLimits = WaitLimits { look: Duration::from_millis(2), limit: WAIT_MAX };
/// Lines of a log that go into an error.
const LOG_LINES: usize = 20;
/// How much of the end of a log is read, in bytes.
const LOG_TAIL_BYTES: u64 = 16 << 10;

/// A directory for one run, removed with everything in it when dropped.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    keep: bool,
}

impl RunDir {
    /// Makes it where temporary files are.
    pub fn new() -> io::Result<RunDir> {
        let base = std::env::temp_dir();
        // A control socket's path has at most 107 bytes.
        const BASE_MAX: usize = 60;
        let base = if base.as_os_str().len() > BASE_MAX { PathBuf::from("/tmp") } else { base };
        let path = nix::unistd::mkdtemp(&base.join("mcd-run-XXXXXX"))?;
        fs::create_dir(path.join("arbiter"))?;
        Ok(RunDir { path, keep: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves it where it is for good.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.keep {
            // A rest in the directory of temporary files harms nobody.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The settings of both nodes of a pair.
#[derive(Clone, Debug)]
pub struct NodeSettings {
    /// The guest's memory, in MiB.
    pub memory_mib: u32,
    /// The guest's vCPUs.
    pub cpus: u8,
    /// The longest an epoch may last, in ms.
    pub interval_ms: u64,
    /// The program and its first arguments; empty: this very program.
    pub program: Vec<OsString>,
    /// The arbiter as `--arbiter` takes it; if absent, files in the directory of the run.
    pub arbiter: Option<String>,
    /// More flags for every node, with their dashes and values.
    pub flags: Vec<String>,
    /// More flags for a node that boots the guest.
    pub boot_flags: Vec<String>,
}

impl Default for NodeSettings {
    fn default() -> NodeSettings {
        NodeSettings {
            memory_mib: 128,
            cpus: 1,
            interval_ms: 20,
            program: Vec::new(),
            arbiter: None,
            flags: Vec::new(),
            boot_flags: Vec::new(),
        }
    }
}

/// Which role a node starts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAs {
    /// It boots the guest.
    Primary,
    /// It boots the guest although the arbiter knows it as running elsewhere.
    ColdStart,
    /// It joins the node on the other host.
    Secondary,
}

/// A node's process. Dropping it kills it.
pub struct Node {
    name: String,
    host: HostName,
    child: Child,
    control: PathBuf,
    log: PathBuf,
    client: Option<Client>,
    next_sample: u64,
}

impl Node {
    /// Starts a node on `host`. `name` tells it from others of the run and names its files in
    /// `dir`.
    ///
    /// The node is killed when the calling thread ends, so call it from one that lasts as long as
    /// the run.
    pub fn start(
        role: StartAs,
        host: HostName,
        name: &str,
        settings: &NodeSettings,
        namespaces: &Namespaces,
        dir: &RunDir,
    ) -> io::Result<Node> {
        let (control, log) = (dir.path().join(format!("{name}.sock")), dir.path().join(format!("{name}.log")));
        let mut command = match settings.program.split_first() {
            None => namespaces.host(host).command(std::env::current_exe()?),
            Some((program, first)) => {
                let mut command = namespaces.host(host).command(program);
                command.args(first);
                command
            }
        };
        let files = || format!("file:{}", dir.path().join("arbiter").display());
        let mut flags = vec![
            ("--guest", GUEST.to_owned()),
            ("--tap", TAP.to_owned()),
            ("--guest-ip", format!("{GUEST_IPV4}/{GUEST_PREFIX_LEN}")),
            ("--listen", SocketAddr::from((host.link_ipv4(), PORT)).to_string()),
            ("--arbiter", settings.arbiter.clone().unwrap_or_else(files)),
            ("--control", control.display().to_string()),
            ("--interval-ms", settings.interval_ms.to_string()),
        ];
        match role {
            StartAs::Primary | StartAs::ColdStart => {
                match role {
                    StartAs::ColdStart => command.args(["cold-start", "--i-know-both-nodes-are-dead"]),
                    _ => command.arg("primary"),
                };
                command.args(&settings.boot_flags);
                flags.push(("--memory", format!("{}M", settings.memory_mib)));
                flags.push(("--cpus", settings.cpus.to_string()));
            }
            StartAs::Secondary => {
                command.arg("secondary");
                flags.push(("--peer", SocketAddr::from((host.other().link_ipv4(), PORT)).to_string()));
            }
        }
        command.args(flags.iter().flat_map(|(flag, value)| [*flag, value]));
        command.args(&settings.flags);
        let output = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        // A Ctrl-C at the terminal is for the run, which then ends its nodes in its own order.
        command.process_group(0);
        die_with_parent(&mut command);
        let child = command.spawn()?;
        Ok(Node { name: name.to_owned(), host, child, control, log, client: None, next_sample: 0 })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host it is on.
    pub fn host(&self) -> HostName {
        self.host
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Kills it with SIGKILL and returns at once, without waiting for the end.
    pub fn kill(&mut self) -> io::Result<()> {
        self.client = None;
        self.child.kill()
    }

    /// Sends it a signal, if it has not ended.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        // A child that was waited for has no process any more, and its number may be another's.
        if self.ended().is_some() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let pid = i32::try_from(self.child.id()).map_err(io::Error::other)?;
        Ok(nix::sys::signal::kill(Pid::from_raw(pid), signal)?)
    }

    /// Its status; `None` while it does not answer yet or no more.
    pub fn status(&mut self) -> Option<NodeStatus> {
        self.ask(|client| client.status(ANSWER_TIMEOUT))
    }

    /// The epochs committed since the last call; `None` if it does not answer.
    pub fn new_epochs(&mut self) -> Option<EpochsReply> {
        let arguments = json!({"since": self.next_sample});
        let reply: EpochsReply =
            self.ask(|client| client.execute_as("mc-query-epochs", arguments.clone(), ANSWER_TIMEOUT))?;
        self.next_sample = reply.next;
        Some(reply)
    }

    fn ask<T>(&mut self, ask: impl FnOnce(&mut Client) -> Result<T, ClientError>) -> Option<T> {
        let mut client = match self.client.take() {
            Some(client) => client,
            None => Client::connect(&self.control, ANSWER_TIMEOUT).ok()?,
        };
        let answer = ask(&mut client).ok()?;
        self.client = Some(client);
        Some(answer)
    }

    /// Waits until its status is as `wanted`, for [`WAIT_MAX`] at most. `what` completes "for n1
    /// to".
    ///
    /// # Errors
    /// If it ends instead, or the time is over; with its log.
    pub fn wait_status(
        &mut self,
        what: &str,
        mut wanted: impl FnMut(&NodeStatus) -> bool,
    ) -> Result<NodeStatus, TestbedError> {
        let check = |node: &mut Node| Ok(node.status().filter(&mut wanted));
        let alive = |node: &mut Node| match node.ended() {
            None => Ok(()),
            Some(status) => Err(TestbedError::died(node, status)),
        };
        wait_on(self, WAIT, check, alive, |node| node.too_late(what))
    }

    /// Waits until it has ended, for [`WAIT_MAX`] at most.
    ///
    /// # Errors
    /// If it does not end; with its log.
    pub fn wait_ended(&mut self) -> Result<ExitStatus, TestbedError> {
        wait_on(self, WAIT, |node| Ok(node.ended()), |_| Ok(()), |node| node.too_late("end"))
    }

    /// Ends it in order by the command `quit`, and waits until it has ended.
    ///
    /// # Errors
    /// If it does not take the command, or does not end.
    pub fn quit(&mut self) -> Result<(), TestbedError> {
        let refused = |source| TestbedError::Control { name: self.name.clone(), source };
        let mut client = Client::connect(&self.control, WAIT_MAX).map_err(refused)?;
        client.execute("quit", Value::Null, WAIT_MAX).map_err(refused)?;
        self.wait_ended().map(drop)
    }

    fn too_late(&self, what: &str) -> TestbedError {
        TestbedError::TooLate {
            what: format!("{} to {what}", self.name),
            limit_s: WAIT_MAX.as_secs(),
            logs: self.log_section(),
        }
    }

    /// The last lines of its log under a heading, for an error.
    pub fn log_section(&self) -> String {
        format!("\n--- the last lines of {}'s log:\n{}", self.name, self.log_tail(LOG_LINES))
    }

    /// The last `lines` lines of its log.
    pub fn log_tail(&self, lines: usize) -> String {
        let read = || -> io::Result<String> {
            let mut file = File::open(&self.log)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_else(|error| format!("(its log cannot be read: {error})"));
        let all: Vec<&str> = text.lines().collect();
        all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended by itself; either way it must be waited for, or it stays in the process
        // table.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Makes the kernel kill the child when the thread that starts it ends, by whatever cause.
pub fn die_with_parent(command: &mut Command) {
    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
            // The parent may have died before the line above.
            if nix::unistd::getppid() == parent { Ok(()) } else { Err(io::ErrorKind::NotConnected.into()) }
        })
    };
}
