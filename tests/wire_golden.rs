//! The exact bytes of version 3, for every kind of frame, message and page record. A change here is
//! a change of the protocol: it needs a new version, never a new expectation.

use mcd::checkpoint::block_hashes::hash_of;
use mcd::protocol::cpu::HostCpu;
use mcd::protocol::machine_shape::{DISKS_MAX, DiskShape, MachineShape};
use mcd::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, PROTOCOL_VERSION, RefuseReason, Welcome};
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::types::{EpochId, Generation, GuestName, InstanceId};
use mcd::wire::block_hashes::{decode_hashes, encode_hashes};
use mcd::wire::codec::{decode_message, encode_message};
use mcd::wire::{FrameBatch, FrameKind, FrameReader, PageDecoder, PageEncoder, PageKind};

const A: InstanceId = InstanceId(0x000102030405060708090a0b0c0d0e0f);
const B: InstanceId = InstanceId(0xf0f1f2f3f4f5f6f7f8f9fafbfcfdfeff);
const A_HEX: &str = "0f0e0d0c0b0a09080706050403020100";
const B_HEX: &str = "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn epoch(generation: u64, epoch: u64) -> EpochId {
    EpochId { generation: Generation(generation), epoch }
}

fn message_is(message: Message, expected: &[&str]) {
    let mut bytes = Vec::new();
    encode_message(&message, &mut bytes);
    assert_eq!(hex(&bytes), expected.concat(), "{}", message.name());
    assert_eq!(decode_message(&bytes).unwrap(), message);
}

#[test]
fn this_is_version_3() {
    assert_eq!(PROTOCOL_VERSION, 3);
}

#[test]
fn hello_and_welcome() {
    let hello = |channel| {
        Message::Hello(Hello {
            channel,
            version: 3,
            guest: GuestName::new("web-1").unwrap(),
            instance: A,
            features: 1,
            staging_bytes_max: 0x1000_0000,
            cpu: HostCpu { digest: 0x1122_3344_5566_7788, tsc_khz: 2_100_000, tsc_scales: true },
        })
    };
    let rest = [
        "0300",
        "0500",
        "7765622d31",
        A_HEX,
        "0100000000000000",
        "0000001000000000",
        "8877665544332211",
        "200b2000",
        "01",
    ];
    message_is(hello(Channel::Data), &[&["01", "00"], rest.as_slice()].concat());
    message_is(hello(Channel::Heartbeat), &[&["01", "01"], rest.as_slice()].concat());
    message_is(
        Message::Welcome(Welcome {
            instance: B,
            generation: Generation(7),
            shape: MachineShape {
                memory_bytes: 0x2000_0000,
                cpus: 2,
                mac: [2, 0, 0, 0, 0, 9],
                disks: vec![
                    DiskShape {
                        bytes: 0x8000_0000,
                        read_only: false,
                        shared: false,
                        serial: *b"data-1\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
                    },
                    DiskShape { bytes: 512, read_only: true, shared: false, serial: [0xff; 20] },
                    DiskShape { bytes: 1024, read_only: false, shared: true, serial: [0; 20] },
                ],
                rng: true,
            },
            tsc_khz: 2_100_000,
            features: 1,
            interval_us: 10_000,
            heartbeat_interval_us: 5_000,
            heartbeat_timeout_us: 30_000,
        }),
        &[
            "02",
            B_HEX,
            "0700000000000000",
            "0000002000000000",
            "02",
            "020000000009",
            "01",
            "03",
            "0000008000000000",
            "00",
            "646174612d310000000000000000000000000000",
            "0002000000000000",
            "01",
            "ffffffffffffffffffffffffffffffffffffffff",
            "0004000000000000",
            "02",
            "0000000000000000000000000000000000000000",
            "200b2000",
            "0100000000000000",
            "1027000000000000",
            "8813000000000000",
            "3075000000000000",
        ],
    );
}

#[test]
fn refusals() {
    let reasons = [
        (RefuseReason::Version, "01"),
        (RefuseReason::Guest, "02"),
        (RefuseReason::Cpu, "03"),
        (RefuseReason::Busy, "04"),
        (RefuseReason::NotPrimary, "05"),
        (RefuseReason::Staging, "06"),
        (RefuseReason::Malformed, "07"),
    ];
    for (reason, number) in reasons {
        message_is(Message::Refuse { reason, detail: "né".into() }, &["03", number, "0300", "6ec3a9"]);
    }
}

