//! A guest that writes to its disk, on hosts that die: what it was told is durable is there
//! afterwards, and the images are equal in the end.

mod disk_pair;
mod full;

use mcd::checkpoint::stamp::Stamp;
use mcd::control::status::State;
use mcd::testbed::guest_client::GuestClient;
use mcd::testbed::namespaces::HostName;
use mcd::testbed::nodes::StartAs;
use mcd::testbed::require::{NODE_DEVICES, number_from_environment, with_rights};
use mcd::testbed::wait::WAIT_MAX;
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

use disk_pair::*;

#[test]
fn acknowledged_writes_outlive_hosts_and_the_images_are_equal() {
    with_rights("acknowledged_writes_outlive_hosts_and_the_images_are_equal", NODE_DEVICES, || {
        let rounds = number_from_environment("MCD_DISK_ROUNDS").unwrap_or(ROUNDS);
        let seed =
            number_from_environment("MCD_DISK_SEED").unwrap_or_else(|| getrandom::u64().expect("a random number"));
        println!("{rounds} rounds, MCD_DISK_SEED={seed}");
        let mut pair = DiskPair::start(seed, NEVER_SUSPECT);
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        for round in 1..=rounds {
            assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")).unwrap(), "+OK");
            pair.write_and_kill(&mut guest);
            pair.check(&mut guest);
            pair.protect_again();
            pair.compare();
            if round % 50 == 0 || round == rounds {
                let (newcomers, writes) = (pair.newcomers_killed, pair.next_seed - 1);
                let had_percent = pair.had_blocks * 100 / (round * DISK_BYTES.div_ceil(4096));
                println!(
                    "{round} primaries and {newcomers} newcomers killed, {writes} acknowledged writes there, \
                     {round} comparisons without a difference; newcomers had {had_percent} % of the blocks"
                );
            }
        }
        // A node that runs keeps its image for itself.
        assert!(says(&pair.verify(), "is in use"));
        pair.verify_while_the_guest_writes();
        assert_eq!(guest.ask("DISK RUN 0 0").unwrap(), "+OK");
        // Whatever was answered is committed, so the secondary has every write; and there are no
        // more.
        pair.secondary.quit().unwrap();
        pair.primary.quit().unwrap();
        let verified = pair.verify();
        assert!(verified.status.success() && says(&verified, "equal"), "{verified:?}");
        restarts(&mut pair);
    });
}

#[test]
fn a_secondary_that_was_given_up_joins_again_with_its_disk() {
    with_rights("a_secondary_that_was_given_up_joins_again_with_its_disk", NODE_DEVICES, || {
        let mut pair = DiskPair::start(1, SUSPECT);
        let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
        assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")).unwrap(), "+OK");
        let first = pair.primary.status().expect("a status").peer;
        pair.secondary.signal(Signal::SIGSTOP).expect("it lives");
        let verify = start_verify(&pair.primary);
        pair.primary.wait_status("go on alone", |status| status.state == State::Solo).unwrap();
        let verified = verify.wait_with_output().expect("it ends");
        assert_eq!(verified.status.code(), Some(2), "{verified:?}");
        // A busy test host may have it ask too late.
        assert!(says(&verified, "the pair broke up") || says(&verified, "not protected"), "{verified:?}");
        assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 5")).unwrap(), "+OK");
        pair.written[0] = 5;
        pair.secondary.signal(Signal::SIGCONT).expect("it lives");
        let status = pair.primary.wait_status("be protected again", |status| status.protected).unwrap();
        assert_ne!(status.peer, first, "under a new name");
        assert_eq!(guest.ask("DISK RUN 0 0").unwrap(), "+OK");
        pair.check(&mut guest);
        pair.secondary.quit().unwrap();
        pair.primary.quit().unwrap();
        let verified = pair.verify();
        assert!(verified.status.success(), "{verified:?}");
    });
}

/// After both nodes ended, the guest starts from the newer image and from no other.
fn restarts(pair: &mut DiskPair) {
    let (newer, older) = (pair.primary.host(), pair.secondary.host());
    let mut refused = pair.node(StartAs::Primary, older);
    refused.wait_ended().unwrap();
    assert!(refused.log_tail(3).contains("the newest image is on the other host"), "{}", refused.log_tail(3));
    pair.primary = pair.node(StartAs::Primary, newer);
    pair.primary.wait_status("run the guest", |status| status.running).unwrap();
    let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
    pair.check(&mut guest);
    assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 9")).unwrap(), "+OK");
    drop(guest);
    pair.primary.quit().unwrap();
    let verified = pair.verify();
    assert_eq!(verified.status.code(), Some(1), "{verified:?}");
    assert!(says(&verified, &format!("in block {RUN_BLOCKS}")), "{verified:?}");
    pair.written[0] = 9;
    cold_starts(pair, newer, older);
}

/// After both nodes died, the guest starts anew from the newest image and from no other.
fn cold_starts(pair: &mut DiskPair, newer: HostName, older: HostName) {
    pair.primary = pair.node(StartAs::Primary, newer);
    let status = pair.primary.wait_status("run the guest", |status| status.running).unwrap();
    let deadline = Instant::now() + WAIT_MAX;
    while Stamp::read(&image(&pair.dir, newer)).expect("a stamp").map(|stamp| stamp.at.generation.0)
        != Some(status.generation)
    {
        assert!(Instant::now() < deadline, "no stamp of generation {}", status.generation);
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
    assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 11")).unwrap(), "+OK");
    pair.written[0] = 11;
    drop(guest);
    pair.primary.kill().expect("a process to kill");
    pair.primary.wait_ended().unwrap();
    for (role, host, part) in [
        (StartAs::Primary, newer, "use `mcd cold-start`"),
        (StartAs::ColdStart, older, "the newest image is on the other host"),
    ] {
        let mut refused = pair.node(role, host);
        refused.wait_ended().unwrap();
        assert!(refused.log_tail(3).contains(part), "{}", refused.log_tail(3));
    }
    pair.primary = pair.node(StartAs::ColdStart, newer);
    pair.primary.wait_status("run the guest", |status| status.running).unwrap();
    let mut guest = GuestClient::connect(&pair.namespaces.lan).unwrap();
    pair.check(&mut guest);
}
