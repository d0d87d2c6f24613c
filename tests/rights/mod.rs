//! The rights a test needs: devices, and namespaces, for which an ordinary user needs a user
//! namespace around the test.

use std::fs::File;
use std::process::Command;

use mcd::demo::namespaces::{has_rights, start_in_user_namespace};

/// Set in a test binary that runs again in a user namespace.
const INSIDE: &str = "MCD_TEST_INSIDE";

/// Runs `body`, the body of the test `name`, where this host lets it open `devices` and make
/// namespaces. A test binary has many threads and cannot move into a user namespace, so an ordinary
/// user's starts itself again, inside one, for this test alone. Where that is not possible the test
/// is skipped, or fails if the environment says that it must run.
pub fn run(name: &str, devices: &[&str], body: impl FnOnce()) {
    for device in devices {
        if let Err(error) = File::options().read(true).write(true).open(device) {
            return cannot(&format!("{device}: {error}"));
        }
    }
    if has_rights() {
        return body();
    }
    if std::env::var_os(INSIDE).is_some() {
        return cannot("no right to make namespaces, even inside a user namespace");
    }
    let mut again = Command::new(std::env::current_exe().expect("a test binary knows its own path"));
    again.args([name, "--exact", "--nocapture"]).env(INSIDE, "1");
    start_in_user_namespace(&mut again);
    match again.status() {
        Ok(status) => assert!(status.success(), "the test failed inside a user namespace"),
        Err(error) => cannot(&format!("namespaces need root or user namespaces ({error})")),
    }
}

fn cannot(why: &str) {
    assert!(std::env::var("MCD_REQUIRE_KVM").as_deref() != Ok("1"), "{why}");
    println!("skipped: {why}");
}
