//! A guest that writes to its disk, on hosts that die: what it was told is durable is there
//! afterwards, and the images are equal in the end.

mod full;
#[path = "../rights/mod.rs"]
mod rights;
#[path = "../waits/mod.rs"]
mod waits;
mod world;

use mcd::checkpoint::stamp::Stamp;
use mcd::control::status::State;
use mcd::demo::namespaces::HostName;
use mcd::demo::nodes::StartAs;
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

use world::*;

#[test]
fn acknowledged_writes_outlive_hosts_and_the_images_are_equal() {
    rights::run("acknowledged_writes_outlive_hosts_and_the_images_are_equal", &["/dev/kvm", "/dev/net/tun"], || {
        let rounds = from_environment("MCD_DISK_ROUNDS").unwrap_or(ROUNDS);
        let seed = from_environment("MCD_DISK_SEED").unwrap_or_else(|| getrandom::u64().expect("a random number"));
        println!("{rounds} rounds, MCD_DISK_SEED={seed}");
        let mut world = World::start(seed, NEVER_SUSPECT);
        let mut guest = Guest::connect(&world.namespaces);
        for round in 1..=rounds {
            assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")), "+OK");
            world.write_and_kill(&mut guest);
            world.check(&mut guest);
            world.protect_again();
            world.compare();
            if round % 50 == 0 || round == rounds {
                let (newcomers, writes) = (world.newcomers_killed, world.next_seed - 1);
                let had_percent = world.had_blocks * 100 / (round * DISK_BYTES.div_ceil(4096));
                println!(
                    "{round} primaries and {newcomers} newcomers killed, {writes} acknowledged writes there, \
                     {round} comparisons without a difference; newcomers had {had_percent} % of the blocks"
                );
            }
        }
        // A node that runs keeps its image for itself.
        assert!(says(&world.verify(), "is in use"));
        world.verify_while_the_guest_writes();
        assert_eq!(guest.ask("DISK RUN 0 0"), "+OK");
        // Whatever was answered is committed, so the secondary has every write; and there are no
        // more.
        quit(&mut world.secondary);
        quit(&mut world.primary);
        let verified = world.verify();
        assert!(verified.status.success() && says(&verified, "equal"), "{verified:?}");
        restarts(&mut world);
    });
}

#[test]
fn a_secondary_that_was_given_up_joins_again_with_its_disk() {
    rights::run("a_secondary_that_was_given_up_joins_again_with_its_disk", &["/dev/kvm", "/dev/net/tun"], || {
        let mut world = World::start(1, SUSPECT);
        let mut guest = Guest::connect(&world.namespaces);
        assert_eq!(guest.ask(&format!("DISK RUN {RUN_BLOCKS} 2000")), "+OK");
        let first = world.primary.status().expect("a status").peer;
        world.secondary.signal(Signal::SIGSTOP).expect("it lives");
        let verify = start_verify(&world.primary);
        wait_for(&mut world.primary, "go on alone", |status| status.state == State::Solo);
        let verified = verify.wait_with_output().expect("it ends");
        assert_eq!(verified.status.code(), Some(2), "{verified:?}");
        // A busy test host may have it ask too late.
        assert!(says(&verified, "the pair broke up") || says(&verified, "not protected"), "{verified:?}");
        assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 5")), "+OK");
        world.written[0] = 5;
        world.secondary.signal(Signal::SIGCONT).expect("it lives");
        let status = wait_for(&mut world.primary, "be protected again", |status| status.protected);
        assert_ne!(status.peer, first, "under a new name");
        assert_eq!(guest.ask("DISK RUN 0 0"), "+OK");
        world.check(&mut guest);
        quit(&mut world.secondary);
        quit(&mut world.primary);
        let verified = world.verify();
        assert!(verified.status.success(), "{verified:?}");
    });
}

/// After both nodes ended, the guest starts from the newer image and from no other.
fn restarts(world: &mut World) {
    let (newer, older) = (world.primary.host(), world.secondary.host());
    let mut refused = world.node(StartAs::Primary, older);
    wait_ended(&mut refused);
    assert!(refused.log_tail(3).contains("the newest image is on the other host"), "{}", refused.log_tail(3));
    world.primary = world.node(StartAs::Primary, newer);
    wait_for(&mut world.primary, "run the guest", |status| status.running);
    let mut guest = Guest::connect(&world.namespaces);
    world.check(&mut guest);
    assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 9")), "+OK");
    drop(guest);
    quit(&mut world.primary);
    let verified = world.verify();
    assert_eq!(verified.status.code(), Some(1), "{verified:?}");
    assert!(says(&verified, &format!("in block {RUN_BLOCKS}")), "{verified:?}");
    world.written[0] = 9;
    cold_starts(world, newer, older);
}

/// After both nodes died, the guest starts anew from the newest image and from no other.
fn cold_starts(world: &mut World, newer: HostName, older: HostName) {
    world.primary = world.node(StartAs::Primary, newer);
    let status = wait_for(&mut world.primary, "run the guest", |status| status.running);
    let deadline = Instant::now() + WAIT_MAX;
    while Stamp::read(&image(&world.dir, newer)).expect("a stamp").map(|stamp| stamp.at.generation.0)
        != Some(status.generation)
    {
        assert!(Instant::now() < deadline, "no stamp of generation {}", status.generation);
        std::thread::park_timeout(Duration::from_millis(2));
    }
    let mut guest = Guest::connect(&world.namespaces);
    assert_eq!(guest.ask(&format!("DISK WRITE {RUN_BLOCKS} 11")), "+OK");
    world.written[0] = 11;
    drop(guest);
    world.primary.kill().expect("a process to kill");
    wait_ended(&mut world.primary);
    for (role, host, part) in [
        (StartAs::Primary, newer, "use `mcd cold-start`"),
        (StartAs::ColdStart, older, "the newest image is on the other host"),
    ] {
        let mut refused = world.node(role, host);
        wait_ended(&mut refused);
        assert!(refused.log_tail(3).contains(part), "{}", refused.log_tail(3));
    }
    world.primary = world.node(StartAs::ColdStart, newer);
    wait_for(&mut world.primary, "run the guest", |status| status.running);
    let mut guest = Guest::connect(&world.namespaces);
    world.check(&mut guest);
}