#[test]
fn epochs_and_acks() {
    let id = epoch(7, 300);
    let id_hex = ["0700000000000000", "2c01000000000000"].concat();
    message_is(Message::EpochBegin { id, completes_resync: true }, &["04", &id_hex, "01"]);
    message_is(Message::EpochBegin { id, completes_resync: false }, &["04", &id_hex, "00"]);
    message_is(
        Message::EpochEnd { id, pages: 1000, state_bytes: 12_345, digest: 0xdead_beef },
        &["05", &id_hex, "e803000000000000", "3930000000000000", "efbeadde"],
    );
    message_is(Message::Written { through: id }, &["0a", &id_hex]);
    message_is(Message::Ack { id, staged_bytes: 4096 }, &["06", &id_hex, "0010000000000000"]);
}

#[test]
fn records_heartbeats_and_the_end() {
    let record = |state, peer| Message::Paired { record: Record { generation: Generation(8), state, owner: A, peer } };
    message_is(record(RecordState::Paired, Some(B)), &["07", "0800000000000000", "00", A_HEX, "01", B_HEX]);
    message_is(record(RecordState::Solo, None), &["07", "0800000000000000", "01", A_HEX, "00"]);
    message_is(record(RecordState::Stopped, None), &["07", "0800000000000000", "02", A_HEX, "00"]);
    let heartbeat = |committed, activity| {
        let (generation, sequence) = (Generation(8), 513);
        Message::Heartbeat(Heartbeat { instance: B, generation, sequence, committed, activity })
    };
    let head = ["08", B_HEX, "0800000000000000", "0102000000000000"].concat();
    let building = Activity::Building { done_bytes: 0x0102 };
    message_is(heartbeat(None, building), &[&head, "00", "01", "0201000000000000"]);
    message_is(heartbeat(None, Activity::Capturing), &[&head, "00", "02"]);
    let committed = "010800000000000000" /* generation */;
    message_is(heartbeat(Some(epoch(8, 2)), Activity::Ready), &[&head, committed, "0200000000000000", "00"]);
    message_is(Message::HandOver { reason: "disk".into() }, &["0d", "0400", "6469736b"]);
    message_is(Message::Bye { reason: "done".into() }, &["09", "0400", "646f6e65"]);
    message_is(Message::Bye { reason: String::new() }, &["09", "0000"]);
}

#[test]
fn disks_of_a_secondary() {
    message_is(Message::HashBlocks { first: 0x0102_0304, count: 256 }, &["0b", "0403020100000000", "00010000"]);
    message_is(Message::ResyncLeft { left: vec![] }, &["0c", "00"]);
    message_is(Message::ResyncLeft { left: vec![513, 0] }, &["0c", "02", "0102000000000000", "0000000000000000"]);
    let mut payload = encode_hashes(0x0102, &[[0xab; 32], [1; 32]]);
    assert_eq!(hex(&payload), ["0201000000000000".to_owned(), "ab".repeat(32), "01".repeat(32)].concat());
    assert_eq!(decode_hashes(&payload).unwrap(), (0x0102, vec![[0xab; 32], [1; 32]]));
    assert_eq!(decode_hashes(&payload[..8]).unwrap(), (0x0102, vec![]));
    payload.pop();
    assert!(decode_hashes(&payload).is_err() && decode_hashes(&payload[..7]).is_err() && decode_hashes(&[]).is_err());
    // As long as they get.
    let (mut batch, most) = (FrameBatch::new(), encode_hashes(7, &[[0; 32]; 256]));
    batch.push(FrameKind::Hashes, &most).unwrap();
    assert!(batch.push(FrameKind::Hashes, &[most, vec![0]].concat()).is_err());
    let mut too_many = vec![0x0c, 8];
    too_many.extend_from_slice(&[0; 64]);
    assert!(decode_message(&too_many).is_err(), "no machine has so many disks");
}

/// What is compared on two hosts, perhaps by two builds, must have one and the same hash.
#[test]
fn the_hash_of_a_block() {
    assert_eq!(hex(&hash_of(&[0; 4096])), "b6fb73fc46938c981e2b0b4b1ef282adcfc89854d01bfe3972fdc4785b41b2c7");
}

