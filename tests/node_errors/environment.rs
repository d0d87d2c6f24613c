//! The environment of a test: a network namespace of its own with taps, and a directory.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use mcd::testbed::namespaces::Namespace;
use mcd::testbed::require::{NODE_DEVICES, with_rights};
use tempfile::TempDir;

use super::process::Node;

/// The ports of the node that is primary first, and of the one that joins it.
pub const PRIMARY: [&str; 2] = ["127.0.0.1:7401", "127.0.0.1:7402"];
const SECONDARY: &str = "127.0.0.1:7411";

/// Exit codes.
pub const FAILURE: i32 = 1;
pub const USAGE: i32 = 2;
pub const HOST: i32 = 3;
pub const REFUSED: i32 = 4;

/// Runs `body`, the body of the test `name`, on a thread in a network of its own; in a user
/// namespace too where that is needed.
#[track_caller]
pub fn run(name: &str, body: impl FnOnce(&Environment)) {
    with_rights(name, NODE_DEVICES, || body(&Environment::new()));
}

/// A network with the taps `tap0` and `tap1`, and a directory with an empty one for the arbiter.
/// The thread that made it is in it.
pub struct Environment {
    net: Namespace,
    dir: TempDir,
}

impl Environment {
    fn new() -> Environment {
        let net = Namespace::new("node errors").expect("a network namespace");
        net.ip(&[
            "tuntap add dev tap0 mode tap",
            "tuntap add dev tap1 mode tap",
            "link set tap0 up",
            "link set tap1 up",
        ])
        .expect("taps");
        net.enter().expect("enter the network namespace");
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("arbiter")).expect("a directory");
        Environment { net, dir }
    }

    /// Runs `ip` with these words in the network.
    pub fn ip(&self, words: &str) {
        self.net.ip(&[words]).expect("ip");
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn arbiter(&self) -> PathBuf {
        self.path("arbiter")
    }

    /// A command of mcd's, in this network, with its control socket: the flags `usual`, but for
    /// those that `more` has.
    fn mcd(&self, words: &[&str], control: PathBuf, usual: &[String], more: &[&str]) -> (Command, PathBuf) {
        let mut command = self.net.command(env!("CARGO_BIN_EXE_mcd"));
        let every = [
            // The timeout of a busy test host: nothing here is about lateness.
            "--heartbeat-interval-ms=200".to_owned(),
            "--heartbeat-timeout-ms=20000".to_owned(),
            format!("--arbiter=file:{}", self.arbiter().display()),
            format!("--control={}", control.display()),
            "--guest=web".to_owned(),
        ];
        let name = |flag: &str| flag.split('=').next().map(str::to_owned);
        let is_replaced = |flag: &&String| more.iter().any(|other| name(other) == name(flag));
        command.args(words).args(every.iter().chain(usual).filter(|flag| !is_replaced(flag))).args(more);
        command.env_remove("RUST_BACKTRACE").env("NO_COLOR", "1");
        let given = more.iter().find_map(|flag| flag.strip_prefix("--control="));
        let control = given.map_or(control, PathBuf::from);
        (command, control)
    }

    /// `mcd primary` on the first tap, and what `more` adds.
    pub fn primary_command(&self, more: &[&str]) -> (Command, PathBuf) {
        self.primary_like(&["primary"], more)
    }

    /// `mcd cold-start`, and otherwise the same.
    pub fn cold_start_command(&self, more: &[&str]) -> (Command, PathBuf) {
        self.primary_like(&["cold-start", "--i-know-both-nodes-are-dead"], more)
    }

    fn primary_like(&self, words: &[&str], more: &[&str]) -> (Command, PathBuf) {
        let usual = ["--tap=tap0", "--guest-ip=10.0.0.2/24", "--memory=16M"].map(str::to_owned);
        let usual = [&usual[..], &[format!("--listen={}", PRIMARY[0])]].concat();
        self.mcd(words, self.path("p.sock"), &usual, more)
    }

    /// `mcd secondary` of the primary, on the second tap, and what `more` adds.
    pub fn secondary_command(&self, more: &[&str]) -> (Command, PathBuf) {
        let usual = ["--tap=tap1".to_owned(), format!("--listen={SECONDARY}"), format!("--peer={}", PRIMARY[0])];
        self.mcd(&["secondary"], self.path("s.sock"), &usual, more)
    }

    /// A primary whose guest runs.
    pub fn primary(&self) -> Node {
        let mut node = Node::start(self.primary_command(&[]));
        node.wait_guest();
        node
    }

    pub fn secondary(&self, more: &[&str]) -> Node {
        Node::start(self.secondary_command(more))
    }
}

/// Something mounted in the mount namespace of one process.
#[derive(Clone)]
pub enum Mount {
    /// A directory or file in another place too.
    Bind(PathBuf, PathBuf),
    /// An empty filesystem of so many bytes.
    Small(PathBuf, u64),
}

/// Gives `command` a mount namespace of its own, with these mounts in this order and these files in
/// it filled to the brim.
pub fn mount(command: &mut Command, mounts: &[Mount], fill: Option<PathBuf>) {
    let mounts = mounts.to_vec();
    let prepare = move || {
        use nix::mount::{MsFlags, mount};
        use nix::sched::{CloneFlags, unshare};
        const NO: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(NO, "/", NO, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NO)?;
        for one in &mounts {
            match one {
                Mount::Bind(from, to) => mount(Some(from), to, NO, MsFlags::MS_BIND | MsFlags::MS_REC, NO)?,
                Mount::Small(to, bytes) => {
                    mount(Some("none"), to, Some("tmpfs"), MsFlags::empty(), Some(format!("size={bytes}").as_str()))?;
                }
            }
        }
        fill.as_deref().map_or(Ok(()), fill_up)
    };
    // SAFETY: between fork and exec the closure only makes system calls and allocates, which glibc
    // allows in the child of a fork of a process with threads.
    unsafe { command.pre_exec(prepare) };
}

/// Writes into `file` until its filesystem is full.
pub fn fill_up(file: &Path) -> io::Result<()> {
    use std::io::Write;
    let mut file = std::fs::File::create(file)?;
    loop {
        match file.write_all(&[0; 4096]) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}
