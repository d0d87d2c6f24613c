//! A person's way into a host: this terminal, connected to the shell on the host's third serial
//! line.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Ctrl-], as in other consoles.
const LEAVE: u8 = 0x1d;

/// Puts the terminal back as it was.
struct Raw(Option<Termios>);

impl Raw {
    fn new() -> Raw {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(mut raw) = before.clone() {
            cfmakeraw(&mut raw);
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &raw);
        }
        Raw(before)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

/// Connects this terminal to the socket at `path` until Ctrl-] or the end of the host.
pub fn attach(path: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    println!("connected; Ctrl-] leaves");
    let _raw = Raw::new();
    stream.write_all(b"\n")?;
    let (mut input, mut output) = (io::stdin().lock(), io::stdout().lock());
    let mut buffer = [0; 4096];
    loop {
        let (ours, theirs) = {
            let mut fds =
                [PollFd::new(input.as_fd(), PollFlags::POLLIN), PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE)?;
            (fds[0].any().unwrap_or(true), fds[1].any().unwrap_or(true))
        };
        if theirs {
            let count = stream.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            output.write_all(buffer.get(..count).unwrap_or_default())?;
            output.flush()?;
        }
        if ours {
            let count = input.read(&mut buffer)?;
            let typed = buffer.get(..count).unwrap_or_default();
            if typed.is_empty() || typed.contains(&LEAVE) {
                return Ok(());
            }
            stream.write_all(typed)?;
        }
    }
}
