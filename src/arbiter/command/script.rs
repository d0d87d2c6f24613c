//! Running a script: its own process group, its output read and bounded, and its end waited for
//! with a limit and without a thread.

use super::super::Canceller;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};
use std::ffi::OsString;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much of a script's output is kept; what comes after is read and thrown away, so that it
/// never blocks the script.
const OUTPUT_BYTES_MAX: usize = 4 << 10;

/// How much of its last line is shown.
const LINE_CHARS_MAX: usize = 200;

/// How a run ended.
#[derive(Debug)]
pub(super) enum End {
    /// The script ended by itself. `line` is the last line it wrote.
    Exit { status: i32, line: String },
    /// A signal ended it.
    Killed { signal: i32 },
    /// It was still running when its time was over, and was killed.
    TimedOut,
    /// Nobody wants to know any more; it was killed.
    Cancelled,
    /// It could not be run.
    NotRun { why: String },
}

impl End {
    /// Why this is no answer to `question`.
    pub(super) fn explain(&self, question: &str, timeout: Duration) -> String {
        match self {
            End::Exit { status, line } if line.is_empty() => {
                format!("the script ended `{question}` with status {status}: it does not know; it is asked again")
            }
            End::Exit { status, line } => {
                format!("the script ended `{question}` with status {status} ({line}); it is asked again")
            }
            End::Killed { signal } => format!("signal {signal} ended the script; it is asked again"),
            End::TimedOut => format!(
                "the script did not end within {} ms and was killed; make it faster, or raise --arbiter-timeout-ms",
                timeout.as_millis()
            ),
            End::Cancelled => "this node is ending".to_owned(),
            End::NotRun { why } => why.clone(),
        }
    }
}

/// A script, and the means to end its run.
pub(super) struct Script {
    path: PathBuf,
    cancelled: Arc<EventFd>,
}

impl Script {
    pub(super) fn new(path: &Path) -> io::Result<Script> {
        let cancelled = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Script { path: path.to_owned(), cancelled: Arc::new(cancelled) })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it could be run, as far as can be known without running it.
    pub(super) fn check(&self) -> Result<(), String> {
        let is_file = std::fs::metadata(&self.path).map_err(|error| self.cannot_run(&error))?.is_file();
        if !is_file {
            return Err(self.cannot_run(&io::Error::other("it is not a file")));
        }
        access(&self.path, AccessFlags::X_OK).map_err(|errno| self.cannot_run(&errno.into()))
    }

    fn cannot_run(&self, error: &io::Error) -> String {
        format!("the script {} cannot be run ({error}); put it there and make it executable", self.path.display())
    }

    /// Ends the run in hand, and every later one before it begins.
    pub(super) fn canceller(&self) -> Canceller {
        let cancelled = self.cancelled.clone();
        Box::new(move || {
            // Fails only when it was done very often already.
            let _ = cancelled.write(1);
        })
    }

    /// Runs it to its end, or to the end of `timeout`, and never leaves anything of its process
    /// group behind.
    pub(super) fn run(&self, arguments: &[&str], environment: &[(&str, String)], timeout: Duration) -> End {
        let deadline = Instant::now() + timeout;
        let mut child = match self.start(arguments, environment) {
            Ok(running) => running,
            Err(error) => return End::NotRun { why: self.cannot_run(&error) },
        };
        let waited = child.wait_for_end(&self.cancelled, deadline);
        let ended = child.end();
        match (waited, ended) {
            (Ok(Waited::Ended), Ok(status)) => match (status.code(), status.signal()) {
                (Some(status), _) => End::Exit { status, line: last_line(&child.output) },
                (None, signal) => End::Killed { signal: signal.unwrap_or(0) },
            },
            (Ok(Waited::TimedOut), _) => End::TimedOut,
            (Ok(Waited::Cancelled), _) => End::Cancelled,
            (Err(error), _) | (_, Err(error)) => End::NotRun { why: format!("the script's end was not seen: {error}") },
        }
    }

