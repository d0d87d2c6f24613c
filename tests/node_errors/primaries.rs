//! A primary that is welcome and then sends what no primary sends: the secondary gives the
//! connection up, acknowledges nothing of it, and joins again under a new name.

use std::fs;

use mcd::protocol::messages::{Activity, Channel, Heartbeat, Message};
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::types::{EpochId, Generation, InstanceId};
use mcd::wire::FrameKind;

use super::environment::{PRIMARY, run};
use super::fake::{Epoch, FakePrimary, Joined, MEMORY_BYTES, bulk, epoch, frame, garbage, hello, pages, welcome};
use super::process::Node;

const PAGES: u64 = MEMORY_BYTES / 4096;

/// Lets the node join, sends it a good epoch and then `bytes`, which it must not stand.
#[track_caller]
fn not_stood(fake: &FakePrimary, node: &mut Node, bytes: &[u8], part: &str) {
    let mut joined = fake.join();
    joined.data.send_bytes(&Epoch::new(3).frames());
    joined.acked(epoch(3));
    given_up(joined, node, bytes, part);
}

#[track_caller]
fn given_up(mut joined: Joined, node: &mut Node, bytes: &[u8], part: &str) {
    let name = joined.newcomer;
    joined.data.send_bytes(bytes);
    joined.closes();
    node.wait_warning(part);
    node.wait_status("known by a new name", |status| status.instance != name.to_string());
}

#[test]
fn a_secondary_disconnects_at_a_damaged_epoch_and_does_not_ack_it() {
    run("primaries::a_secondary_disconnects_at_a_damaged_epoch_and_does_not_ack_it", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[]);
        let good = || Epoch::new(4);
        let mut spoilt = |bad: Epoch, part: &str| not_stood(&fake, &mut node, &bad.frames(), part);
        spoilt(Epoch { digest_xor: 1, ..good() }, "its checksum is");
        spoilt(Epoch { more_pages: 1, ..good() }, "its page count is 2, announced as 3");
        spoilt(Epoch { more_state: 1, ..good() }, "its state's length is 100, announced as 101");
        spoilt(Epoch { end_id: epoch(5), ..good() }, "its number is 4, announced as 5");
        let generation = Generation(6);
        spoilt(Epoch { end_id: EpochId { generation, epoch: 4 }, ..good() }, "its generation is 5, announced as 6");
        spoilt(Epoch { pages: vec![PAGES], ..good() }, "beyond the guest's 4096 pages");
        spoilt(Epoch { pages: vec![u64::MAX], ..good() }, "beyond the guest's 4096 pages");
        spoilt(Epoch::new(3), "it sent epoch");
        spoilt(Epoch::new(5), "out of order");
        let id = EpochId { generation, epoch: 4 };
        spoilt(Epoch { id, end_id: id, ..good() }, "out of order");
    });
}

#[test]
fn a_secondary_disconnects_at_a_frame_out_of_turn() {
    run("primaries::a_secondary_disconnects_at_a_frame_out_of_turn", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[]);
        let begin = frame(&Message::EpochBegin { id: epoch(4), completes_resync: false });
        let end = frame(&Message::EpochEnd { id: epoch(4), pages: 0, state_bytes: 0, digest: 0 });
        let background = bulk(FrameKind::Background, &pages(&[2]));
        let mut sent = |bytes: &[u8], part: &str| not_stood(&fake, &mut node, bytes, part);
        sent(&end, "the end of an epoch outside an epoch");
        sent(&[begin.clone(), begin.clone()].concat(), "the begin of an epoch inside another");
        sent(&[begin.clone(), background.clone()].concat(), "background pages inside an epoch");
        sent(&bulk(FrameKind::State, b"state"), "machine state outside an epoch");
        sent(&bulk(FrameKind::Pages, &pages(&[2])), "pages outside an epoch");
        sent(&bulk(FrameKind::Background, &pages(&[PAGES])), "beyond the guest's 4096 pages");
        sent(&bulk(FrameKind::Background, &garbage(5000)), "page");
        sent(&bulk(FrameKind::Background, &[]), "an empty frame of background pages");
        sent(&[begin.clone(), bulk(FrameKind::Pages, &[])].concat(), "an empty frame of pages");
        let mut damaged = bulk(FrameKind::Background, &pages(&[2]));
        *damaged.last_mut().expect("bytes") ^= 1;
        sent(&damaged, "arrived damaged");
        sent(&garbage(5000), "does not speak mcd");
        sent(&frame(&Message::Welcome(welcome())), "welcome out of turn");
        sent(&frame(&Message::Hello(hello(Channel::Data, 9))), "what does not belong here (hello)");
        sent(&frame(&Message::Ack { id: epoch(3), staged_bytes: 0 }), "what does not belong here (ack)");
        let beat = Heartbeat {
            instance: InstanceId(77),
            generation: Generation(5),
            sequence: 1,
            committed: None,
            activity: Activity::Ready,
        };
        sent(&frame(&Message::Heartbeat(beat)), "what does not belong here (heartbeat)");

        // Before the welcome, and before the second connection.
        let (mut peer, _) = fake.accept_data();
        peer.send_bytes(&Epoch::new(0).frames());
        peer.is_closed();
        node.wait_warning("an epoch before its welcome");
        for (bytes, part) in [(Epoch::new(0).frames(), "out of turn"), (background, "pages out of turn")] {
            let (mut peer, _) = fake.accept_data();
            peer.send(&Message::Welcome(welcome()));
            peer.send_bytes(&bytes);
            peer.is_closed();
            node.wait_warning(part);
        }
    });
}

