//! The guest's console outside the machine: standard output, a file, or a socket that `mcd console`
//! joins.
//!
//! ```text
//!  vCPU ──byte──▶ ring (the newest 128 KiB) ──▶ one thread per reader ──▶ stdout, file, client
//!                                                stdin, client ──▶ the machine's serial port
//! ```
//!
//! The vCPU only ever waits for the ring's lock. A reader that is too slow loses what was oldest
//! and is told so; a client of the socket first gets what the ring still has, so that it sees where
//! the guest is.

pub mod client;
mod ring;
pub mod terminal;

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::Mutex;

use self::ring::{Ring, RingWriter};
use self::terminal::{ESCAPE, RawTerminal};
use super::ControlError;
use super::bind::BoundSocket;
use crate::machine::ConsoleInput;

/// Most clients of a console's socket at once.
const CLIENTS_MAX: usize = 8;
/// How long the end of a node waits for readers to take the guest's last words.
const GOODBYE_LIMIT: Duration = Duration::from_secs(1);
/// Bytes of input taken at once.
const INPUT_CHUNK_BYTES: usize = 1024;

/// Where the console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTo {
    /// The guest's output goes to standard output.
    Stdout,
    /// That, and standard input goes to the guest; a terminal is put into raw mode.
    Stdio,
    /// The guest's output is appended to a file.
    File(PathBuf),
    /// A unix socket, for `mcd console`.
    Socket(PathBuf),
    /// Nowhere.
    None,
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file cannot be written.
    #[error("--console file:{path}: {reason}; choose a file that can be written")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's error.
        reason: io::Error,
    },
    /// The socket cannot be opened.
    #[error("--console: {0}")]
    Socket(#[from] ControlError),
    /// No thread or terminal.
    #[error("the console cannot be opened ({0}); the host is out of resources or the terminal is gone")]
    System(#[from] io::Error),
}

/// The way to the machine's serial port: a node builds and drops machines, and keeps its console.
type Plug = Arc<Mutex<Option<ConsoleInput>>>;

/// A node's console. Dropping it lets readers take the last words, then closes it.
pub struct Console {
    ring: Arc<Ring>,
    plug: Plug,
    /// Disconnected when every reader has ended.
    readers: Receiver<()>,
    /// Held only while the console is open: readers hold clones.
    alive: Option<Sender<()>>,
    /// Ends the socket's thread.
    stop: Option<Arc<EventFd>>,
    terminal: Arc<Mutex<Option<RawTerminal>>>,
}

impl Console {
    /// Opens the console.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn open(to: &ConsoleTo) -> Result<Console, ConsoleError> {
        let (alive, readers) = bounded(0);
        let mut console = Console {
            ring: Arc::default(),
            plug: Plug::default(),
            readers,
            alive: Some(alive),
            stop: None,
            terminal: Arc::default(),
        };
        match to {
            ConsoleTo::None => {}
            ConsoleTo::Stdout => console.copy_to(io::stdout())?,
            ConsoleTo::Stdio => {
                console.copy_to(io::stdout())?;
                console.take_stdin()?;
            }
            ConsoleTo::File(path) => {
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
                console.copy_to(file.map_err(|reason| ConsoleError::File { path: path.clone(), reason })?)?;
            }
            ConsoleTo::Socket(path) => console.listen(path)?,
        }
        Ok(console)
    }

    /// Where a machine's serial port writes to.
    pub fn writer(&self) -> Box<dyn Write + Send> {
        Box::new(RingWriter(Arc::clone(&self.ring)))
    }

    /// Input goes to this machine from now on.
    pub fn plug(&self, input: ConsoleInput) {
        *self.plug.lock() = Some(input);
    }

    fn copy_to(&self, out: impl Write + Send + 'static) -> io::Result<()> {
        let (ring, alive) = (Arc::clone(&self.ring), self.alive.clone());
        thread::Builder::new().name("mcd-console".to_owned()).spawn(move || {
            // A pipe that nobody reads any more ends the reader, not the node.
            let _ = ring::copy(&ring, 0, out);
            drop(alive);
        })?;
        Ok(())
    }

    fn take_stdin(&self) -> io::Result<()> {
        *self.terminal.lock() = RawTerminal::enter()?;
        let (plug, terminal) = (Arc::clone(&self.plug), Arc::clone(&self.terminal));
        let has_escape = terminal.lock().is_some();
        thread::Builder::new().name("mcd-console-in".to_owned()).spawn(move || {
            let mut left = false;
            // Ends with standard input, or with the process.
            feed(io::stdin(), &plug, |keys| {
                left = has_escape && keys.contains(&ESCAPE);
                !left
            });
            if left {
                // The terminal is the person's again, with Ctrl-C to end the node; the guest goes
                // on.
                *terminal.lock() = None;
                tracing::info!("the console takes no more keys; Ctrl-C ends the node");
            }
        })?;
        Ok(())
    }

    fn listen(&mut self, path: &Path) -> Result<(), ConsoleError> {
        let socket = BoundSocket::new(path)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(io::Error::from)?;
        let stop = Arc::new(stop);
        let host = Host {
            ring: Arc::clone(&self.ring),
            plug: Arc::clone(&self.plug),
            alive: self.alive.clone(),
            clients: Arc::default(),
        };
        let wake = Arc::clone(&stop);
        thread::Builder::new().name("mcd-console".to_owned()).spawn(move || host.run(socket, &wake))?;
        self.stop = Some(stop);
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.ring.close();
        *self.plug.lock() = None;
        if let Some(stop) = &self.stop {
            // The counter cannot overflow: this is the only write to it.
            let _ = stop.write(1);
        }
        self.alive = None;
        // Nothing is ever sent: this waits until the last reader has ended, or gives up.
        let _ = self.readers.recv_timeout(GOODBYE_LIMIT);
        *self.terminal.lock() = None;
    }
}

