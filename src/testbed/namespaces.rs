//! A network of namespaces that has no name anywhere and ends with the process: a client's network
//! and two hosts.
//!
//! ```text
//!   lan    br0 10.77.0.1/24 ──┬── to-a ─────────────┐         ┌───────────── to-b
//!                             └─────────────────────│─────────│──────────┘
//!   host a                    br0 ── lan, mcd0      │         │   host b   br0 ── lan, mcd0
//!                             wire 10.78.0.1/30 ────┴─ veth ──┴─ wire 10.78.0.2/30
//! ```
//!
//! The guest lives at 10.77.0.2 behind the tap `mcd0` of whichever host runs it. The link between
//! the hosts is a wire of its own, so that replication does not share the client's. Everything is
//! held by descriptors of this process and by its children: when they end, by whatever cause, the
//! kernel takes all of it away.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns, unshare};

/// The client's address on the guest's network.
pub const CLIENT_IPV4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The guest's address.
pub const GUEST_IPV4: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);
/// Length of the network prefix of [`CLIENT_IPV4`] and [`GUEST_IPV4`].
pub const GUEST_PREFIX_LEN: u8 = 24;
/// The tap each host has for the guest, already a port of the host's bridge.
pub const TAP: &str = "mcd0";

/// Why the network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// Neither root nor user namespaces.
    #[error(
        "cannot make a network: this user may make neither network nor user namespaces ({0}): run it as root, or \
         allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone)"
    )]
    NoRights(io::Error),
    /// A tool that is not installed.
    #[error("cannot find the command `{tool}`: install the Debian package {package}, or run `make setup`")]
    NoTool {
        /// The command.
        tool: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// `ip` refused.
    #[error("cannot set up the network of {namespace}: `ip {command}` says: {output}")]
    Ip {
        /// Whose network.
        namespace: String,
        /// What was asked.
        command: String,
        /// What it said.
        output: String,
    },
    /// The system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: io::Error,
    },
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> NamespaceError {
    let action = action.into();
    move |source| NamespaceError::Io { action, source }
}

/// Makes sure that this process may make network namespaces, if need be by moving it into a user
/// namespace in which the caller is root. The latter works only while the process has a single
/// thread, so call it before anything starts one.
pub fn gain_rights() -> Result<(), NamespaceError> {
    if has_rights() {
        return Ok(());
    }
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    enter_user_namespace(uid, gid).map_err(NamespaceError::NoRights)
}

/// Whether this process may make and enter network namespaces as it is.
pub fn has_rights() -> bool {
    const CAP_NET_ADMIN: u64 = 1 << 12;
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    effective & CAP_NET_ADMIN != 0 && effective & CAP_SYS_ADMIN != 0
}

/// Whether this process is root only inside a user namespace of its own.
pub fn in_user_namespace() -> bool {
    // The first line maps our ids to those outside; only in the first namespace it covers all of
    // them.
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().nth(2) == Some("1")
}

/// Makes `command` start in a user namespace of its own in which the caller is root.
pub fn start_in_user_namespace(command: &mut Command) {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    // SAFETY: between fork and exec the closure only makes system calls; the formatting inside
    // allocates, which glibc allows in the child of a fork of a process with threads.
    unsafe { command.pre_exec(move || enter_user_namespace(uid, gid)) };
}

fn enter_user_namespace(uid: u32, gid: u32) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    // The kernel lets an unprivileged process map groups only after it gave up changing them.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))
}

/// A network namespace without a name: it lives as long as this value or a process inside it.
pub struct Namespace {
    name: String,
    fd: OwnedFd,
}

