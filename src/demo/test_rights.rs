//! Runs a test that needs network namespaces: as it is where it may, else again in a user
//! namespace.

use std::process::Command;

use super::namespaces::{has_rights, open_tun, start_in_user_namespace};

/// Runs `body`, the body of the test with the full path `name`. A test binary has many threads and
/// cannot move into a user namespace, so an unprivileged one starts itself again, inside one, for
/// this test alone.
pub(crate) fn run(name: &str, body: impl FnOnce()) {
    const INSIDE: &str = "MCD_TEST_INSIDE";
    let failed = |why: String| {
        assert!(std::env::var_os("MCD_REQUIRE_KVM").is_none_or(|v| v != "1"), "{why}");
        println!("skipped: {why}");
    };
    if let Err(e) = open_tun() {
        return failed(format!("/dev/net/tun: {e}"));
    }
    if has_rights() {
        return body();
    }
    if std::env::var_os(INSIDE).is_some() {
        return failed("no right to make network namespaces, even inside a user namespace".to_owned());
    }
    let exe = std::env::current_exe().expect("a test binary knows its own path");
    let mut again = Command::new(exe);
    again.args([name, "--exact", "--nocapture"]).env(INSIDE, "1");
    start_in_user_namespace(&mut again);
    match again.status() {
        Ok(status) => assert!(status.success(), "the test failed inside a user namespace"),
        Err(e) => failed(format!("network namespaces need root or user namespaces ({e})")),
    }
}
