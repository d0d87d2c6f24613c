//! A terminal in raw mode: every key goes to the guest, also Ctrl-C. The mode from before is
//! restored when this is dropped.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// The key that leaves the console: Ctrl-].
pub const ESCAPE: u8 = 0x1d;

/// A terminal on standard input, in raw mode until this is dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Puts the terminal on standard input into raw mode; none, if there is no terminal.
    ///
    /// # Errors
    /// The system's error.
    pub fn enter() -> io::Result<Option<RawTerminal>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        // Output stays as it is, so that the log's lines begin at the left.
        raw.output_flags |= OutputFlags::OPOST;
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Some(RawTerminal { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then nobody is left to mind.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSANOW, &self.before);
    }
}
