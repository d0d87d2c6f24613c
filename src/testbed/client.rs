//! One checked connection: what is asked goes through the model, what is answered is compared with
//! it.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use parking_lot::Mutex;

use super::model::{Command, Key, Model};
use super::resp::{Parser, Reply};

/// Complaints kept in words; the rest are only counted.
const COMPLAINTS_MAX: usize = 20;
/// A connection that waits longer than this for a reply is given up.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// How often a waiting connection looks whether it is still wanted, in ms.
const LOOK_MS: u16 = 100;

/// Makes a new connection to the server.
pub type Dial = Arc<dyn Fn() -> io::Result<TcpStream> + Send + Sync>;

/// The time of CLOCK_MONOTONIC in µs, which all processes of a host share.
pub fn monotonic_us() -> u64 {
    // This clock exists on every kernel there is; a zero would make a wrong number, nothing worse.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000)
}

/// Connects as every client here does: no delay of small segments, and a congestion control that is
/// quick on short wires.
pub fn connect(address: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(address), socket2::Type::STREAM, None)?;
    socket.set_tcp_nodelay(true)?;
    // A kernel without cubic keeps its own.
    let _ = socket.set_tcp_congestion(b"cubic");
    socket.connect_timeout(&address.into(), timeout)?;
    Ok(socket.into())
}

/// What all connections together have seen.
#[derive(Debug, Default)]
pub struct Tally {
    /// Commands sent.
    pub requests: AtomicU64,
    /// Replies received.
    pub replies: AtomicU64,
    /// Writes that were answered, rightly.
    pub acknowledged_writes: AtomicU64,
    /// Keys that at the end did not hold what was acknowledged.
    pub lost_writes: AtomicU64,
    /// Replies that were not the one right reply, or that nobody asked for.
    pub wrong_replies: AtomicU64,
    /// Connections that ended although nobody closed them.
    pub resets: AtomicU64,
    /// Connections given up because no reply came for long.
    pub silent: AtomicU64,
    /// The first complaints, in words.
    pub complaints: Mutex<Vec<String>>,
    /// Set when the run is over: connections stop waiting.
    pub over: AtomicBool,
}

impl Tally {
    /// Whether anything went wrong.
    pub fn is_clean(&self) -> bool {
        [&self.lost_writes, &self.wrong_replies, &self.resets, &self.silent]
            .iter()
            .all(|count| count.load(Relaxed) == 0)
    }

    /// Counts a connection that cannot be opened where a server should be.
    pub(super) fn no_server(&self, number: usize, why: &io::Error) -> Broken {
        self.complain(&self.resets, format!("connection {number} cannot be opened: {why}"));
        Broken
    }

    fn complain(&self, count: &AtomicU64, what: String) {
        count.fetch_add(1, Relaxed);
        let mut complaints = self.complaints.lock();
        if complaints.len() < COMPLAINTS_MAX {
            complaints.push(what);
        }
    }
}

/// How long a connection waits and has waited for replies; read by others while it does.
#[derive(Debug, Default)]
pub struct Gauge {
    /// Since when it waits for a reply, 0 while it does not. All times are those of
    /// [`monotonic_us`].
    waiting_since_us: AtomicU64,
    longest_us: AtomicU64,
    last_reply_us: AtomicU64,
}

impl Gauge {
    /// Forgets the longest silence, not the one that lasts.
    pub fn reset(&self) {
        self.longest_us.store(0, Relaxed);
    }

    /// The longest time without a reply while one was awaited, in µs, since the last
    /// [`Gauge::reset`]; counts the silence that still lasts.
    pub fn silence_us(&self) -> u64 {
        let lasting = match self.waiting_since_us.load(Relaxed) {
            0 => 0,
            since => monotonic_us().saturating_sub(since),
        };
        self.longest_us.load(Relaxed).max(lasting)
    }

    /// Whether it waits for a reply since before `time_us`.
    pub fn waits_since_before(&self, time_us: u64) -> bool {
        let since = self.waiting_since_us.load(Relaxed);
        since != 0 && since < time_us
    }

    fn asked(&self) {
        self.waiting_since_us.store(monotonic_us(), Relaxed);
    }

    fn heard(&self, more_to_come: bool) {
        let now = monotonic_us();
        let since = self.waiting_since_us.swap(if more_to_come { now } else { 0 }, Relaxed);
        if since != 0 {
            self.longest_us.fetch_max(now.saturating_sub(since), Relaxed);
        }
        self.last_reply_us.store(now, Relaxed);
    }

    fn gave_up(&self) {
        self.heard(false);
    }

    /// When the last reply came.
    pub fn last_reply_us(&self) -> u64 {
        self.last_reply_us.load(Relaxed)
    }
}

/// The connection is of no more use. The tally knows why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// What a wrong answer means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CheckAgainst {
    /// Under load: the reply is wrong.
    Reply,
    /// At the end: a write is lost.
    Final,
}

/// A connection that checks every reply.
pub struct Connection {
    name: String,
    stream: TcpStream,
    parser: Parser,
    /// Sent and not answered: the command and the one right reply.
    asked: VecDeque<(Command, Reply)>,
    out: Vec<u8>,
    tally: Arc<Tally>,
    gauge: Arc<Gauge>,
    timeout: Duration,
}

impl Connection {
    /// Opens it. `name` appears in complaints.
    pub fn open(name: impl Into<String>, dial: &Dial, tally: Arc<Tally>, gauge: Arc<Gauge>) -> io::Result<Connection> {
        let stream = dial()?;
        stream.set_nonblocking(true)?;
        let (parser, asked, out) = Default::default();
        Ok(Connection { name: name.into(), stream, parser, asked, out, tally, gauge, timeout: WAIT_MAX })
    }

