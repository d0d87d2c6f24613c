//! The guest shuts down in the middle of a flood of output.

use std::time::Duration;

use mcd::testbed::guest_client::{GuestClient, connect_to_guest};
use mcd::testbed::namespaces::{HostName, Namespaces};
use mcd::testbed::nodes::{Node, NodeSettings, RunDir, StartAs};
use mcd::testbed::require::{NODE_DEVICES, with_rights};
use mcd::testbed::wait::WAIT_MAX;

/// Most replies of the flood; it is in full flow when the guest is shut down.
const REPLIES: usize = 20_000;
/// Less than the longest line that the client takes.
const VALUE_BYTES: usize = 16 << 10;
/// How long the flood waits for a reply.
const FLOOD_TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn a_shutdown_of_the_guest_during_a_flood_of_output_ends_both_nodes() {
    with_rights("a_shutdown_of_the_guest_during_a_flood_of_output_ends_both_nodes", NODE_DEVICES, || {
        let (namespaces, dir) = (Namespaces::new().unwrap(), RunDir::new().unwrap());
        let settings = NodeSettings {
            program: vec![env!("CARGO_BIN_EXE_mcd").into()],
            memory_mib: 64,
            cpus: 2,
            interval_ms: 10,
            flags: ["--heartbeat-interval-ms=200", "--heartbeat-timeout-ms=20000"].map(str::to_owned).to_vec(),
            ..NodeSettings::default()
        };
        let start = |role, host, name| Node::start(role, host, name, &settings, &namespaces, &dir).unwrap();
        let mut primary = start(StartAs::Primary, HostName::A, "n0");
        primary.wait_status("run the guest", |status| status.running).unwrap();
        let mut secondary = start(StartAs::Secondary, HostName::B, "n1");
        primary.wait_status("be protected", |status| status.protected).unwrap();
        // It ends soon after the guest, which closes no connection.
        let flood = connect_to_guest(&namespaces.lan, WAIT_MAX).unwrap();
        let mut flood = GuestClient::over(flood, FLOOD_TIMEOUT).unwrap();
        assert_eq!(flood.ask(&format!("SET key {}", "x".repeat(VALUE_BYTES))).unwrap(), "+OK");
        let mut operator = GuestClient::connect(&namespaces.lan).unwrap();
        assert_eq!(operator.ask("PING").unwrap(), "+PONG");
        let ended = std::thread::scope(|scope| {
            let (first, flows) = crossbeam::channel::bounded(1);
            scope.spawn(move || {
                for number in 0..REPLIES {
                    if flood.send("GET key").is_err() || flood.line().is_err() || flood.line().is_err() {
                        return;
                    }
                    if number == 100 {
                        let _ = first.send(());
                    }
                }
            });
            flows.recv().unwrap();
            operator.send("SHUTDOWN").unwrap();
            (primary.wait_ended(), secondary.wait_ended())
        });
        assert!(ended.0.unwrap().success(), "the primary ends in order");
        assert!(ended.1.unwrap().success(), "the secondary is informed and ends in order");
    });
}