impl Namespace {
    /// Makes an empty network with a loopback interface that is up. `name` appears in errors only.
    pub fn new(name: &str) -> Result<Namespace, NamespaceError> {
        let action = || format!("make the network namespace of {name}");
        // unshare changes the calling thread only: one is started for it, and what remains is the
        // descriptor.
        let made = std::thread::Builder::new().name(format!("netns {name}")).spawn(|| -> io::Result<OwnedFd> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            // Nothing here speaks IPv6, and its autoconfiguration would be noise on the taps. Where
            // /proc/sys is read-only the noise is harmless.
            for scope in ["all", "default"] {
                let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
            }
            Ok(File::open("/proc/thread-self/ns/net")?.into())
        });
        let made = made.map_err(failed(action()))?.join();
        let fd = made.unwrap_or_else(|_| Err(io::Error::other("its thread panicked"))).map_err(failed(action()))?;
        let namespace = Namespace { name: name.to_owned(), fd };
        namespace.ip(&["link set lo up"])?;
        Ok(namespace)
    }

    /// The name given to it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A path by which other processes of this user can open it (`nsenter --net=…`), while this
    /// process lives.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }

    /// Moves the calling thread into it; sockets it makes from now on are there. Threads it starts
    /// begin there too.
    pub fn enter(&self) -> io::Result<()> {
        Ok(setns(&self.fd, CloneFlags::CLONE_NEWNET)?)
    }

    /// Runs `work` in it, on a thread of its own, and waits for the result.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NamespaceError> {
        let action = format!("run in the network namespace of {}", self.name);
        let result = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, || self.enter().map(|()| work()))?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread panicked")))
        });
        result.map_err(failed(action))
    }

    /// A command that will run in it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        let fd = self.fd.as_raw_fd();
        // SAFETY: setns is a plain system call, allowed between fork and exec. The descriptor
        // number stays ours: the child has a copy of our table, and the namespace outlives the call
        // that starts the child or the call fails with EBADF.
        unsafe {
            command.pre_exec(move || {
                if libc::setns(fd, libc::CLONE_NEWNET) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
            })
        };
        command
    }

    /// Runs `ip` in it, once, with each of `commands` as a line of its batch. The first refusal
    /// ends it.
    pub fn ip(&self, commands: &[impl AsRef<str>]) -> Result<(), NamespaceError> {
        let action = || format!("run ip in the network of {}", self.name);
        let tool = find_tool("ip").ok_or(NamespaceError::NoTool { tool: "ip", package: "iproute2" })?;
        let mut command = self.command(tool);
        command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(failed(action()))?;
        let lines: String = commands.iter().flat_map(|line| [line.as_ref(), "\n"]).collect();
        if let Some(mut input) = child.stdin.take() {
            // A few hundred bytes: they fit the pipe. If ip is gone already, its words say more
            // than our EPIPE.
            let _ = input.write_all(lines.as_bytes());
        }
        let output = child.wait_with_output().map_err(failed(action()))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        // ip names the line: "Command failed -:3".
        let line = said.lines().find_map(|l| l.strip_prefix("Command failed -:")?.trim().parse::<usize>().ok());
        let culprit = line.and_then(|number| commands.get(number.checked_sub(1)?)).map(AsRef::as_ref);
        let words: Vec<&str> = said.lines().filter(|l| !l.starts_with("Command failed")).collect();
        Err(NamespaceError::Ip {
            namespace: self.name.clone(),
            command: culprit.unwrap_or("-batch").to_owned(),
            output: if words.is_empty() { output.status.to_string() } else { words.join("; ") },
        })
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace({})", self.name)
    }
}

/// Finds a command as a shell would, and also where Debian keeps those of the administrator.
pub fn find_tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = std::env::split_paths(&path).chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from));
    places.map(|place| place.join(name)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    file.is_file() && nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok()
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostName {
    /// The host that runs the guest first.
    A,
    /// The other one.
    B,
}

impl HostName {
    /// The other host.
    pub fn other(self) -> HostName {
        match self {
            HostName::A => HostName::B,
            HostName::B => HostName::A,
        }
    }

    /// Its address on the link between the hosts.
    pub fn link_ipv4(self) -> Ipv4Addr {
        match self {
            HostName::A => Ipv4Addr::new(10, 78, 0, 1),
            HostName::B => Ipv4Addr::new(10, 78, 0, 2),
        }
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HostName::A => "a",
            HostName::B => "b",
        })
    }
}

/// The client's network and the two hosts, joined.
#[derive(Debug)]
pub struct Namespaces {
    /// Where clients are.
    pub lan: Namespace,
    a: Namespace,
    b: Namespace,
}

