//! What tests of whole nodes share: waiting until a node says something, or has ended.
#![allow(dead_code)] // not every test needs all of it

use std::time::{Duration, Instant};

use mcd::control::Client;
use mcd::control::status::NodeStatus;
use mcd::demo::nodes::Node;
use serde_json::Value;

/// How long a test waits before it says that something hangs.
pub const WAIT_MAX: Duration = Duration::from_secs(60);

/// Has a node end, and waits until it has.
pub fn quit(node: &mut Node) {
    let mut client = Client::connect(node.control(), WAIT_MAX).expect("a control socket");
    client.execute("quit", Value::Null, WAIT_MAX).expect("quit");
    wait_ended(node);
}

/// Waits until a node has ended.
pub fn wait_ended(node: &mut Node) {
    let deadline = Instant::now() + WAIT_MAX;
    while node.ended().is_none() {
        assert!(Instant::now() < deadline, "{} does not end:\n{}", node.name(), node.log_tail(20));
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// Waits until a node's status is as wanted.
pub fn wait_for(node: &mut Node, what: &str, mut done: impl FnMut(&NodeStatus) -> bool) -> NodeStatus {
    let deadline = Instant::now() + WAIT_MAX;
    loop {
        if let Some(status) = node.status()
            && done(&status)
        {
            return status;
        }
        assert!(node.ended().is_none(), "{} ended and did not {what}:\n{}", node.name(), node.log_tail(20));
        assert!(Instant::now() < deadline, "{} did not {what}:\n{}", node.name(), node.log_tail(20));
        // A status is asked for again and again; this only keeps the asking from taking a core.
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

/// The number in an environment variable, if it is set.
pub fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}