#[test]
fn a_heartbeat_connection_takes_heartbeats_only() {
    run("primaries::a_heartbeat_connection_takes_heartbeats_only", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[]);
        let bye = Message::Bye { reason: "the guest was shut down".into() };
        let cases = [
            (Epoch::new(0).frames(), "a heartbeat connection (epoch-begin)"),
            (bulk(FrameKind::Background, &pages(&[2])), "a background frame, which does not belong"),
            (bulk(FrameKind::Probe, &[]), "a probe frame, which does not belong"),
            (frame(&bye), "a heartbeat connection (bye)"),
        ];
        for (bytes, part) in cases {
            let mut joined = fake.join();
            joined.heartbeat.send_bytes(&bytes);
            joined.closes();
            node.wait_warning(part);
        }
    });
}

#[test]
fn a_secondary_disconnects_at_a_pair_record_that_is_not_its_own() {
    run("primaries::a_secondary_disconnects_at_a_pair_record_that_is_not_its_own", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[]);
        let pair = |joined: &Joined| Record {
            generation: Generation(6),
            state: RecordState::Paired,
            owner: InstanceId(77),
            peer: Some(joined.newcomer),
        };
        let paired = |record: Record| frame(&Message::Paired { record });
        // The image still has holes.
        let joined = fake.join();
        let early = paired(pair(&joined));
        given_up(joined, &mut node, &early, "a pair that is not this one");

        // The image is whole, but the pair is another's; or nothing is to come before the pair.
        let whole = || {
            let mut joined = fake.join();
            joined.data.send_bytes(&Epoch { completes_resync: true, ..Epoch::new(3) }.frames());
            joined.acked(epoch(3));
            joined
        };
        type Spoil = fn(Record) -> Record;
        let spoil: [(Spoil, &str); 4] = [
            (|good| Record { peer: Some(InstanceId(9)), ..good }, "a pair that is not this one"),
            (|good| Record { owner: InstanceId(9), ..good }, "a pair that is not this one"),
            (|good| Record { generation: Generation(7), ..good }, "a pair that is not this one"),
            (|good| Record { state: RecordState::Solo, ..good }, "a malformed record"),
        ];
        for (spoil, part) in spoil {
            let joined = whole();
            let bad = paired(spoil(pair(&joined)));
            given_up(joined, &mut node, &bad, part);
        }
    });
}

#[test]
fn epochs_are_acked_in_the_order_of_the_pair_record_only() {
    run("primaries::epochs_are_acked_in_the_order_of_the_pair_record_only", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[]);
        let whole = || {
            let mut joined = fake.join();
            joined.data.send_bytes(&Epoch { completes_resync: true, ..Epoch::new(3) }.frames());
            joined.acked(epoch(3));
            joined
        };
        given_up(whole(), &mut node, &Epoch::new(4).frames(), "out of turn");
        node.wait_warning("the arbiter has no record of this guest");

        let mut joined = whole();
        let record = Record {
            generation: Generation(6),
            state: RecordState::Paired,
            owner: InstanceId(77),
            peer: Some(joined.newcomer),
        };
        joined.data.send(&Message::Paired { record });
        let first = EpochId { generation: Generation(6), epoch: 0 };
        joined.data.send_bytes(&Epoch { id: first, end_id: first, ..Epoch::new(0) }.frames());
        joined.acked(first);
        // Suspicion does not decide: what stands at the arbiter does, and that is nothing.
        given_up(joined, &mut node, &Epoch::new(4).frames(), "out of order");
        node.wait_warning("the arbiter has no record of this guest");

        let mut joined = fake.join();
        joined.data.send(&Message::Bye { reason: "the guest was shut down".into() });
        node.ends_well();
    });
}

/// A figure of a process' status, such as `Threads` or `VmRSS` (in KiB).
fn figure(node: &Node, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", node.pid())).expect("it lives");
    let line = status.lines().find(|line| line.starts_with(name)).expect("a figure");
    line.split_whitespace().nth(1).and_then(|word| word.parse().ok()).expect("a number")
}

#[test]
fn an_epoch_larger_than_the_staging_budget_is_refused_and_leaves_no_memory_behind() {
    run("primaries::an_epoch_larger_than_the_staging_budget_is_refused_and_leaves_no_memory_behind", |host| {
        const STAGING_MIB: u64 = 24;
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[&format!("--staging-max={STAGING_MIB}M")]);
        let begin = frame(&Message::EpochBegin { id: epoch(4), completes_resync: false });
        // Pages that do not compress, a MiB of them in each frame: an epoch without end.
        let noise = garbage(4096);
        let mut record = vec![0; 8];
        record.extend([1, 0, 16]);
        record.extend(&noise);
        let chunk = bulk(FrameKind::Pages, &record.repeat(255));
        let flood = [begin, chunk.repeat(30)].concat();
        let mut threads = Vec::new();
        for _ in 0..8 {
            not_stood(&fake, &mut node, &flood, "this node stages");
            let joined = fake.join();
            threads.push(figure(&node, "Threads"));
            let resident_mib = figure(&node, "VmRSS") >> 10;
            assert!(resident_mib < 16 + 2 * STAGING_MIB + 64, "{resident_mib} MiB");
            drop(joined);
        }
        // Those of the last connection may still be on their way out.
        assert!(threads.iter().max().expect("some") <= &(threads[0] + 4), "threads are left behind: {threads:?}");
    });
}
