//! `etcd:`: a real etcd in a network of its own, which both hosts reach by another way than each
//! other.

use std::io;
use std::path::Path;
use std::sync::Arc;

use mcd::testbed::error::TestbedError;
use mcd::testbed::etcd::{ETCD_PORT, EtcdProcess, EtcdSettings};
use mcd::testbed::namespaces::{HostName, Namespace, Namespaces};

use crate::environment::ArbiterEnvironment;
use crate::partitions::restore;

/// Its address; the hosts are its neighbours.
const ADDRESS: &str = "10.79.0.1";
/// How long a question may take, in ms: an etcd that answers at all answers sooner here.
const QUESTION_MS: u64 = 500;
/// An etcd, and the network it is in.
pub struct EtcdEnvironment {
    net: Arc<Namespace>,
    process: EtcdProcess,
}

impl EtcdEnvironment {
    /// Makes the network, with a way to it from each host, and starts the etcd with its data in
    /// `directory`.
    pub fn new(namespaces: &Namespaces, directory: &Path) -> Result<EtcdEnvironment, TestbedError> {
        let net = Arc::new(Namespace::new("the arbiter")?);
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
        let mut process = EtcdProcess::new(EtcdSettings {
            network: Some(net.clone()),
            name: "m0".to_owned(),
            data: directory.join("etcd"),
            url: format!("http://{ADDRESS}:{ETCD_PORT}"),
            // On a disk all is the same, and only takes longer.
            flags: vec!["--unsafe-no-fsync".to_owned()],
            log: directory.join("etcd.log"),
        });
        process.start()?;
        Ok(EtcdEnvironment { net, process })
    }
}

impl ArbiterEnvironment for EtcdEnvironment {
    fn flag(&self, _: HostName) -> String {
        format!("etcd:{}", self.process.url())
    }

    fn question_ms(&self) -> Option<u64> {
        Some(QUESTION_MS)
    }

    fn partition(&mut self) -> io::Result<()> {
        restore(&self.net, &format!("*filter\n-A INPUT -p tcp --dport {ETCD_PORT} -j DROP\nCOMMIT\n"))
    }

    fn heal(&mut self) -> io::Result<()> {
        restore(&self.net, "*filter\n-F INPUT\nCOMMIT\n")
    }

    fn restart(&mut self) -> io::Result<()> {
        self.process.kill();
        self.process.start().map_err(io::Error::other)
    }
}
