//! `mcd console`: the other end of a node's console socket, on a terminal or in a pipe.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::terminal::{ESCAPE, RawTerminal};

/// Bytes taken at once.
const CHUNK_BYTES: usize = 4096;

/// How a visit ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VisitEnd {
    /// The person left, or a signal came.
    Left,
    /// The node closed the console: it ended, or the console is full.
    Closed,
}

/// Connects standard input and output with the console at `path` until one of them ends. On a
/// terminal every key goes to the guest, but for [`ESCAPE`], which leaves.
///
/// # Errors
/// If nobody listens there, or the terminal or the connection fails.
pub fn visit(path: &Path) -> io::Result<VisitEnd> {
    let console = UnixStream::connect(path)?;
    let (quit, quit_end) = UnixStream::pair()?;
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::low_level::pipe::register(signal, quit_end.try_clone()?)?;
    }
    let terminal = RawTerminal::enter()?;
    if terminal.is_some() {
        // Before anything of the guest's: the one thing a person must know.
        writeln!(io::stderr(), "\r[mcd: Ctrl-] leaves]")?;
    }
    relay(&console, &quit, terminal.is_some())
}

fn relay(console: &UnixStream, quit: &UnixStream, has_escape: bool) -> io::Result<VisitEnd> {
    let stdin = io::stdin();
    let mut is_typing = true;
    let mut chunk = [0; CHUNK_BYTES];
    loop {
        let [output, typed, asked] = wait(console.as_fd(), is_typing.then(|| stdin.as_fd()), quit.as_fd())?;
        if asked {
            return Ok(VisitEnd::Left);
        }
        if output {
            let mut reader = console;
            match reader.read(&mut chunk) {
                Ok(0) => return Ok(VisitEnd::Closed),
                Ok(bytes) => {
                    let mut out = io::stdout().lock();
                    out.write_all(chunk.get(..bytes).unwrap_or_default())?;
                    out.flush()?;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(VisitEnd::Closed),
                Err(error) => return Err(error),
            }
        }
        if typed {
            // Past the standard library's buffer, which `poll` does not know of.
            let bytes = nix::unistd::read(stdin.as_fd(), &mut chunk)?;
            let keys = chunk.get(..bytes).unwrap_or_default();
            is_typing = bytes > 0;
            let escape = keys.iter().position(|key| has_escape && *key == ESCAPE);
            let mut writer = console;
            match writer.write_all(keys.get(..escape.unwrap_or(bytes)).unwrap_or_default()) {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => return Err(error),
                // The node's last output is still to be read.
                _ => {}
            }
            if escape.is_some() {
                return Ok(VisitEnd::Left);
            }
        }
    }
}

/// Waits until the console, the keyboard (if it is still there) or a signal has something.
fn wait(console: BorrowedFd<'_>, stdin: Option<BorrowedFd<'_>>, quit: BorrowedFd<'_>) -> io::Result<[bool; 3]> {
    let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
    let mut fds = vec![readable(console), readable(quit)];
    fds.extend(stdin.map(readable));
    match poll(&mut fds, PollTimeout::NONE) {
        Err(Errno::EINTR) => return Ok([false; 3]),
        result => result?,
    };
    let has = |at: usize| fds.get(at).and_then(PollFd::any).unwrap_or(false);
    Ok([has(0), has(2), has(1)])
}