    fn start(&self, arguments: &[&str], environment: &[(&str, String)]) -> io::Result<Running> {
        let (reader, writer) = io::pipe()?;
        set_nonblocking(&reader)?;
        // Nothing here makes the standard library fork, which would copy the page tables of a whole
        // guest: it spawns.
        let mut command = Command::new(&self.path);
        // What a service manager or a shell left in this node's environment must not change what
        // the script does, and secrets in it are not the script's to see.
        command.env_clear().envs(inherited()).envs(environment.iter().map(|(name, value)| (name, value)));
        command.args(arguments);
        command.current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let child = command.spawn()?;
        // The writing ends in `command` would keep the pipe open.
        drop(command);
        let mut running =
            Running { group: pid_of(&child), child, reader, output: Vec::new(), pidfd: None, reaped: false };
        running.pidfd = Some(pidfd_open(running.group)?);
        Ok(running)
    }
}

/// The variables of this process that a script is given: where programs and a user's keys are, and
/// how times are written.
fn inherited() -> impl Iterator<Item = (&'static str, OsString)> {
    const NAMES: [&str; 3] = ["PATH", "HOME", "TZ"];
    const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let given = |name| std::env::var_os(name).or_else(|| (name == "PATH").then(|| PATH.into()));
    NAMES.into_iter().filter_map(move |name| Some((name, given(name)?)))
}

fn pid_of(child: &Child) -> Pid {
    // A pid always fits; nothing bad is in group 0 either, for it is refused where it is used.
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
}

fn set_nonblocking(reader: &PipeReader) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(reader.as_fd(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(())
}

/// A file descriptor that can be read once the process has ended.
fn pidfd_open(pid: Pid) -> io::Result<OwnedFd> {
    // SAFETY: the system call takes two numbers and touches no memory.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) };
    match i32::try_from(fd) {
        // SAFETY: the kernel just made this file descriptor for us, and nobody else knows of it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

enum Waited {
    Ended,
    TimedOut,
    Cancelled,
}

/// A script that runs. Dropped, it is killed with its process group.
struct Running {
    child: Child,
    group: Pid,
    pidfd: Option<OwnedFd>,
    reader: PipeReader,
    output: Vec<u8>,
    reaped: bool,
}

impl Running {
    fn wait_for_end(&mut self, cancelled: &EventFd, deadline: Instant) -> io::Result<Waited> {
        let mut writing = true;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Waited::TimedOut);
            }
            // Rounded up, so as not to turn in circles through the last millisecond.
            let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
            let Some(pidfd) = &self.pidfd else { return Err(io::ErrorKind::NotFound.into()) };
            let mut fds = [
                PollFd::new(cancelled.as_fd(), PollFlags::POLLIN),
                PollFd::new(pidfd.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.reader.as_fd(), if writing { PollFlags::POLLIN } else { PollFlags::empty() }),
            ];
            match poll(if writing { &mut fds } else { &mut fds[..2] }, timeout) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let [stop, end, text] = fds.map(|fd| fd.any().unwrap_or(false));
            if stop {
                return Ok(Waited::Cancelled);
            }
            if text && writing {
                writing = self.read_some();
            }
            if end {
                // What it wrote last may still be in the pipe; what a process it left behind writes
                // is of no interest.
                self.read_some();
                return Ok(Waited::Ended);
            }
        }
    }

    /// Reads what is there, at most one pipe full; false when nobody can write any more.
    fn read_some(&mut self) -> bool {
        let mut buffer = [0; 64 << 10];
        match self.reader.read(&mut buffer) {
            Ok(0) => false,
            Ok(count) => {
                self.output.extend_from_slice(buffer.get(..count).unwrap_or_default());
                // The end is kept: that is where a script writes what went wrong.
                let over = self.output.len().saturating_sub(OUTPUT_BYTES_MAX);
                self.output.drain(..over);
                true
            }
            Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        }
    }

    /// Kills what is left of the group and takes the script's status.
    fn end(&mut self) -> io::Result<std::process::ExitStatus> {
        // Not yet waited for, the script still holds its number, so that this is its group and no
        // other.
        if !self.reaped && self.group.as_raw() > 1 {
            // An error means that the group is gone.
            let _ = killpg(self.group, Signal::SIGKILL);
        }
        self.reaped = true;
        self.child.wait()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.end();
        }
    }
}

/// The last line with anything on it, made fit for a log.
fn last_line(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LINE_CHARS_MAX).collect()
}