#[test]
fn every_kind_of_frame() {
    // The check sum of "123456789" is the published check value of CRC32C.
    let expected = [
        (FrameKind::Message, "0100"),
        (FrameKind::Pages, "0200"),
        (FrameKind::Background, "0300"),
        (FrameKind::State, "0400"),
        (FrameKind::Hashes, "0600"),
    ];
    for (kind, number) in expected {
        let mut batch = FrameBatch::new();
        batch.push(kind, b"123456789").unwrap();
        let bytes = ["4d434431", "0300", number, "09000000", "839206e3", "00000000", "313233343536373839"].concat();
        assert_eq!(hex(batch.as_bytes()), bytes);
        let mut reader = FrameReader::new(batch.as_bytes());
        let frame = reader.read().unwrap();
        assert_eq!((frame.kind, frame.payload), (kind, b"123456789".as_slice()));
    }
    let mut probe = FrameBatch::new();
    probe.push(FrameKind::Probe, &[]).unwrap();
    assert_eq!(hex(probe.as_bytes()), "4d434431030005000000000000000000".to_owned() + "00000000");
    assert!(probe.push(FrameKind::Probe, b"1").is_err());
    let mut kinds = expected.map(|(kind, _)| kind).to_vec();
    kinds.insert(4, FrameKind::Probe);
    assert_eq!(kinds, FrameKind::ALL);
    let mut batch = FrameBatch::new();
    batch.push(FrameKind::State, &[]).unwrap();
    assert_eq!(hex(batch.as_bytes()), "4d434431030004000000000000000000".to_owned() + "00000000");
}

#[test]
fn every_kind_of_page() {
    let mut chunk = Vec::new();
    let mut raw = [0; 4096];
    raw[4095] = 0x5a;
    let mut encoder = PageEncoder::new(false);
    assert_eq!(encoder.encode(0x0102, &[0; 4096], &mut chunk), PageKind::Zero);
    assert_eq!(encoder.encode(3, &raw, &mut chunk), PageKind::Raw);
    assert_eq!(hex(&chunk[..22]), "0201000000000000000000".to_owned() + "0300000000000000" + "01" + "0010");
    assert_eq!(chunk[22..], raw);
    // What the compressor writes may change from release to release; what the decoder must
    // understand may not. Here: one literal 0x41, a match of 4095 - 5 bytes at distance 1, and five
    // literals.
    let mut lz4 = vec![0x1f, 0x41, 0x01, 0x00];
    let mut rest = 4096 - 1 - 5 - 4 - 15;
    while rest >= 255 {
        lz4.push(255);
        rest -= 255;
    }
    lz4.push(rest as u8);
    lz4.extend_from_slice(&[0x50, 0x41, 0x41, 0x41, 0x41, 0x42]);
    let mut chunk = vec![9, 0, 0, 0, 0, 0, 0, 0, 2, lz4.len() as u8, 0];
    chunk.extend_from_slice(&lz4);
    let record = PageDecoder::new(&chunk, 10).next().unwrap().unwrap();
    assert_eq!((record.index, record.kind), (9, PageKind::Lz4));
    let mut page = [0; 4096];
    record.expand(&mut page).unwrap();
    let mut expected = [0x41; 4096];
    expected[4095] = 0x42;
    assert_eq!(page, expected);
}

#[test]
fn disks_nobody_has_are_refused() {
    let good = MachineShape { rng: true, ..MachineShape::bare(4096, 1, [0; 6]) };
    let refused = |bytes: u64, count: usize| {
        let disk = DiskShape { bytes, read_only: false, shared: false, serial: [0; 20] };
        let welcome = Welcome {
            instance: InstanceId(1),
            generation: Generation(1),
            shape: MachineShape { disks: vec![disk; count.min(DISKS_MAX)], ..good.clone() },
            tsc_khz: 1,
            features: 0,
            interval_us: 1,
            heartbeat_interval_us: 1,
            heartbeat_timeout_us: 1,
        };
        let mut bytes = Vec::new();
        encode_message(&Message::Welcome(welcome), &mut bytes);
        // Behind tag, instance, generation, memory, vCPUs, address and the random source.
        let at = 1 + 16 + 8 + 8 + 1 + 6 + 1;
        assert_eq!(usize::from(bytes[at]), count.min(DISKS_MAX));
        bytes[at] = count as u8;
        decode_message(&bytes).err().map(|error| error.to_string())
    };
    assert_eq!(refused(512, DISKS_MAX), None);
    for bytes in [0, 1, 511, 513, u64::MAX] {
        assert!(refused(bytes, 1).is_some_and(|why| why.contains("no disk has this size")), "{bytes}");
    }
    assert!(refused(512, DISKS_MAX + 1).is_some_and(|why| why.contains("so many disks")));
}
