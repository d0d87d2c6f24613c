//! The short form of the soak: the most telling dozen of faults, each once, on real pairs. What
//! must hold is safety and who runs the guest in the end; how fast it was is for `make soak`, on a
//! machine that does nothing else.

use std::process::Command;

use mcd::testbed::require::{REQUIRE_KVM, devices, skip};

/// What the program exits with where the host lacks something.
const HOST_LACKS_SOMETHING: i32 = 3;

#[test]
fn the_short_fault_matrix_comes_true() {
    if let Err(why) = devices(&["/dev/kvm"]) {
        return skip(REQUIRE_KVM, why);
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_mcd-harness"));
    // Tests share their machine with others: a timeout that only a dead peer exceeds.
    command.args(["--short", "--lenient", "--seed", "1", "--memory", "32", "--heartbeat-interval-ms", "150"]);
    let output = command.output().expect("the harness was built with this test");
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.code() == Some(HOST_LACKS_SOMETHING) {
        return skip(REQUIRE_KVM, complained.trim());
    }
    assert!(output.status.success(), "{said}\n{complained}");
    assert!(said.contains(" 0 violations: every row came true"), "{said}");
}
