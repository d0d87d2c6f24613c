//! An unmodified redis-benchmark that runs while a host is lost, and what redis-cli finds
//! afterwards.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use mcd::testbed::namespaces::{GUEST_IPV4, Namespace, find_tool};
use mcd::testbed::nodes::die_with_parent;

use crate::error::LabError;

/// What its INCR test counts up, once for each request.
const COUNTER: &str = "counter:__rand_int__";

/// A running redis-benchmark. Dropping it ends it.
#[derive(Debug)]
pub struct Benchmark {
    child: Child,
    log: PathBuf,
    requests: u32,
}

impl Benchmark {
    /// Starts it in `network`, with so many `requests` of each kind; what it prints goes into
    /// `logs`. The counter must not exist yet.
    pub fn start(network: &Namespace, logs: &Path, requests: u32) -> Result<Benchmark, LabError> {
        let program = find_tool("redis-benchmark");
        let program = program.ok_or_else(|| LabError::Missing("redis-benchmark (redis-tools)".to_owned()))?;
        let log = logs.join("redis-benchmark.log");
        let output = File::create(&log).map_err(LabError::io("make a log for redis-benchmark"))?;
        let copy = output.try_clone().map_err(LabError::io("make a log for redis-benchmark"))?;
        let mut command = network.command(program);
        command.args(["-h", &GUEST_IPV4.to_string(), "-t", "set,get,incr", "-c", "4", "--csv"]);
        command.args(["-n", &requests.to_string()]).stdin(Stdio::null()).stdout(copy).stderr(output);
        die_with_parent(&mut command);
        let child = command.spawn().map_err(LabError::io("start redis-benchmark"))?;
        Ok(Benchmark { child, log, requests })
    }

    /// Whether it has ended; an error if it ended badly.
    pub fn is_over(&mut self) -> Result<bool, LabError> {
        let ended = self.child.try_wait().map_err(LabError::io("wait for redis-benchmark"))?;
        let said = || std::fs::read_to_string(&self.log).unwrap_or_default();
        match ended {
            None => Ok(false),
            Some(status) if status.success() && !said().to_lowercase().contains("error") => Ok(true),
            Some(status) => Err(LabError::Wrong(format!("redis-benchmark ended with {status}: {}", said()))),
        }
    }

    /// Asks redis-cli whether every INCR has counted, and once only.
    pub fn check_counter(&self, network: &Namespace) -> Result<(), LabError> {
        let program = find_tool("redis-cli").ok_or_else(|| LabError::Missing("redis-cli (redis-tools)".to_owned()))?;
        let mut command = network.command(program);
        command.args(["-h", &GUEST_IPV4.to_string(), "GET", COUNTER]);
        let output = command.output().map_err(LabError::io("run redis-cli"))?;
        let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if said == self.requests.to_string() {
            return Ok(());
        }
        Err(LabError::Wrong(format!("redis-benchmark sent {} INCRs, but redis-cli finds {said:?}", self.requests)))
    }
}

impl Drop for Benchmark {
    fn drop(&mut self) {
        // It may have ended by itself; either way it must be waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
