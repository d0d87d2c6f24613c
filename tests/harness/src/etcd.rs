//! `etcd:`: a real etcd in a network of its own, which both hosts reach by another way than each
//! other.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use mcd::demo::namespaces::{HostName, Namespace, NamespaceError, Namespaces, find_tool};
use mcd::demo::nodes::die_with_parent;

use crate::cuts::restore;
use crate::place::Place;

/// Its address; the hosts are its neighbours.
const ADDRESS: &str = "10.79.0.1";
/// The port clients use.
const PORT: u16 = 2379;
/// How long a question may take, in ms: an etcd that answers at all answers sooner here.
const QUESTION_MS: u64 = 500;
/// How long it may take to start.
const START_LIMIT: Duration = Duration::from_secs(30);
/// What it logs when it serves: version 3.4 the one, newer ones the other.
const SERVES: [&str; 2] = ["client requests on", "serving client traffic"];

/// A running etcd. Dropping it ends it.
pub struct EtcdPlace {
    net: Namespace,
    directory: PathBuf,
    child: Option<Child>,
    starts: u32,
}

impl EtcdPlace {
    /// Makes the network, with a way to it from each host, and starts the etcd with its data in
    /// `directory`.
    pub fn new(namespaces: &Namespaces, directory: &Path) -> Result<EtcdPlace, NamespaceError> {
        let net = Namespace::new("the arbiter")?;
        net.ip(&[
            "link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0".to_owned(),
            format!("address add {ADDRESS}/24 dev br0"),
            "link set br0 up".to_owned(),
        ])?;
        for (host, last) in [(HostName::A, 11), (HostName::B, 12)] {
            namespaces.host(host).ip(&[
                format!("link add arbiter type veth peer name to-{host} netns {}", net.path().display()),
                format!("address add 10.79.0.{last}/24 dev arbiter"),
                "link set arbiter up".to_owned(),
            ])?;
            net.ip(&[format!("link set to-{host} master br0 up")])?;
        }
        let mut place = EtcdPlace { net, directory: directory.join("etcd"), child: None, starts: 0 };
        place.start().map_err(|source| NamespaceError::Io { action: "start etcd".to_owned(), source })?;
        Ok(place)
    }

    fn start(&mut self) -> io::Result<()> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "install the Debian package etcd-server");
        self.starts += 1;
        let log = self.directory.with_file_name(format!("etcd-{}.log", self.starts));
        let url = format!("http://{ADDRESS}:{PORT}");
        let mut command = self.net.command(find_tool("etcd").ok_or_else(missing)?);
        command.arg("--data-dir").arg(&self.directory).args(["--name", "m0"]);
        command.args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
        // On a disk all is the same, and only takes longer.
        command.arg("--unsafe-no-fsync");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log)?);
        die_with_parent(&mut command);
        self.child = Some(command.spawn()?);
        let deadline = Instant::now() + START_LIMIT;
        while !fs::read_to_string(&log).map(|said| SERVES.iter().any(|words| said.contains(words)))? {
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, format!("see {}", log.display())));
            }
            std::thread::park_timeout(Duration::from_millis(5));
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself; either way it must be waited for.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Place for EtcdPlace {
    fn flag(&self, _: HostName) -> String {
        format!("etcd:http://{ADDRESS}:{PORT}")
    }

    fn question_ms(&self) -> Option<u64> {
        Some(QUESTION_MS)
    }

    fn cut(&mut self) -> io::Result<()> {
        restore(&self.net, &format!("*filter\n-A INPUT -p tcp --dport {PORT} -j DROP\nCOMMIT\n"))
    }

    fn mend(&mut self) -> io::Result<()> {
        restore(&self.net, "*filter\n-F INPUT\nCOMMIT\n")
    }

    fn restart(&mut self) -> io::Result<()> {
        self.stop();
        self.start()
    }
}

impl Drop for EtcdPlace {
    fn drop(&mut self) {
        self.stop();
    }
}
