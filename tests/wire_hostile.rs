//! What comes off the wire is an unknown peer's until it is checked: every round trip is exact,
//! every cut is an error, and no bytes whatever make the readers panic or take memory beyond the
//! caps.

use mcd::protocol::cpu::HostCpu;
use mcd::protocol::machine_shape::{DISKS_MAX, DiskShape, MachineShape, SECTOR_BYTES};
use mcd::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, PROTOCOL_VERSION, RefuseReason, Welcome};
use mcd::protocol::pages::PAGE_BYTES;
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::types::{EpochId, Generation, GuestName, InstanceId};
use mcd::wire::codec::{decode_message, encode_message};
use mcd::wire::frame::HEADER_BYTES;
use mcd::wire::pages::{RECORD_BYTES_MAX, has_room, is_zero};
use mcd::wire::{
    FrameBatch, FrameKind, FrameReader, FrameWriter, PageDecoder, PageEncoder, PageError, PageKind, WireError,
};
use proptest::{collection::vec, prelude::*, sample::Index};
use std::io::{self, Read, Write};

fn instance() -> impl Strategy<Value = InstanceId> {
    any::<u128>().prop_map(InstanceId)
}

fn epoch() -> impl Strategy<Value = EpochId> {
    (any::<u64>(), any::<u64>()).prop_map(|(g, epoch)| EpochId { generation: Generation(g), epoch })
}

fn record() -> impl Strategy<Value = Record> {
    (any::<u64>(), 0..3usize, instance(), instance()).prop_map(|(g, state, owner, peer)| Record {
        generation: Generation(g),
        state: [RecordState::Paired, RecordState::Solo, RecordState::Stopped][state],
        owner,
        peer: (state == 0).then_some(peer),
    })
}

fn hello() -> impl Strategy<Value = Message> {
    let numbers = (any::<u16>(), any::<u64>(), any::<u64>(), any::<u64>());
    (any::<bool>(), "[a-zA-Z0-9._-]{1,64}", instance(), numbers).prop_map(|(heart, name, instance, numbers)| {
        Message::Hello(Hello {
            channel: if heart { Channel::Heartbeat } else { Channel::Data },
            version: numbers.0,
            guest: GuestName::new(&name).unwrap(),
            instance,
            features: numbers.1,
            staging_bytes_max: numbers.2,
            cpu: HostCpu { digest: numbers.3, tsc_khz: numbers.1 as u32, tsc_scales: heart },
        })
    })
}

fn disk() -> impl Strategy<Value = DiskShape> {
    (1..=u64::MAX / SECTOR_BYTES, 0..3, any::<[u8; 20]>()).prop_map(|(sectors, used_as, serial)| DiskShape {
        bytes: sectors * SECTOR_BYTES,
        read_only: used_as == 1,
        shared: used_as == 2,
        serial,
    })
}

fn shape() -> impl Strategy<Value = MachineShape> {
    let parts = (1..=1u64 << 40, 1..=u8::MAX, any::<[u8; 6]>(), vec(disk(), 0..=DISKS_MAX), any::<bool>());
    parts.prop_map(|(pages, cpus, mac, disks, rng)| MachineShape { memory_bytes: pages * 4096, cpus, mac, disks, rng })
}

fn welcome() -> impl Strategy<Value = Message> {
    let shape = shape();
    (instance(), any::<u64>(), shape, any::<[u64; 4]>()).prop_map(|(instance, generation, shape, numbers)| {
        Message::Welcome(Welcome {
            instance,
            generation: Generation(generation),
            shape,
            tsc_khz: generation as u32,
            features: numbers[0],
            interval_us: numbers[1],
            heartbeat_interval_us: numbers[2],
            heartbeat_timeout_us: numbers[3],
        })
    })
}

/// At most 128 characters, so at most 512 bytes.
fn text() -> impl Strategy<Value = String> {
    vec(any::<char>(), 0..=128).prop_map(String::from_iter)
}

fn activity() -> impl Strategy<Value = Activity> {
    let building = any::<u64>().prop_map(|done_bytes| Activity::Building { done_bytes });
    proptest::prop_oneof![Just(Activity::Ready), building, Just(Activity::Capturing)]
}