/// Hands what is read to the machine while `wanted` is true.
fn feed(mut from: impl Read, plug: &Plug, mut wanted: impl FnMut(&[u8]) -> bool) {
    let mut chunk = [0; INPUT_CHUNK_BYTES];
    loop {
        let keys = match from.read(&mut chunk) {
            Ok(0) => return,
            Ok(bytes) => chunk.get(..bytes).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if !wanted(keys) {
            return;
        }
        if let Some(input) = &*plug.lock() {
            input.push(keys);
        }
    }
}

/// The socket's thread.
struct Host {
    ring: Arc<Ring>,
    plug: Plug,
    alive: Option<Sender<()>>,
    clients: Arc<AtomicUsize>,
}

impl Host {
    /// Takes clients until it is to stop. The socket is gone before `self` is: whoever waits
    /// for the last reader finds no path any more.
    fn run(&self, socket: BoundSocket, stop: &EventFd) {
        loop {
            let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = [readable(stop.as_fd()), readable(socket.listener.as_fd())];
            let ended = match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) => fds.first().and_then(PollFd::any).unwrap_or(true),
                Err(errno) => errno != nix::errno::Errno::EINTR,
            };
            if ended {
                return;
            }
            if let Ok((stream, _)) = socket.listener.accept() {
                self.admit(stream);
            }
        }
    }

    fn admit(&self, stream: UnixStream) {
        let number = self.clients.fetch_add(1, Ordering::SeqCst);
        let place = Place(Arc::clone(&self.clients));
        if number >= CLIENTS_MAX {
            tracing::warn!(CLIENTS_MAX, "a console client was turned away: too many are connected");
            return;
        }
        if let Err(error) = self.serve(stream, place) {
            tracing::warn!(%error, "a console client could not be served");
        }
    }

    /// One thread for each direction; either ends the other.
    fn serve(&self, stream: UnixStream, place: Place) -> io::Result<()> {
        stream.set_nonblocking(false)?;
        let (input, output) = (stream.try_clone()?, stream);
        let (ring, alive) = (Arc::clone(&self.ring), self.alive.clone());
        let over = Arc::new(AtomicBool::new(false));
        let says_over = Arc::clone(&over);
        thread::Builder::new().name("mcd-console-out".to_owned()).spawn(move || {
            let _ = ring::copy(&ring, 0, &output);
            says_over.store(true, Ordering::SeqCst);
            let _ = output.shutdown(Shutdown::Both);
            drop((alive, place));
        })?;
        let plug = Arc::clone(&self.plug);
        thread::Builder::new().name("mcd-console-in".to_owned()).spawn(move || {
            feed(&input, &plug, |_| !over.load(Ordering::SeqCst));
        })?;
        Ok(())
    }
}

/// One of the places for clients.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_what_was_said_before_and_the_last_words() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("web.console");
        let console = Console::open(&ConsoleTo::Socket(path.clone())).expect("open");
        let mut guest = console.writer();
        guest.write_all(b"early ").expect("never fails");
        let mut client = UnixStream::connect(&path).expect("connect");
        let mut early = [0; 6];
        client.read_exact(&mut early).expect("read");
        assert_eq!(&early, b"early ");
        guest.write_all(b"last words").expect("never fails");
        drop(console);
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).expect("the end");
        assert_eq!(rest, b"last words");
        assert!(!path.exists());
    }

    #[test]
    fn a_client_that_does_not_read_holds_up_nobody() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("web.console");
        let console = Console::open(&ConsoleTo::Socket(path.clone())).expect("open");
        let mut guest = console.writer();
        let _deaf = UnixStream::connect(&path).expect("connect");
        for _ in 0..5_000 {
            guest.write_all(&[b'x'; 1000]).expect("never fails");
        }
        let mut client = UnixStream::connect(&path).expect("connect");
        let mut byte = [0];
        client.read_exact(&mut byte).expect("read");
    }

    #[test]
    fn a_file_gets_everything_and_is_appended_to() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("console.log");
        for word in [&b"one "[..], b"two"] {
            let console = Console::open(&ConsoleTo::File(path.clone())).expect("open");
            console.writer().write_all(word).expect("never fails");
        }
        assert_eq!(std::fs::read(&path).expect("read"), b"one two");
        let error = Console::open(&ConsoleTo::File(directory.path().to_owned())).map(|_| ()).expect_err("a directory");
        assert!(matches!(error, ConsoleError::File { .. }));
    }
}
