//! Peers that ask for hashes of blocks that are not there, that answer what nobody asked, and that
//! send blocks beyond the disks.

use std::fs;
use std::path::{Path, PathBuf};

use mcd::checkpoint::block_hashes::hash_of;
use mcd::control::status::{NodeStatus, State};
use mcd::protocol::block_hashes::{BlockHash, HASH_BLOCKS_MAX};
use mcd::protocol::machine_shape::{DiskShape, MachineShape};
use mcd::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, Welcome, features};
use mcd::protocol::types::{Generation, InstanceId};
use mcd::wire::block_hashes::{decode_hashes, encode_hashes};
use mcd::wire::codec::decode_message;
use mcd::wire::{FrameKind, PageDecoder};

use super::environment::{Environment, PRIMARY, run};
use super::fake::{Epoch, FakePrimary, MEMORY_BYTES, Peer, bulk, epoch, frame, hello, pages, welcome};
use super::process::Node;

/// Blocks of the disk; of the last one there are 512 bytes.
const BLOCKS: u64 = 300;
const DISK_BYTES: u64 = (BLOCKS - 1) * 4096 + 512;
/// The index of its first block.
const FIRST: u64 = MEMORY_BYTES / 4096;

/// An image whose blocks are each filled with their number, but for its upper bits.
fn image(host: &Environment, name: &str) -> PathBuf {
    let path = host.path(name);
    let bytes: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 4096) as u8).collect();
    fs::write(&path, bytes).expect("an image");
    path
}

fn flag(path: &Path) -> String {
    format!("--disk={}", path.display())
}

/// The hashes of blocks of such an image, by their indexes.
fn hashes(first: u64, count: u64) -> Vec<BlockHash> {
    let sum = |number: u64| {
        let mut block = [number as u8; 4096];
        if number == BLOCKS - 1 {
            block[512..].fill(0);
        }
        hash_of(&block)
    };
    (first..first + count).map(|index| sum(index - FIRST)).collect()
}

fn welcome_with_disk(features: u64) -> Welcome {
    let disks = vec![DiskShape { bytes: DISK_BYTES, read_only: false, serial: [0; 20], shared: false }];
    let good = welcome();
    Welcome { shape: MachineShape { disks, ..good.shape }, features, ..good }
}

fn ask(first: u64, count: u32) -> Vec<u8> {
    frame(&Message::HashBlocks { first, count })
}

#[test]
fn a_secondary_disconnects_at_malformed_block_hash_requests() {
    run("block_hashes::a_secondary_disconnects_at_malformed_block_hash_requests", |host| {
        let fake = FakePrimary::listen(PRIMARY);
        let mut node = host.secondary(&[&flag(&image(host, "s.img")), "--force-disk"]);
        let able = welcome_with_disk(features::LZ4 | features::DISK_HASHES);

        // Good ones first: of what is there, and then of what an epoch has changed and background
        // pages behind it.
        let mut joined = fake.join_with(&able);
        let mut answer = |first: u64, count: u64| {
            joined.data.send_bytes(&ask(first, count as u32));
            let (kind, payload) = joined.data.read_frame().expect("an answer");
            assert_eq!(kind, FrameKind::Hashes);
            let (from, hashes) = decode_hashes(&payload).expect("hashes");
            assert_eq!((from, hashes.len() as u64), (first, count));
            hashes
        };
        assert!(answer(FIRST, HASH_BLOCKS_MAX) == hashes(FIRST, HASH_BLOCKS_MAX));
        assert!(answer(FIRST + 256, BLOCKS - 256) == hashes(FIRST + 256, BLOCKS - 256));
        let ones = hash_of(&[1; 4096]);
        joined.data.send_bytes(&Epoch { pages: vec![1, FIRST + 7], ..Epoch::new(3) }.frames());
        joined.data.send_bytes(&bulk(FrameKind::Background, &pages(&[FIRST + 8])));
        joined.data.send_bytes(&ask(FIRST + 6, 3));
        joined.acked(epoch(3));
        let (_, payload) = joined.data.read_frame().expect("an answer");
        let (_, changed) = decode_hashes(&payload).expect("hashes");
        assert_eq!(changed, [hashes(FIRST + 6, 1)[0], ones, ones]);
        // What the primary says of the resync is what people see here.
        joined.data.send_bytes(&frame(&Message::ResyncLeft { left: vec![FIRST / 4, 299] }));
        let status = node.wait_status("told how far it is", |status| status.resync.is_some());
        assert_eq!(parts(&status), [("memory", MEMORY_BYTES, MEMORY_BYTES / 4), ("disk 0", 300 << 12, 299 << 12)]);
        drop(joined);

        let mut not_stood = |welcome: &Welcome, bytes: &[u8], part: &str| {
            let mut joined = fake.join_with(welcome);
            joined.data.send_bytes(bytes);
            while let Ok((kind, _)) = joined.data.read_frame() {
                assert_eq!(kind, FrameKind::Hashes, "nothing is acknowledged");
            }
            node.wait_warning(part);
        };
        let nowhere = "it asked for hashes of blocks that no disk has";
        let bad = [(0, 1), (FIRST - 1, 2), (FIRST, 0), (FIRST, HASH_BLOCKS_MAX as u32 + 1), (FIRST + BLOCKS, 1)];
        for (first, count) in [&bad[..], &[(FIRST + BLOCKS - 1, 2), (u64::MAX, 1), (u64::MAX, u32::MAX)]].concat() {
            not_stood(&able, &ask(first, count), nowhere);
        }
        // More of them than can be answered before the next one is read.
        not_stood(&able, &ask(FIRST, 256).repeat(200), "again before it had them");
        let unable = welcome_with_disk(features::LZ4);
        not_stood(&unable, &ask(FIRST, 1), "it asked for hashes of blocks out of turn");
        let left = frame(&Message::ResyncLeft { left: vec![1, 2] });
        not_stood(&unable, &left, "words that were not agreed on");
        not_stood(&able, &bulk(FrameKind::Hashes, &encode_hashes(FIRST, &[ones])), "which are a secondary's to send");
        let beyond = "beyond the guest's 4396 pages";
        not_stood(&able, &Epoch { pages: vec![FIRST + BLOCKS], ..Epoch::new(3) }.frames(), beyond);
        not_stood(&able, &bulk(FrameKind::Background, &pages(&[FIRST + BLOCKS])), beyond);
        not_stood(&able, &bulk(FrameKind::Background, &pages(&[u64::MAX])), beyond);
    });
}

