//! The arbiter: a real etcd on the clients' network, which each host reaches by another way than
//! the other host.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use mcd::demo::namespaces::{CLIENT_IPV4, Namespace, find_tool};
use mcd::demo::nodes::die_with_parent;

use crate::error::LabError;

/// The port clients use.
const PORT: u16 = 2379;
/// How long it may take to start.
const START_LIMIT: Duration = Duration::from_secs(60);
/// What it logs when it serves: version 3.4 the one, newer ones the other.
const SERVES: [&str; 2] = ["client requests on", "serving client traffic"];

/// A running etcd. Dropping it ends it.
#[derive(Debug)]
pub struct Etcd(Child);

impl Etcd {
    /// Starts it in `network` with its data in `directory`, and waits until it serves.
    pub fn start(network: &Namespace, directory: &Path) -> Result<Etcd, LabError> {
        let program = find_tool("etcd").ok_or_else(|| LabError::Missing("etcd (etcd-server)".to_owned()))?;
        let log = directory.join("etcd.log");
        let mut command = network.command(program);
        command.arg("--data-dir").arg(directory.join("etcd")).args(["--name", "m0"]);
        command.args(["--listen-client-urls", &url(), "--advertise-client-urls", &url()]);
        // Nobody cuts this machine's power.
        command.arg("--unsafe-no-fsync");
        let stderr = File::create(&log).map_err(LabError::io("make a log for etcd"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        die_with_parent(&mut command);
        let mut etcd = Etcd(command.spawn().map_err(LabError::io("start etcd"))?);
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let said = fs::read_to_string(&log).map_err(LabError::io("read etcd's log"))?;
            if SERVES.iter().any(|words| said.contains(words)) {
                return Ok(etcd);
            }
            let ended = etcd.0.try_wait().map_err(LabError::io("wait for etcd"))?.is_some();
            if ended || Instant::now() >= deadline {
                let what = "etcd to serve".to_owned();
                return Err(LabError::TooLate { what, limit_s: START_LIMIT.as_secs(), last: format!("\n{said}") });
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It may have ended by itself; either way it must be waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn url() -> String {
    format!("http://{CLIENT_IPV4}:{PORT}")
}

/// What `--arbiter` is told.
pub fn flag() -> String {
    format!("etcd:{}", url())
}
