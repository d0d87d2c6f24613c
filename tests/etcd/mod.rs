//! An etcd of the tests' own: on loopback, with its data in a temporary directory, stopped and
//! started as a test likes.

use mcd::arbiter::etcd::{EtcdArbiter, EtcdConfig, EtcdTls};
use mcd::protocol::types::GuestName;
use mcd::testbed::etcd::{EtcdProcess, EtcdSettings};
use mcd::testbed::namespaces::find_tool;
use mcd::testbed::require::{REQUIRE_ETCD, skip};
use nix::sys::signal::Signal;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use std::fs;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// Whether there is an etcd to test with; else the test is skipped.
pub fn installed() -> bool {
    let found = find_tool("etcd").is_some();
    if !found {
        skip(REQUIRE_ETCD, "etcd is not installed (apt-get install etcd-server)");
    }
    found
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
    process: EtcdProcess,
    pub url: String,
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
                let mut flags = vec![
                    format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-advertise-peer-urls=http://127.0.0.1:{peer}"),
                    format!("--initial-cluster={peers}"),
                ];
                if let Some(files) = certificates {
                    flags.push(format!("--cert-file={}", files.path("server.pem").display()));
                    flags.push(format!("--key-file={}", files.path("server.key").display()));
                    flags.push(format!("--trusted-ca-file={}", files.path("ca.pem").display()));
                    flags.push("--client-cert-auth".to_owned());
                }
                let log = directory.join(format!("m{at}.log"));
                let settings =
                    EtcdSettings { network: None, name: format!("m{at}"), data, url: url.clone(), flags, log };
                Etcd { process: EtcdProcess::new(settings), url, _ports: reserved }
            })
            .collect();
        // All are started before any is waited for: a member serves nobody until it has a quorum.
        all.iter_mut().for_each(|member| member.process.spawn().unwrap());
        all.iter().for_each(|member| member.process.wait_serving().unwrap());
        all
    }

    /// Starts it again, with its data.
    pub fn start(&mut self) {
        self.process.start().unwrap();
    }

    /// Ends it as a crash would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends a signal; see [`EtcdProcess::signal`].
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal).unwrap();
    }

    pub fn arbiter(&self, timeout_ms: u64) -> EtcdArbiter {
        EtcdArbiter::new(config(&[&self.url], timeout_ms), &guest()).unwrap()
    }
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
