//! What a test needs of its host: devices, programs, and the right to make namespaces. Where one
//! is missing the test is skipped, or fails if the environment requires that it runs.

use std::fmt::Display;
use std::fs::File;
use std::process::Command;

use super::namespaces::{has_rights, start_in_user_namespace};

/// Set to 1 where tests of KVM, taps and namespaces must run.
pub const REQUIRE_KVM: &str = "MCD_REQUIRE_KVM";
/// Set to 1 where tests of etcd must run.
pub const REQUIRE_ETCD: &str = "MCD_REQUIRE_ETCD";
/// The devices of a node: KVM, and the one that makes taps.
pub const NODE_DEVICES: &[&str] = &["/dev/kvm", "/dev/net/tun"];
/// Set in a test binary that runs again in a user namespace.
const INSIDE: &str = "MCD_TEST_INSIDE";

/// Reports that a test is skipped.
///
/// # Panics
/// If the environment has `variable` set to 1: the test must run.
#[track_caller]
pub fn skip(variable: &str, why: impl Display) {
    assert!(std::env::var_os(variable).is_none_or(|value| value != "1"), "{why}");
    println!("skipped: {why}");
}

/// Whether this user may read and write all of `devices`; else the reason.
///
/// # Errors
/// One line that names the first device that cannot be opened.
pub fn devices(devices: &[&str]) -> Result<(), String> {
    for device in devices {
        File::options().read(true).write(true).open(device).map_err(|error| format!("{device}: {error}"))?;
    }
    Ok(())
}

/// Whether this user may make namespaces, as root or inside a user namespace.
///
/// # Errors
/// One line that says what is missing.
pub fn namespaces() -> Result<(), String> {
    let mut command = Command::new("true");
    if !has_rights() {
        start_in_user_namespace(&mut command);
    }
    command.status().map(drop).map_err(no_namespaces)
}

fn no_namespaces(error: std::io::Error) -> String {
    format!("network namespaces need root or user namespaces ({error})")
}

/// Runs `body`, the body of the test with the full path `test`, where this host lets it open
/// `wanted` and make namespaces. A test binary has many threads and cannot move into a user
/// namespace, so an unprivileged one starts itself again, inside one, for this test alone.
///
/// # Panics
/// If the test fails, or cannot run and must.
#[track_caller]
pub fn with_rights(test: &str, wanted: &[&str], body: impl FnOnce()) {
    if let Err(why) = devices(wanted) {
        return skip(REQUIRE_KVM, why);
    }
    if has_rights() {
        return body();
    }
    if std::env::var_os(INSIDE).is_some() {
        return skip(REQUIRE_KVM, "no right to make namespaces, even inside a user namespace");
    }
    let ended = std::env::current_exe().and_then(|program| {
        let mut again = Command::new(program);
        // A test that is ignored by default is known to be wanted here.
        again.args([test, "--exact", "--nocapture", "--include-ignored"]).env(INSIDE, "1");
        start_in_user_namespace(&mut again);
        again.status()
    });
    match ended {
        Ok(status) => assert!(status.success(), "the test failed inside a user namespace"),
        Err(error) => skip(REQUIRE_KVM, no_namespaces(error)),
    }
}

/// The number in an environment variable, if it is set.
///
/// # Panics
/// If it is no number.
pub fn number_from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}