/// The parts of a resync: name, bytes, bytes left.
fn parts(status: &NodeStatus) -> Vec<(&str, u64, u64)> {
    let parts = status.resync.iter().flat_map(|resync| &resync.parts);
    parts.map(|part| (part.name.as_str(), part.bytes_total, part.bytes_left)).collect()
}

/// A newcomer in the test's own hands.
struct Newcomer {
    data: Peer,
    heartbeat: Peer,
    instance: u128,
    sequence: u64,
}

impl Newcomer {
    fn join(instance: u128) -> Newcomer {
        let connect = |port, channel| {
            let mut peer = Peer::connect(port);
            let good = hello(channel, instance);
            peer.send(&Message::Hello(Hello { features: good.features | features::DISK_HASHES, ..good }));
            assert!(matches!(peer.read(), Ok(Message::Welcome(_))));
            peer
        };
        let data = connect(PRIMARY[0], Channel::Data);
        let heartbeat = connect(PRIMARY[1], Channel::Heartbeat);
        let mut newcomer = Newcomer { data, heartbeat, instance, sequence: 0 };
        newcomer.beat();
        newcomer
    }

    fn beat(&mut self) {
        self.sequence += 1;
        let (instance, sequence) = (InstanceId(self.instance), self.sequence);
        let beat =
            Heartbeat { instance, generation: Generation(1), sequence, committed: None, activity: Activity::Ready };
        self.heartbeat.send(&Message::Heartbeat(beat));
    }

    /// Reads until a question for hashes comes: its blocks. `other` sees what came before.
    fn question(&mut self, mut other: impl FnMut(&mut Peer, FrameKind, &[u8])) -> Option<(u64, u64)> {
        loop {
            let (kind, payload) = self.data.read_frame().ok()?;
            match (kind, decode_message(&payload)) {
                (FrameKind::Message, Ok(Message::HashBlocks { first, count })) => {
                    return Some((first, u64::from(count)));
                }
                _ => other(&mut self.data, kind, &payload),
            }
        }
    }

    /// Reads until the primary gives it up.
    fn wait_given_up(mut self) {
        while self.data.read_frame().is_ok() {}
    }
}

/// Acknowledges an epoch that ended, and gathers the indexes of the disk's blocks that were sent:
/// the primary's part in a resync.
fn follow(blocks: &mut Vec<u64>) -> impl FnMut(&mut Peer, FrameKind, &[u8]) {
    |data, kind, payload| match (kind, decode_message(payload)) {
        (FrameKind::Pages | FrameKind::Background, _) => {
            let records = PageDecoder::new(payload, FIRST + BLOCKS).map(|record| record.expect("pages").index);
            blocks.extend(records.filter(|index| *index >= FIRST));
        }
        (FrameKind::Message, Ok(Message::EpochEnd { id, .. })) => data.send(&Message::Ack { id, staged_bytes: 0 }),
        _ => {}
    }
}