fn message() -> impl Strategy<Value = Message> {
    use RefuseReason::*;
    let reason = (0..7usize).prop_map(|n| [Version, Guest, Cpu, Busy, NotPrimary, Staging, Malformed][n]);
    prop_oneof![
        hello(),
        welcome(),
        (reason, text()).prop_map(|(reason, detail)| Message::Refuse { reason, detail }),
        (epoch(), any::<bool>()).prop_map(|(id, completes_resync)| Message::EpochBegin { id, completes_resync }),
        (epoch(), any::<u64>(), any::<u64>(), any::<u32>())
            .prop_map(|(id, pages, state_bytes, digest)| { Message::EpochEnd { id, pages, state_bytes, digest } }),
        (epoch(), any::<u64>()).prop_map(|(id, staged_bytes)| Message::Ack { id, staged_bytes }),
        record().prop_map(|record| Message::Paired { record }),
        (instance(), any::<u64>(), any::<u64>(), proptest::option::of(epoch()), activity()).prop_map(
            |(instance, generation, sequence, committed, activity)| {
                let generation = Generation(generation);
                Message::Heartbeat(Heartbeat { instance, generation, sequence, committed, activity })
            }
        ),
        text().prop_map(|reason| Message::HandOver { reason }),
        text().prop_map(|reason| Message::Bye { reason }),
        epoch().prop_map(|through| Message::Written { through }),
    ]
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_message(message, &mut bytes);
    bytes
}

/// A page that is zero, random, repetitive, or sparse.
fn page() -> impl Strategy<Value = [u8; PAGE_BYTES]> {
    let fill = |seed: u64, modulus: u64| {
        let mut state = seed | 1;
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % modulus) as u8
        })
    };
    prop_oneof![
        Just([0; PAGE_BYTES]),
        any::<u64>().prop_map(move |seed| fill(seed, 256)),
        any::<u64>().prop_map(move |seed| fill(seed, 2)),
        any::<u64>().prop_map(move |seed| fill(seed, 1)),
        (0..PAGE_BYTES, 1..=u8::MAX).prop_map(|(at, byte)| {
            let mut page = [0; PAGE_BYTES];
            page[at] = byte;
            page
        }),
    ]
}

/// A stream that gives and takes a few bytes at a time, and is interrupted between.
struct Trickle<T> {
    inner: T,
    step: usize,
    calls: usize,
}

impl<T> Trickle<T> {
    fn interrupted(&mut self) -> io::Result<()> {
        self.calls += 1;
        if self.calls.is_multiple_of(3) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }
}

impl<T: Read> Read for Trickle<T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.interrupted()?;
        let most = buf.len().min(self.step);
        self.inner.read(&mut buf[..most])
    }
}