impl Namespaces {
    /// Makes the whole network. See [`gain_rights`] for who may.
    pub fn new() -> Result<Namespaces, NamespaceError> {
        // `ip` would only say "Permission denied", not of what.
        open_tun().map_err(failed("open /dev/net/tun, which the hosts' taps need"))?;
        let namespaces = Namespaces { lan: Namespace::new("lan")?, a: Namespace::new("a")?, b: Namespace::new("b")? };
        // No spanning tree and no learning delay: a port forwards as soon as it is up. No multicast
        // snooping, whose queriers would talk to the guest.
        let bridge = "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0";
        namespaces.lan.ip(&[
            bridge.to_owned(),
            format!("address add {CLIENT_IPV4}/{GUEST_PREFIX_LEN} dev br0"),
            "link set br0 up".to_owned(),
        ])?;
        for name in [HostName::A, HostName::B] {
            let host = namespaces.host(name);
            host.ip(&[
                bridge.to_owned(),
                format!("link add lan type veth peer name to-{name} netns {}", namespaces.lan.path().display()),
                format!("tuntap add dev {TAP} mode tap"),
                "link set lan master br0 up".to_owned(),
                format!("link set {TAP} master br0 up"),
                "link set br0 up".to_owned(),
            ])?;
            namespaces.lan.ip(&[format!("link set to-{name} master br0 up")])?;
        }
        namespaces
            .a
            .ip(&[format!("link add wire type veth peer name wire netns {}", namespaces.b.path().display())])?;
        for name in [HostName::A, HostName::B] {
            namespaces
                .host(name)
                .ip(&[format!("address add {}/30 dev wire", name.link_ipv4()), "link set wire up".to_owned()])?;
        }
        Ok(namespaces)
    }

    /// The network of one of the hosts.
    pub fn host(&self, name: HostName) -> &Namespace {
        match name {
            HostName::A => &self.a,
            HostName::B => &self.b,
        }
    }
}

/// Whether this user may open the device that makes taps.
fn open_tun() -> io::Result<File> {
    File::options().read(true).write(true).open("/dev/net/tun")
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::testbed::require::{NODE_DEVICES, with_rights};

    fn speaks(from: &Namespace, to: &Namespace, address: Ipv4Addr) {
        let listener = to.run(|| TcpListener::bind((address, 7000))).unwrap().unwrap();
        let mut stream = from.run(|| TcpStream::connect((address, 7000))).unwrap().unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        io::Read::read_exact(&mut accepted, &mut heard).unwrap();
        assert_eq!(&heard, b"hello");
    }

    #[test]
    fn every_path_carries_traffic() {
        with_rights("testbed::namespaces::tests::every_path_carries_traffic", &NODE_DEVICES[1..], || {
            let namespaces = Namespaces::new().unwrap();
            let (a, b) = (namespaces.host(HostName::A), namespaces.host(HostName::B));
            speaks(a, b, HostName::B.link_ipv4());
            speaks(b, a, HostName::A.link_ipv4());
            // In place of a guest the bridge itself has the guest's address, first on one host,
            // then on the other.
            let guest = format!("address add {GUEST_IPV4}/{GUEST_PREFIX_LEN} dev br0");
            a.ip(&[&guest]).unwrap();
            speaks(&namespaces.lan, a, GUEST_IPV4);
            a.ip(&["address flush dev br0"]).unwrap();
            b.ip(&[&guest]).unwrap();
            namespaces.lan.ip(&["neighbour flush dev br0"]).unwrap();
            speaks(&namespaces.lan, b, GUEST_IPV4);
        });
    }

    #[test]
    fn the_network_has_a_tap_on_each_host_and_no_name_outside() {
        with_rights(
            "testbed::namespaces::tests::the_network_has_a_tap_on_each_host_and_no_name_outside",
            &NODE_DEVICES[1..],
            || {
                let namespaces = Namespaces::new().unwrap();
                for host in [namespaces.host(HostName::A), namespaces.host(HostName::B)] {
                    host.run(|| nix::net::if_::if_nametoindex(TAP).unwrap()).unwrap();
                }
                assert!(nix::net::if_::if_nametoindex(TAP).is_err(), "the tap leaked into the namespace of the test");
                let path = namespaces.lan.path();
                assert!(path.exists());
                drop(namespaces);
                assert!(!path.exists());
            },
        );
    }

    #[test]
    fn a_refusal_of_ip_names_the_line() {
        with_rights("testbed::namespaces::tests::a_refusal_of_ip_names_the_line", &NODE_DEVICES[1..], || {
            let namespace = Namespace::new("x").unwrap();
            let error = namespace.ip(&["link set lo up", "link set nothing up"]).unwrap_err().to_string();
            assert_eq!(
                error,
                "cannot set up the network of x: `ip link set nothing up` says: Cannot find device \"nothing\""
            );
        });
    }
}
