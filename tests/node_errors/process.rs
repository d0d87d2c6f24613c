//! A node as a process: what it says, how it is, how it ends.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, unbounded};
use mcd::control::Client;
use mcd::control::status::{NodeStatus, State};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long anything may take before a test says that it hangs.
pub const WAIT_MAX: Duration = Duration::from_secs(60);
/// How long is waited for an event before the status is looked at again.
const LOOK: Duration = Duration::from_millis(100);

/// A running `mcd`.
pub struct Node {
    child: Child,
    control: PathBuf,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Node {
    /// Starts it.
    pub fn start((mut command, control): (Command, PathBuf)) -> Node {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("mcd starts");
        let stderr = child.stderr.take().expect("a pipe");
        let (sender, lines) = unbounded();
        std::thread::spawn(move || {
            // It ends with the process, whose end of the pipe nobody else has.
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                let _ = sender.send(String::from_utf8_lossy(&line).into_owned());
            }
        });
        Node { child, control, lines, said: Vec::new() }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line on stderr; `None` at its end.
    fn next_line(&mut self, deadline: Instant) -> Option<String> {
        match self.lines.recv_deadline(deadline) {
            Ok(line) => {
                self.said.push(line.clone());
                Some(line)
            }
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no more lines; so far:\n{}", self.said.join("\n")),
        }
    }

    /// Waits for a line that is not yet seen and holds `part`.
    #[track_caller]
    pub fn wait_line(&mut self, part: &str) -> String {
        let deadline = Instant::now() + WAIT_MAX;
        while let Some(line) = self.next_line(deadline) {
            if line.contains(part) {
                return line;
            }
        }
        panic!("it ended and never said `{part}`; it said:\n{}", self.said.join("\n"));
    }

    /// Waits for a warning that holds `part`.
    #[track_caller]
    pub fn wait_warning(&mut self, part: &str) {
        let line = self.wait_line(part);
        assert!(line.contains(" WARN "), "no warning: {line}");
    }

    /// How often a line seen so far holds `part`.
    pub fn seen(&self, part: &str) -> usize {
        self.said.iter().filter(|line| line.contains(part)).count()
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.control, WAIT_MAX).expect("a control socket")
    }

    pub fn status(&self) -> NodeStatus {
        self.client().status(WAIT_MAX).expect("a status")
    }

    /// Waits until `good` is true of the status.
    #[track_caller]
    pub fn wait_status(&self, what: &str, good: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
        let deadline = Instant::now() + WAIT_MAX;
        let mut client = self.client();
        loop {
            let status = client.status(WAIT_MAX).expect("a status");
            if good(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "it never was {what}: {status}");
            client.next_event(LOOK).expect("a control connection");
        }
    }

    #[track_caller]
    pub fn wait_state(&self, state: State) -> NodeStatus {
        self.wait_status(&state.to_string(), |status| status.state == state)
    }

    /// Waits until the guest that this node boots runs.
    #[track_caller]
    pub fn wait_guest(&mut self) {
        self.wait_line("the guest starts");
        self.wait_status("running its guest", |status| status.running);
    }

    /// True if the guest runs here, alone.
    #[track_caller]
    pub fn assert_serves_alone(&self) {
        let status = self.status();
        assert!(status.running && status.state == State::Solo, "{status}");
    }

    pub fn terminate(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("it lives");
    }

    pub fn quit(&self) {
        self.client().execute("quit", Value::Null, WAIT_MAX).expect("quit");
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("it lives");
        self.child.wait().expect("it ends");
    }

    /// Waits for the end, which must be in order.
    #[track_caller]
    pub fn ends_well(&mut self) {
        let (code, lines) = self.end();
        assert!(code == Some(0) && lines.is_empty(), "{code:?}:\n{}", self.said.join("\n"));
    }

    /// Waits for the end, which must be with `code` and one line that holds all of `parts`.
    #[track_caller]
    pub fn fails(&mut self, code: i32, parts: &[&str]) {
        let (ended, lines) = self.end();
        assert_eq!(ended, Some(code), "{}", self.said.join("\n"));
        let [line] = lines.as_slice() else { panic!("not one line: {}", self.said.join("\n")) };
        for part in parts {
            assert!(line.contains(part), "`{part}` is missing in: {line}");
        }
        assert_eq!(self.said.last(), Some(line), "the line comes last");
    }

    /// Waits for the end: the code, and the lines that begin with `mcd: `.
    fn end(&mut self) -> (Option<i32>, Vec<String>) {
        let deadline = Instant::now() + WAIT_MAX;
        while self.next_line(deadline).is_some() {}
        let status = self.child.wait().expect("it ends");
        self.assert_no_panic();
        let lines = self.said.iter().filter(|line| line.starts_with("mcd: ")).cloned().collect();
        (status.code(), lines)
    }

    fn assert_no_panic(&self) {
        assert_eq!(self.seen("panicked"), 0, "{}", self.said.join("\n"));
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.said.extend(self.lines.iter());
        if std::thread::panicking() {
            eprintln!("---- a node said:\n{}\n----", self.said.join("\n"));
        } else {
            self.assert_no_panic();
        }
    }
}