    /// The same, given up after another time than a minute without a reply.
    pub fn with_timeout(self, timeout: Duration) -> Connection {
        Connection { timeout, ..self }
    }

    /// Sends `commands` in one go and takes all their replies. Returns once every one has been
    /// answered, rightly or not.
    pub fn exchange(&mut self, model: &mut Model, commands: Vec<Command>) -> Result<(), Broken> {
        self.talk(model, commands, CheckAgainst::Reply)
    }

    /// Reads back every key the model is sure of. What differs is counted as a lost write.
    pub fn verify(&mut self, model: &mut Model) -> Result<(), Broken> {
        const DEPTH: usize = 16;
        self.expect_quiet()?;
        let keys: Vec<Key> = model.keys().filter(|key| model.is_certain(*key)).collect();
        for keys in keys.chunks(DEPTH) {
            self.talk(model, keys.iter().map(|key| Command::Get(*key)).collect(), CheckAgainst::Final)?;
        }
        self.expect_quiet()
    }

    fn talk(&mut self, model: &mut Model, commands: Vec<Command>, check: CheckAgainst) -> Result<(), Broken> {
        self.out.clear();
        self.tally.requests.fetch_add(commands.len() as u64, Relaxed);
        for command in commands {
            model.encode(&command, &mut self.out);
            let right = model.apply(&command);
            self.asked.push_back((command, right));
        }
        self.gauge.asked();
        let result = self.pump(model, check);
        if result.is_err() {
            self.gauge.gave_up();
            self.asked.drain(..).for_each(|(command, _)| model.doubt(&command));
        }
        result
    }

    /// Moves bytes both ways until everything is answered. Both at once: a server that cannot send
    /// stops reading.
    fn pump(&mut self, model: &mut Model, check: CheckAgainst) -> Result<(), Broken> {
        let mut sent = 0;
        while !self.asked.is_empty() {
            let left = self.out.get(sent..).unwrap_or_default();
            let mut wanted = PollFlags::POLLIN;
            wanted.set(PollFlags::POLLOUT, !left.is_empty());
            let mut fds = [PollFd::new(self.stream.as_fd(), wanted)];
            match poll(&mut fds, PollTimeout::from(LOOK_MS)) {
                Ok(0) => {
                    self.check_timeout()?;
                    continue;
                }
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(self.reset(&format!("poll: {e}"))),
            }
            if !left.is_empty() {
                match (&self.stream).write(left) {
                    Ok(count) => sent += count,
                    Err(e) if is_transient(&e) => {}
                    Err(e) => return Err(self.reset(&e.to_string())),
                }
            }
            if self.receive()? {
                self.check(model, check)?;
            }
        }
        if self.parser.rest().is_empty() { Ok(()) } else { Err(self.unasked()) }
    }

    /// Takes what has arrived; false if nothing has.
    fn receive(&mut self) -> Result<bool, Broken> {
        let mut buffer = [0; 16 << 10];
        match (&self.stream).read(&mut buffer) {
            Ok(0) => Err(self.reset("the server closed it")),
            Ok(count) => {
                self.parser.feed(buffer.get(..count).unwrap_or_default());
                Ok(true)
            }
            Err(e) if is_transient(&e) => Ok(false),
            Err(e) => Err(self.reset(&e.to_string())),
        }
    }

    fn check(&mut self, model: &mut Model, check: CheckAgainst) -> Result<(), Broken> {
        while !self.asked.is_empty() {
            let reply = match self.parser.next_reply() {
                Ok(Some(reply)) => reply,
                Ok(None) => break,
                Err(e) => {
                    // Nothing after this can be told apart any more.
                    self.tally.complain(&self.tally.wrong_replies, format!("{}: {e}", self.name));
                    return Err(Broken);
                }
            };
            let Some((command, right)) = self.asked.pop_front() else { break };
            self.gauge.heard(!self.asked.is_empty());
            self.tally.replies.fetch_add(1, Relaxed);
            model.heard(&reply);
            if reply != right {
                let count =
                    if check == CheckAgainst::Final { &self.tally.lost_writes } else { &self.tally.wrong_replies };
                let what = format!("{}: {}: expected {right:?}, got {reply:?}", self.name, model.describe(&command));
                self.tally.complain(count, what);
            } else if command.is_write() {
                self.tally.acknowledged_writes.fetch_add(1, Relaxed);
            }
        }
        Ok(())
    }

    /// Makes sure that no byte came that nobody asked for.
    fn expect_quiet(&mut self) -> Result<(), Broken> {
        if self.receive()? { Err(self.unasked()) } else { Ok(()) }
    }

    fn unasked(&self) -> Broken {
        let what = format!("{}: an answer to nothing: \"{}\"", self.name, super::resp::Excerpt(self.parser.rest()));
        self.tally.complain(&self.tally.wrong_replies, what);
        Broken
    }

    fn reset(&self, why: &str) -> Broken {
        let unanswered = self.asked.len();
        self.tally.complain(
            &self.tally.resets,
            format!("{}: the connection broke: {why} ({unanswered} unanswered)", self.name),
        );
        Broken
    }

    fn check_timeout(&self) -> Result<(), Broken> {
        if self.tally.over.load(Relaxed) {
            return Err(Broken);
        }
        let timeout_us = u64::try_from(self.timeout.as_micros()).unwrap_or(u64::MAX);
        if self.gauge.waits_since_before(monotonic_us().saturating_sub(timeout_us)) {
            let what = format!("{}: no reply for {:.1} s", self.name, self.timeout.as_secs_f64());
            self.tally.complain(&self.tally.silent, what);
            return Err(Broken);
        }
        Ok(())
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