impl<T: Write> Write for Trickle<T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.interrupted()?;
        self.inner.write(&buf[..buf.len().min(self.step)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads frames until something ends it.
fn drain(bytes: &[u8]) -> WireError {
    let mut reader = FrameReader::new(bytes);
    loop {
        match reader.read() {
            Ok(frame) => {
                assert!(frame.payload.len() <= frame.kind.bytes_max());
                let _ = frame.message();
                let _ = PageDecoder::new(frame.payload, 1000).collect::<Result<Vec<_>, _>>();
            }
            Err(error) => return error,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn messages_survive(message in message()) {
        let bytes = encoded(&message);
        prop_assert!(bytes.len() <= FrameKind::Message.bytes_max());
        prop_assert_eq!(decode_message(&bytes).unwrap(), message);
    }

    #[test]
    fn a_cut_or_padded_message_is_an_error(message in message(), extra in any::<u8>()) {
        let mut bytes = encoded(&message);
        for length in 0..bytes.len() {
            prop_assert!(decode_message(&bytes[..length]).is_err(), "cut to {}", length);
        }
        bytes.push(extra);
        prop_assert!(decode_message(&bytes).is_err());
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error(tag in 0..14u8, mut bytes in vec(any::<u8>(), 0..600)) {
        bytes.insert(0, tag);
        // What is accepted has one byte form only.
        if let Ok(message) = decode_message(&bytes) {
            prop_assert_eq!(encoded(&message), bytes);
        }
    }

    #[test]
    fn a_spoilt_message_never_panics(message in message(), at in any::<Index>(), byte in any::<u8>()) {
        let mut bytes = encoded(&message);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(other) = decode_message(&bytes) {
            prop_assert_eq!(encoded(&other), bytes);
        }
    }

    #[test]
    fn frames_survive_any_chopping(
        payloads in vec((0..FrameKind::ALL.len(), prop_oneof![4 => 0..1000usize, 1 => 60_000..200_000usize]), 0..12),
        step in prop_oneof![1..40usize, 1000..100_000usize],
    ) {
        let payloads: Vec<_> = payloads.iter().enumerate().map(|(n, (kind, length))| {
            let kind = FrameKind::ALL[*kind];
            (kind, vec![n as u8; (*length).min(kind.bytes_max())])
        }).collect();
        let mut writer = FrameWriter::new(Trickle { inner: Vec::new(), step, calls: 0 });
        for (kind, payload) in &payloads {
            writer.write(*kind, payload).unwrap();
        }
        let bytes = &writer.sink().inner;
        prop_assert_eq!(writer.bytes_written(), bytes.len() as u64);
        let mut batch = FrameBatch::new();
        for (kind, payload) in &payloads {
            batch.build(*kind, |out| out.extend_from_slice(payload)).unwrap();
        }
        prop_assert_eq!(batch.as_bytes(), bytes.as_slice());
        let mut reader = FrameReader::new(Trickle { inner: bytes.as_slice(), step, calls: 0 });
        for (kind, payload) in &payloads {
            let frame = reader.read().unwrap();
            prop_assert_eq!(frame.kind, *kind);
            prop_assert_eq!(frame.payload, payload.as_slice());
        }
        prop_assert!(matches!(reader.read(), Err(WireError::Closed)));
    }

    #[test]
    fn every_cut_of_a_stream_is_told(first in message(), second in message()) {
        let mut batch = FrameBatch::new();
        batch.push_message(&first).unwrap();
        let boundary = batch.as_bytes().len();
        batch.push_message(&second).unwrap();
        let bytes = batch.as_bytes();
        for length in 0..=bytes.len() {
            let clean = [0, boundary, bytes.len()].contains(&length);
            match drain(&bytes[..length]) {
                WireError::Closed => prop_assert!(clean, "cut to {}", length),
                WireError::ClosedMidFrame { .. } => prop_assert!(!clean, "cut to {}", length),
                other => prop_assert!(false, "{}", other),
            }
        }
    }

    #[test]
    fn any_byte_changed_in_a_frame_is_noticed(message in message(), at in any::<Index>(), flip in 1..=u8::MAX) {
        let mut batch = FrameBatch::new();
        batch.push_message(&message).unwrap();
        let mut bytes = batch.as_bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let mut reader = FrameReader::new(bytes.as_slice());
        match reader.read() {
            // The one byte no check sum covers: another kind. What is inside is then no message.
            Ok(frame) => prop_assert!((6..8).contains(&at) && frame.message().is_err()),
            Err(WireError::NotMcd { .. }) => prop_assert!(at < 4),
            Err(WireError::OtherVersion { .. }) => prop_assert!((4..6).contains(&at)),
            Err(WireError::UnknownKind(_)) => prop_assert!((6..8).contains(&at)),
            Err(WireError::Malformed { .. }) => prop_assert!((16..20).contains(&at)),
            // As the kind that it now says, it would be too long.
            Err(WireError::TooLarge { .. }) => prop_assert!((6..12).contains(&at)),
            Err(_) => prop_assert!(at >= 8),
        }
    }

    #[test]
    fn any_stream_ends_in_an_error(bytes in vec(any::<u8>(), 0..200), head in 0..HEADER_BYTES) {
        drain(&bytes);
        // Deeper in: a header that is right up to some byte.
        let mut batch = FrameBatch::new();
        batch.push(FrameKind::Pages, &bytes).unwrap();
        let mut spoilt = batch.as_bytes()[..head].to_vec();
        spoilt.extend_from_slice(&bytes);
        drain(&spoilt);
    }

    #[test]
    fn pages_survive(pages in vec((0..1000u64, page()), 0..20), lz4 in any::<bool>()) {
        let mut encoder = PageEncoder::new(lz4);
        let mut chunk = Vec::new();
        for (index, page) in &pages {
            let before = chunk.len();
            let kind = encoder.encode(*index, page, &mut chunk);
            prop_assert!(chunk.len() - before <= RECORD_BYTES_MAX);
            prop_assert_eq!(kind == PageKind::Zero, page.iter().all(|byte| *byte == 0));
            prop_assert!(lz4 || kind != PageKind::Lz4);
        }
        let mut decoder = PageDecoder::new(&chunk, 1000);
        for (index, page) in &pages {
            let record = decoder.next().unwrap().unwrap();
            let mut out = [0xaa; PAGE_BYTES];
            record.expand(&mut out).unwrap();
            prop_assert_eq!(record.index, *index);
            prop_assert!(out == *page);
            prop_assert_eq!(record.raw(), (record.kind == PageKind::Raw).then_some(page));
        }
        prop_assert!(decoder.next().is_none());
        // A cut chunk gives some of the pages, then an error, then nothing.
        for cut in 1..chunk.len().min(200) {
            let records: Vec<_> = PageDecoder::new(&chunk[..chunk.len() - cut], 1000).collect();
            let bad = records.iter().filter(|record| record.is_err()).count();
            let whole = records.iter().filter(|record| record.is_ok()).count();
            prop_assert!(whole < pages.len() && bad <= 1);
            prop_assert!(bad == 1 || encoded_length(&records) == chunk.len() - cut);
        }
    }

    #[test]
    fn any_chunk_expands_or_fails(chunk in vec(any::<u8>(), 0..6000), kind in 0..4u8, lz4 in vec(any::<u8>(), 1..300)) {
        let try_all = |chunk: &[u8]| {
            for record in PageDecoder::new(chunk, 1 << 32).flatten() {
                assert!(record.index < 1 << 32);
                let _ = record.expand(&mut [0; PAGE_BYTES]);
            }
        };
        try_all(&chunk);
        let mut closer = vec![1, 0, 0, 0, 0, 0, 0, 0, kind];
        closer.extend_from_slice(&(lz4.len() as u16).to_le_bytes());
        closer.extend_from_slice(&lz4);
        try_all(&closer);
    }
}

fn encoded_length(records: &[Result<mcd::wire::PageRecord<'_>, PageError>]) -> usize {
    records.iter().flatten().map(|record| 11 + encoded_bytes(record)).sum()
}

fn encoded_bytes(record: &mcd::wire::PageRecord<'_>) -> usize {
    match record.kind {
        PageKind::Zero => 0,
        PageKind::Raw => PAGE_BYTES,
        // Cuts inside a compressed record are errors; whole ones are told by encoding them again.
        PageKind::Lz4 => {
            let mut page = [0; PAGE_BYTES];
            record.expand(&mut page).unwrap();
            let mut again = Vec::new();
            PageEncoder::new(true).encode(record.index, &page, &mut again);
            again.len() - 11
        }
    }
}

fn header(version: u16, kind: u16, length: u32) -> Vec<u8> {
    let mut bytes = b"MCD1".to_vec();
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes
}

#[test]
fn each_failure_has_its_own_name_and_one_line() {
    let not_mcd = drain(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(matches!(not_mcd, WireError::NotMcd { .. }) && not_mcd.to_string().contains("does not speak mcd"));
    let other = drain(&header(9, 1, 0));
    assert!(matches!(other, WireError::OtherVersion { theirs: 9, ours: 3 }));
    assert!(other.to_string().contains('9') && other.to_string().contains('3'));
    assert!(matches!(drain(&header(PROTOCOL_VERSION, 99, 0)), WireError::UnknownKind(99)));
    for kind in FrameKind::ALL {
        let announced = kind.bytes_max() as u32;
        let error = drain(&header(PROTOCOL_VERSION, kind as u16, announced + 1));
        assert!(matches!(error, WireError::TooLarge { .. }), "{error}");
        let whole = drain(&header(PROTOCOL_VERSION, kind as u16, announced));
        assert!(matches!(whole, WireError::ClosedMidFrame { .. }) || kind == FrameKind::Probe, "{whole}");
    }
    assert!(matches!(drain(&header(PROTOCOL_VERSION, 1, u32::MAX)), WireError::TooLarge { .. }));
    let mut damaged = header(PROTOCOL_VERSION, 4, 3);
    damaged.extend_from_slice(b"abc");
    assert!(matches!(drain(&damaged), WireError::Damaged { .. }));
    for error in [not_mcd, other, drain(&damaged)] {
        assert!(!error.to_string().contains('\n') && !error.is_disconnect());
    }
}

#[test]
fn too_long_a_payload_is_not_sent() {
    let mut batch = FrameBatch::new();
    batch.push_message(&Message::Bye { reason: "x".into() }).unwrap();
    let before = batch.as_bytes().to_vec();
    let long = vec![0; FrameKind::Pages.bytes_max() + 1];
    assert!(matches!(batch.push(FrameKind::Pages, &long), Err(WireError::TooLarge { .. })));
    assert!(batch.build(FrameKind::Pages, |out| out.extend_from_slice(&long)).is_err());
    assert!(batch.build(FrameKind::Pages, Vec::clear).is_err());
    let mut writer = FrameWriter::new(Vec::new());
    assert!(matches!(writer.write(FrameKind::Pages, &long), Err(WireError::TooLarge { .. })));
    writer.write(FrameKind::Pages, &long[1..]).unwrap();
    assert_eq!(before.len(), 24);
}

#[test]
fn long_texts_are_cut_between_characters() {
    let bytes = encoded(&Message::Bye { reason: "€".repeat(400) });
    assert_eq!(decode_message(&bytes).unwrap(), Message::Bye { reason: "€".repeat(170) });
    let mut long = vec![9, 1, 2];
    long.extend_from_slice(&[b'x'; 513]);
    assert!(decode_message(&long).is_err());
}

#[test]
fn a_writer_that_failed_writes_nothing_more() {
    struct Half(usize);
    impl Write for Half {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0 += 1;
            if self.0 == 1 { Ok(buf.len() / 2) } else { Err(io::ErrorKind::ConnectionReset.into()) }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut writer = FrameWriter::new(Half(0));
    assert!(writer.write(FrameKind::State, b"state").unwrap_err().is_disconnect());
    assert!(writer.write(FrameKind::State, b"state").is_err());
    assert_eq!(writer.sink().0, 2);
}

#[test]
fn bad_records_are_told_apart() {
    let record = |index: u64, kind: u8, bytes: &[u8]| {
        let mut chunk = index.to_le_bytes().to_vec();
        chunk.push(kind);
        chunk.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        chunk.extend_from_slice(bytes);
        chunk
    };
    let error = |chunk: &[u8]| PageDecoder::new(chunk, 10).next().unwrap().unwrap_err();
    assert_eq!(error(&record(10, 0, &[])), PageError::OutOfRange { index: 10, pages: 10 });
    assert_eq!(error(&record(9, 3, &[])), PageError::UnknownKind { index: 9, kind: 3 });
    assert_eq!(error(&record(9, 0, &[1])), PageError::BadLength { index: 9, kind: 0, bytes: 1 });
    assert_eq!(error(&record(9, 1, &[1])), PageError::BadLength { index: 9, kind: 1, bytes: 1 });
    assert_eq!(error(&record(9, 2, &[])), PageError::BadLength { index: 9, kind: 2, bytes: 0 });
    assert_eq!(error(&record(9, 2, &[0; 3585])), PageError::BadLength { index: 9, kind: 2, bytes: 3585 });
    // Compressed bytes that make less, or more, than a page.
    let short = record(9, 2, &[0x50, 1, 2, 3, 4, 5]);
    let mut bomb = vec![0x1f, 0x41, 0x01, 0x00];
    bomb.extend_from_slice(&[255; 2000]);
    bomb.extend_from_slice(&[0, 0x50, 1, 2, 3, 4, 5]);
    for chunk in [short, record(9, 2, &bomb)] {
        let found = PageDecoder::new(&chunk, 10).next().unwrap().unwrap();
        assert_eq!(found.expand(&mut [0; PAGE_BYTES]), Err(PageError::BadLz4 { index: 9 }));
    }
}

#[test]
fn a_chunk_with_room_never_outgrows_its_frame() {
    let mut encoder = PageEncoder::new(true);
    let noise: [u8; PAGE_BYTES] = std::array::from_fn(|n| ((n * n) >> 3) as u8 ^ (n as u8).wrapping_mul(31));
    assert!(!is_zero(&noise));
    let mut batch = FrameBatch::new();
    let pages = batch
        .build(FrameKind::Pages, |chunk| {
            let start = chunk.len();
            let mut pages = 0;
            while has_room(chunk.len() - start) {
                encoder.encode(pages, &noise, chunk);
                pages += 1;
            }
            pages
        })
        .unwrap();
    assert!(pages >= 255);
    let mut reader = FrameReader::new(batch.as_bytes());
    assert_eq!(PageDecoder::new(reader.read().unwrap().payload, pages).count() as u64, pages);
}