/// Reads until the image is whole, which is told by the epoch that makes it so.
fn until_whole(newcomer: &mut Newcomer, blocks: &mut Vec<u64>) {
    let mut see = follow(blocks);
    loop {
        let (kind, payload) = newcomer.data.read_frame().expect("the primary goes on");
        let message = decode_message(&payload);
        if matches!((kind, message), (FrameKind::Message, Ok(Message::EpochBegin { completes_resync: true, .. }))) {
            return;
        }
        see(&mut newcomer.data, kind, &payload);
    }
}

#[test]
fn a_primary_disconnects_at_malformed_block_hash_answers() {
    run("block_hashes::a_primary_disconnects_at_malformed_block_hash_answers", |host| {
        let mut primary = Node::start(host.primary_command(&[&flag(&image(host, "p.img"))]));
        primary.wait_guest();
        let mut instance = 100;
        let mut not_stood = |bytes: fn(u64, u64) -> Vec<u8>, part: &str| {
            instance += 1;
            let mut newcomer = Newcomer::join(instance);
            let (first, count) = newcomer.question(|_, _, _| {}).expect("a question");
            assert_eq!((first, count), (FIRST, HASH_BLOCKS_MAX));
            newcomer.data.send_bytes(&bytes(first, count));
            newcomer.wait_given_up();
            primary.wait_warning(part);
            primary.wait_status("alone", |status| status.state == State::Solo);
        };
        fn answer(first: u64, hashes: &[BlockHash]) -> Vec<u8> {
            bulk(FrameKind::Hashes, &encode_hashes(first, hashes))
        }
        let other = "other hashes of blocks than it was asked for";
        not_stood(|first, count| answer(first + 1, &hashes(first, count)), other);
        not_stood(|first, count| answer(first, &hashes(first, count - 1)), other);
        not_stood(|first, _| answer(first - 1, &hashes(first, 0)), other);
        let twice = |first, count| answer(first, &hashes(first, count)).repeat(3);
        not_stood(twice, "hashes of blocks");
        not_stood(|_, _| bulk(FrameKind::Hashes, &[1, 2, 3]), "a malformed run of hashes");
        not_stood(|_, _| bulk(FrameKind::Hashes, &[0; 39]), "a malformed run of hashes");
        not_stood(|_, _| bulk(FrameKind::Background, &[]), "a message was due");
        not_stood(|first, count| frame(&Message::HashBlocks { first, count: count as u32 }), "does not belong here");
        primary.assert_serves_alone();
    });
}

#[test]
fn a_newcomer_is_sent_only_the_blocks_that_differ() {
    run("block_hashes::a_newcomer_is_sent_only_the_blocks_that_differ", |host| {
        let mut primary = Node::start(host.primary_command(&[&flag(&image(host, "p.img"))]));
        primary.wait_guest();
        // It has all but two blocks, one of them the last.
        let (mut newcomer, mut sent) = (Newcomer::join(7), Vec::new());
        // While it does not answer, memory is pushed and the disk is not.
        let status = primary.wait_status("done with memory", |status| {
            status.resync.as_ref().is_some_and(|resync| resync.pages_left == BLOCKS)
        });
        assert_eq!(parts(&status), [("memory", MEMORY_BYTES, 0), ("disk 0", 300 << 12, 300 << 12)]);
        for expected in [(FIRST, 256), (FIRST + 256, BLOCKS - 256)] {
            let (first, count) = newcomer.question(follow(&mut sent)).expect("a question");
            assert_eq!((first, count), expected);
            let mut hashes = hashes(first, count);
            if first == FIRST {
                hashes[9][0] ^= 1;
            } else {
                hashes.last_mut().expect("one")[31] ^= 0x80;
            }
            newcomer.data.send_bytes(&bulk(FrameKind::Hashes, &encode_hashes(first, &hashes)));
        }
        until_whole(&mut newcomer, &mut sent);
        assert_eq!(sent, [FIRST + 9, FIRST + BLOCKS - 1]);
        primary.wait_line("the newcomer has 298 of 300 blocks");
        drop(newcomer);
        primary.wait_status("alone", |status| status.state == State::Solo);

        // Its image is not worth a comparison: it gets all of it, and is asked no more.
        let (mut newcomer, mut sent) = (Newcomer::join(8), Vec::new());
        let (first, _) = newcomer.question(follow(&mut sent)).expect("a question");
        newcomer.data.send_bytes(&bulk(FrameKind::Hashes, &encode_hashes(first, &[])));
        until_whole(&mut newcomer, &mut sent);
        assert_eq!(sent, (FIRST..FIRST + BLOCKS).collect::<Vec<_>>());
        drop(newcomer);
        primary.wait_status("alone", |status| status.state == State::Solo);
        primary.assert_serves_alone();
    });
}
