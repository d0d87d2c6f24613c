//! The arbiter: a real etcd on the clients' network, which each host reaches by another way than
//! the other host.

use std::path::Path;
use std::sync::Arc;

use mcd::testbed::etcd::{ETCD_PORT, EtcdProcess, EtcdSettings};
use mcd::testbed::namespaces::{CLIENT_IPV4, Namespace};

use crate::error::LabError;

/// Starts it in `network` with its data in `directory`, and waits until it serves.
pub fn start(network: &Arc<Namespace>, directory: &Path) -> Result<EtcdProcess, LabError> {
    let mut etcd = EtcdProcess::new(EtcdSettings {
        network: Some(network.clone()),
        name: "m0".to_owned(),
        data: directory.join("etcd"),
        url: url(),
        // Nobody cuts this machine's power.
        flags: vec!["--unsafe-no-fsync".to_owned()],
        log: directory.join("etcd.log"),
    });
    etcd.start()?;
    Ok(etcd)
}

fn url() -> String {
    format!("http://{CLIENT_IPV4}:{ETCD_PORT}")
}

/// The value of `--arbiter`.
pub fn flag() -> String {
    format!("etcd:{}", url())
}
