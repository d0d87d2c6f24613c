//! More disk writes in one epoch than may wait for a commit: they wait in the device, the guest
//! runs on, and nothing is lost.

use mcd::protocol::machine_shape::JOURNAL_BYTES_MAX;
use nix::sys::signal::Signal;

use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::require::{NODE_DEVICES, with_rights};

use super::disk_pair::*;

/// Blocks that the guest writes to as fast as it can: twice as many as the journal holds.
const FLOOD_BLOCKS: u64 = 2 * JOURNAL_BYTES_MAX / 4096;
const DISK_BYTES: u64 = (FLOOD_BLOCKS + CLIENT_BLOCKS) * 4096;
/// The journal fills while the secondary is frozen, which may take long on a busy test host.
const WAIT_LONG: &str = "--heartbeat-timeout-ms=120000";

#[test]
fn writes_that_find_the_journal_full_wait_and_none_is_lost() {
    with_rights("full::writes_that_find_the_journal_full_wait_and_none_is_lost", NODE_DEVICES, || {
        let mut pair = DiskPair::with_disk(2, WAIT_LONG, DISK_BYTES, FLOOD_BLOCKS);
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        // With no commit in sight everything the guest writes has to be kept.
        pair.secondary.signal(Signal::SIGSTOP).expect("it lives");
        guest.send(&format!("DISK RUN {FLOOD_BLOCKS} 1000000")).unwrap();
        let full = pair.primary.wait_status("find its journal full", |status| status.journal_full_times > 0).unwrap();
        assert!(full.running && full.protected, "the guest runs on, and is not given up for it: {full}");
        let room = full.journal_bytes;
        assert!((JOURNAL_BYTES_MAX / 2..=JOURNAL_BYTES_MAX).contains(&room), "{room} bytes wait");
        // Nor does a comparison hold up the guest or the control socket, or another one push it
        // aside.
        let verify = start_verify(&pair.primary);
        let second = verify_online(&pair.primary, &[]);
        assert_eq!(second.status.code(), Some(2), "{second:?}");
        assert!(says(&second, "are being verified already"), "{second:?}");
        pair.secondary.signal(Signal::SIGCONT).expect("it lives");
        assert_eq!(guest.line().unwrap(), "+OK");
        let committed = full.epochs.committed;
        pair.primary.wait_status("commit again", |status| status.epochs.committed > committed + 3).unwrap();
        let verified = verify.wait_with_output().expect("it ends");
        assert_eq!(verified.status.code(), Some(0), "in the flood of writes: {verified:?}");
        // The primary dies in the flood: what was acknowledged is there, and a newcomer gets the
        // same.
        pair.write_and_kill(&mut guest);
        assert_eq!(guest.ask("DISK RUN 0 0").unwrap(), "+OK");
        pair.check(&mut guest);
        pair.protect_again();
        pair.compare();
        pair.secondary.quit().unwrap();
        pair.primary.quit().unwrap();
        let verified = pair.verify();
        assert!(verified.status.success() && says(&verified, "equal"), "{verified:?}");
    });
}
