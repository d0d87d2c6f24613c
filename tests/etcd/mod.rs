//! An etcd of the tests' own: on loopback, with its data in a temporary directory, stopped and
//! started as a test likes.

use mcd::arbiter::etcd::{EtcdArbiter, EtcdConfig, EtcdTls};
use mcd::protocol::types::GuestName;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// Whether there is an etcd to test with; else says why the test is skipped.
pub fn installed() -> bool {
    let found = Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if found.is_ok_and(|status| status.success()) {
        return true;
    }
    assert_ne!(std::env::var("MCD_REQUIRE_ETCD").as_deref(), Ok("1"), "etcd is not installed");
    println!("skipped: etcd is not installed (apt-get install etcd-server)");
    false
}

/// A directory in memory where there is such a thing: on a disk all is the same and only fsync
/// takes longer.
pub fn directory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A TCP port of loopback that stays this value's own, even while nothing listens on it. It lies
/// below the ports that the kernel gives to outgoing connections, and among test processes it is
/// claimed by the UDP port of the same number.
pub struct ReservedPort {
    pub port: u16,
    _claim: UdpSocket,
}

impl ReservedPort {
    pub fn new() -> ReservedPort {
        const PORTS: std::ops::Range<u16> = 20_000..32_000;
        // Processes begin at different places, so that they seldom meet at all.
        let count = u32::from(PORTS.end - PORTS.start);
        let first = std::process::id() % count;
        let port = |at: u32| PORTS.start + ((first + at) % count) as u16;
        let reserve = |port: u16| {
            let claim = UdpSocket::bind((Ipv4Addr::LOCALHOST, port)).ok()?;
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()?;
            Some(ReservedPort { port, _claim: claim })
        };
        (0..count).map(port).find_map(reserve).expect("a port that nobody uses")
    }
}

pub fn guest() -> GuestName {
    GuestName::new("web").unwrap()
}

/// One member of a cluster.
pub struct Etcd {
    arguments: Vec<String>,
    pub url: String,
    child: Option<Child>,
    _ports: (ReservedPort, ReservedPort),
}

impl Etcd {
    /// A cluster of one, running.
    pub fn alone(directory: &Path) -> Etcd {
        Etcd::cluster(directory, 1, None).remove(0)
    }

    /// A cluster of one that speaks TLS and wants the same of its clients, running.
    pub fn encrypted(directory: &Path, certificates: &Certificates) -> Etcd {
        Etcd::cluster(directory, 1, Some(certificates)).remove(0)
    }

    /// A cluster, running.
    pub fn cluster(directory: &Path, members: usize, certificates: Option<&Certificates>) -> Vec<Etcd> {
        let ports: Vec<_> = (0..members).map(|_| (ReservedPort::new(), ReservedPort::new())).collect();
        let peers = ports.iter().enumerate().map(|(at, (_, peer))| format!("m{at}=http://127.0.0.1:{}", peer.port));
        let peers = peers.collect::<Vec<_>>().join(",");
        let mut all: Vec<Etcd> = ports
            .into_iter()
            .enumerate()
            .map(|(at, reserved)| {
                let (client, peer) = (reserved.0.port, reserved.1.port);
                let scheme = if certificates.is_some() { "https" } else { "http" };
                let url = format!("{scheme}://127.0.0.1:{client}");
                let data = directory.join(format!("m{at}"));
                let mut arguments = vec![
                    format!("--name=m{at}"),
                    format!("--data-dir={}", data.display()),
                    format!("--listen-client-urls={url}"),
                    format!("--advertise-client-urls={url}"),
                    format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-cluster={peers}"),
                ];
                if let Some(files) = certificates {
                    arguments.push(format!("--cert-file={}", files.path("server.pem").display()));
                    arguments.push(format!("--key-file={}", files.path("server.key").display()));
                    arguments.push(format!("--trusted-ca-file={}", files.path("ca.pem").display()));
                    arguments.push("--client-cert-auth".to_owned());
                }
                Etcd { arguments, url, child: None, _ports: reserved }
            })
            .collect();
        // All are started before any is waited for: a member serves nobody until it has a quorum.
        let logs: Vec<_> = all.iter_mut().map(Etcd::spawn).collect();
        logs.into_iter().for_each(wait_until_it_serves);
        all
    }

    fn spawn(&mut self) -> BufReader<std::process::ChildStderr> {
        let mut command = Command::new("etcd");
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        self.child = Some(child);
        log
    }

    /// Starts it again, with its data.
    pub fn start(&mut self) {
        let log = self.spawn();
        wait_until_it_serves(log);
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Sends a signal. A stop is waited for: on a busy machine a process goes on answering until
    /// one of its threads has noticed.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.as_ref().unwrap().id()).unwrap());
        kill(pid, signal).unwrap();
        if signal == Signal::SIGSTOP {
            waitid(Id::Pid(pid), WaitPidFlag::WSTOPPED).unwrap();
        }
    }

    pub fn arbiter(&self, timeout_ms: u64) -> EtcdArbiter {
        EtcdArbiter::new(config(&[&self.url], timeout_ms), &guest()).unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Reads the log until it says that clients are served, and from then on so that the pipe never
/// fills.
fn wait_until_it_serves(mut log: BufReader<std::process::ChildStderr>) {
    let mut all = String::new();
    loop {
        let mut line = String::new();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "etcd ended: {all}");
        all.push_str(&line);
        // Version 3.4 says the one, newer ones the other.
        if line.contains("client requests on") || line.contains("serving client traffic") {
            break;
        }
    }
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
}

pub fn config(endpoints: &[&str], timeout_ms: u64) -> EtcdConfig {
    EtcdConfig {
        endpoints: endpoints.iter().map(|url| (*url).to_owned()).collect(),
        prefix: "/mcd".to_owned(),
        tls: None,
        login: None,
        timeout: Duration::from_millis(timeout_ms),
    }
}

/// An authority and what it signed, as PEM files.
pub struct Certificates {
    directory: TempDir,
}

impl Certificates {
    pub fn new() -> Certificates {
        let files = Certificates { directory: directory() };
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        fs::write(files.path("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        let authority = Issuer::new(params, key);
        for name in ["server", "client"] {
            let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
            // etcd's gateway is a client of its own server, and shows it the server's certificate.
            params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            let key = KeyPair::generate().unwrap();
            fs::write(files.path(&format!("{name}.pem")), params.signed_by(&key, &authority).unwrap().pem()).unwrap();
            fs::write(files.path(&format!("{name}.key")), key.serialize_pem()).unwrap();
        }
        files
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn tls(&self) -> EtcdTls {
        EtcdTls { ca: self.path("ca.pem"), identity: Some((self.path("client.pem"), self.path("client.key"))) }
    }
}
