//! `mcd console` as a person and as a script use it: against a socket, on a terminal and in a pipe.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};

const ESCAPE: u8 = 0x1d;

/// A guest's console in the place of a node.
struct Guest {
    _directory: tempfile::TempDir,
    path: PathBuf,
    listener: UnixListener,
}

impl Guest {
    fn new() -> Guest {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("web.console");
        let listener = UnixListener::bind(&path).expect("bind");
        Guest { _directory: directory, path, listener }
    }

    fn accept(&self) -> UnixStream {
        self.listener.accept().expect("a client").0
    }
}

fn client(socket: &Path, stdin: impl Into<Stdio>, stdout: impl Into<Stdio>) -> Child {
    Command::new(env!("CARGO_BIN_EXE_mcd"))
        .args(["console", "--socket"])
        .arg(socket)
        .stdin(stdin)
        .stdout(stdout)
        .stderr(Stdio::null())
        .spawn()
        .expect("mcd")
}

fn read(mut from: impl Read, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    from.read_exact(&mut data).expect("read");
    data
}

#[test]
fn a_script_talks_to_the_guest_until_the_node_ends() {
    let guest = Guest::new();
    let mut mcd = client(&guest.path, Stdio::piped(), Stdio::piped());
    let mut console = guest.accept();
    let mut stdin = mcd.stdin.take().expect("piped");
    // Without a terminal there is no escape: every byte is the guest's.
    stdin.write_all(b"ls\n\x1d").expect("write");
    assert_eq!(read(&console, 4), b"ls\n\x1d");
    drop(stdin);
    // The end of the input ends nothing: what the guest says is still wanted.
    console.write_all(b"file\r\n").expect("write");
    drop(console);
    let output = mcd.wait_with_output().expect("output");
    assert!(output.status.success());
    assert_eq!(output.stdout, b"file\r\n");
}

#[test]
fn the_terminal_is_raw_meanwhile_and_as_before_afterwards() {
    let guest = Guest::new();
    let pty = openpty(None, None).expect("pty");
    let is_raw = |fd: &OwnedFd| !tcgetattr(fd.as_fd()).expect("termios").local_flags.contains(LocalFlags::ICANON);
    assert!(!is_raw(&pty.slave));
    let mut keyboard = File::from(pty.master);
    let slave = || pty.slave.try_clone().expect("clone");
    let mut mcd = client(&guest.path, slave(), slave());
    let mut console = guest.accept();
    // The guest speaks once the terminal is raw: the greeting of `mcd` comes after that, but goes
    // to stderr. So keys are typed only after the guest's words came through.
    console.write_all(b"login:").expect("write");
    assert_eq!(read(&keyboard, 6), b"login:");
    assert!(is_raw(&pty.slave));
    // Ctrl-C is a key like any other.
    keyboard.write_all(b"a\x03b").expect("type");
    assert_eq!(read(&console, 3), b"a\x03b");
    keyboard.write_all(&[b'c', ESCAPE, b'd']).expect("type");
    let mut rest = Vec::new();
    console.read_to_end(&mut rest).expect("the client left");
    assert_eq!(rest, b"c", "what was typed behind the escape is not the guest's");
    assert!(mcd.wait().expect("status").success());
    assert!(!is_raw(&pty.slave));
}

#[test]
fn without_a_node_one_line_says_so() {
    let directory = tempfile::tempdir().expect("directory");
    let output = Command::new(env!("CARGO_BIN_EXE_mcd"))
        .args(["console", "--socket"])
        .arg(directory.path().join("none"))
        .output()
        .expect("mcd");
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(line.contains("--console socket") && line.trim_end().lines().count() == 1, "{line}");
}
