//! The byte form of a [`Message`]: a tag, then the fields in the order of their declaration.
//!
//! Numbers are little-endian. A flag or an option is one byte, 0 or 1, and an option's value
//! follows a 1. A text is its length (u16) and its UTF-8 bytes, at most [`TEXT_BYTES_MAX`]. Bytes
//! after the last field are an error, and so is a value its type does not have.

use super::error::WireError;
use crate::protocol::cpu::HostCpu;
use crate::protocol::machine_shape::{DISKS_MAX, DiskShape, MachineShape};
use crate::protocol::messages::{Activity, Channel, Heartbeat, Hello, Message, RefuseReason, Welcome};
use crate::protocol::pages::PAGE_BYTES;
use crate::protocol::record::{Record, RecordState};
use crate::protocol::types::{EpochId, Generation, GuestName, InstanceId};

/// Most bytes in a text that a message carries; longer ones are cut when they are encoded.
pub const TEXT_BYTES_MAX: usize = 512;

const TAG_HELLO: u8 = 1;
const TAG_WELCOME: u8 = 2;
const TAG_REFUSE: u8 = 3;
const TAG_EPOCH_BEGIN: u8 = 4;
const TAG_EPOCH_END: u8 = 5;
const TAG_ACK: u8 = 6;
const TAG_PAIRED: u8 = 7;
const TAG_HEARTBEAT: u8 = 8;
const TAG_BYE: u8 = 9;
const TAG_WRITTEN: u8 = 10;
const TAG_HASH_BLOCKS: u8 = 11;
const TAG_RESYNC_LEFT: u8 = 12;
const TAG_HAND_OVER: u8 = 13;

const ACTIVITY_READY: u8 = 0;
const ACTIVITY_BUILDING: u8 = 1;
const ACTIVITY_CAPTURING: u8 = 2;

/// Most parts of an image: memory and the disks.
const PARTS_MAX: usize = 1 + DISKS_MAX;

/// The numbers of [`Channel`] on the wire.
const CHANNELS: [(u8, Channel); 2] = [(0, Channel::Data), (1, Channel::Heartbeat)];

/// The numbers of what a disk is to its nodes on the wire: whether it is read-only, and whether
/// they share its storage.
const USES: [(u8, (bool, bool)); 3] = [(0, (false, false)), (1, (true, false)), (2, (false, true))];

/// The numbers of [`RecordState`] on the wire.
const STATES: [(u8, RecordState); 3] = [(0, RecordState::Paired), (1, RecordState::Solo), (2, RecordState::Stopped)];

/// The numbers of [`RefuseReason`] on the wire.
const REASONS: [(u8, RefuseReason); 7] = [
    (1, RefuseReason::Version),
    (2, RefuseReason::Guest),
    (3, RefuseReason::Cpu),
    (4, RefuseReason::Busy),
    (5, RefuseReason::NotPrimary),
    (6, RefuseReason::Staging),
    (7, RefuseReason::Malformed),
];

/// Appends the byte form of `message` to `out`. Never more than the cap of a message frame.
pub fn encode_message(message: &Message, out: &mut Vec<u8>) {
    let mut to = Encoder { out };
    match message {
        Message::Hello(hello) => to.hello(hello),
        Message::Welcome(welcome) => to.welcome(welcome),
        Message::Refuse { reason, detail } => {
            to.u8(TAG_REFUSE);
            to.named(&REASONS, *reason);
            to.text(detail);
        }
        Message::EpochBegin { id, completes_resync } => {
            to.u8(TAG_EPOCH_BEGIN);
            to.epoch(*id);
            to.flag(*completes_resync);
        }
        Message::EpochEnd { id, pages, state_bytes, digest } => {
            to.u8(TAG_EPOCH_END);
            to.epoch(*id);
            to.u64(*pages);
            to.u64(*state_bytes);
            to.u32(*digest);
        }
        Message::Ack { id, staged_bytes } => {
            to.u8(TAG_ACK);
            to.epoch(*id);
            to.u64(*staged_bytes);
        }
        Message::Paired { record } => {
            to.u8(TAG_PAIRED);
            to.record(record);
        }
        Message::Written { through } => {
            to.u8(TAG_WRITTEN);
            to.epoch(*through);
        }
        Message::Heartbeat(heartbeat) => to.heartbeat(heartbeat),
        Message::Bye { reason } => {
            to.u8(TAG_BYE);
            to.text(reason);
        }
        Message::HandOver { reason } => {
            to.u8(TAG_HAND_OVER);
            to.text(reason);
        }
        Message::HashBlocks { first, count } => {
            to.u8(TAG_HASH_BLOCKS);
            to.u64(*first);
            to.u32(*count);
        }
        Message::ResyncLeft { left } => {
            to.u8(TAG_RESYNC_LEFT);
            to.u8(left.len().min(PARTS_MAX) as u8);
            left.iter().take(PARTS_MAX).for_each(|left| to.u64(*left));
        }
    }
}

/// Reads one message, which must fill `bytes` to the last one.
///
/// # Errors
/// [`WireError::Malformed`], with what is wrong.
pub fn decode_message(bytes: &[u8]) -> Result<Message, WireError> {
    let mut from = Decoder { rest: bytes };
    let message = match from.u8()? {
        TAG_HELLO => Message::Hello(from.hello()?),
        TAG_WELCOME => Message::Welcome(from.welcome()?),
        TAG_REFUSE => {
            Message::Refuse { reason: from.named(&REASONS, "refusal: unknown reason")?, detail: from.text()? }
        }
        TAG_EPOCH_BEGIN => Message::EpochBegin { id: from.epoch()?, completes_resync: from.flag()? },
        TAG_EPOCH_END => {
            Message::EpochEnd { id: from.epoch()?, pages: from.u64()?, state_bytes: from.u64()?, digest: from.u32()? }
        }
        TAG_ACK => Message::Ack { id: from.epoch()?, staged_bytes: from.u64()? },
        TAG_PAIRED => Message::Paired { record: from.record()? },
        TAG_WRITTEN => Message::Written { through: from.epoch()? },
        TAG_HEARTBEAT => Message::Heartbeat(from.heartbeat()?),
        TAG_BYE => Message::Bye { reason: from.text()? },
        TAG_HAND_OVER => Message::HandOver { reason: from.text()? },
        TAG_HASH_BLOCKS => Message::HashBlocks { first: from.u64()?, count: from.u32()? },
        TAG_RESYNC_LEFT => Message::ResyncLeft { left: from.resync_left()? },
        _ => return malformed("message: unknown tag"),
    };
    if from.rest.is_empty() { Ok(message) } else { malformed("message: bytes after its end") }
}

/// Appends the byte form of a machine's shape, as a welcome has it.
pub fn encode_shape(shape: &MachineShape, out: &mut Vec<u8>) {
    Encoder { out }.shape(shape);
}

/// Reads a shape from the front of `bytes`; also what is behind it.
///
/// # Errors
/// [`WireError::Malformed`] if no machine has this shape.
pub fn decode_shape(bytes: &[u8]) -> Result<(MachineShape, &[u8]), WireError> {
    let mut from = Decoder { rest: bytes };
    let shape = from.shape()?;
    Ok((shape, from.rest))
}

fn malformed<T>(what: &'static str) -> Result<T, WireError> {
    Err(WireError::Malformed { what })
}

/// Appends fields.
struct Encoder<'a> {
    out: &'a mut Vec<u8>,
}

impl Encoder<'_> {
    fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    fn flag(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    fn instance(&mut self, id: InstanceId) {
        self.bytes(&id.to_bytes());
    }

    fn epoch(&mut self, id: EpochId) {
        self.u64(id.generation.0);
        self.u64(id.epoch);
    }

    /// A value of an enum by its number in `table`, which names every value.
    fn named<T: PartialEq>(&mut self, table: &[(u8, T)], value: T) {
        let number = table.iter().find(|(_, named)| *named == value).map_or(u8::MAX, |(number, _)| *number);
        self.u8(number);
    }

    fn text(&mut self, text: &str) {
        // Cut between characters: position 0 always is such a place.
        let cut = (0..=text.len().min(TEXT_BYTES_MAX)).rev().find(|at| text.is_char_boundary(*at));
        let text = cut.and_then(|at| text.get(..at)).unwrap_or_default();
        self.u16(text.len() as u16);
        self.bytes(text.as_bytes());
    }

    fn hello(&mut self, hello: &Hello) {
        self.u8(TAG_HELLO);
        self.named(&CHANNELS, hello.channel);
        self.u16(hello.version);
        self.text(hello.guest.as_str());
        self.instance(hello.instance);
        self.u64(hello.features);
        self.u64(hello.staging_bytes_max);
        self.u64(hello.cpu.digest);
        self.u32(hello.cpu.tsc_khz);
        self.flag(hello.cpu.tsc_scales);
    }

    fn welcome(&mut self, welcome: &Welcome) {
        self.u8(TAG_WELCOME);
        self.instance(welcome.instance);
        self.u64(welcome.generation.0);
        self.shape(&welcome.shape);
        self.u32(welcome.tsc_khz);
        self.u64(welcome.features);
        self.u64(welcome.interval_us);
        self.u64(welcome.heartbeat_interval_us);
        self.u64(welcome.heartbeat_timeout_us);
    }

    fn shape(&mut self, shape: &MachineShape) {
        self.u64(shape.memory_bytes);
        self.u8(shape.cpus);
        self.bytes(&shape.mac);
        self.flag(shape.rng);
        // A machine with more disks is not built in the first place.
        self.u8(shape.disks.len().min(DISKS_MAX) as u8);
        for disk in shape.disks.iter().take(DISKS_MAX) {
            self.u64(disk.bytes);
            self.named(&USES, (disk.read_only, disk.shared));
            self.bytes(&disk.serial);
        }
    }

    fn heartbeat(&mut self, heartbeat: &Heartbeat) {
        self.u8(TAG_HEARTBEAT);
        self.instance(heartbeat.instance);
        self.u64(heartbeat.generation.0);
        self.u64(heartbeat.sequence);
        self.flag(heartbeat.committed.is_some());
        if let Some(id) = heartbeat.committed {
            self.epoch(id);
        }
        match heartbeat.activity {
            Activity::Ready => self.u8(ACTIVITY_READY),
            Activity::Building { done_bytes } => {
                self.u8(ACTIVITY_BUILDING);
                self.u64(done_bytes);
            }
            Activity::Capturing => self.u8(ACTIVITY_CAPTURING),
        }
    }

    fn record(&mut self, record: &Record) {
        self.u64(record.generation.0);
        self.named(&STATES, record.state);
        self.instance(record.owner);
        self.flag(record.peer.is_some());
        if let Some(peer) = record.peer {
            self.instance(peer);
        }
    }
}

/// Takes fields off the front, never past the end.
struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        match self.rest.split_at_checked(count) {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(taken)
            }
            None => malformed("message: it ends too early"),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        match self.rest.split_first_chunk::<N>() {
            Some((taken, rest)) => {
                self.rest = rest;
                Ok(*taken)
            }
            None => malformed("message: it ends too early"),
        }
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => malformed("message: a flag is neither 0 nor 1"),
        }
    }

    fn option<T>(&mut self, value: impl FnOnce(&mut Self) -> Result<T, WireError>) -> Result<Option<T>, WireError> {
        if self.flag()? { value(self).map(Some) } else { Ok(None) }
    }

    fn instance(&mut self) -> Result<InstanceId, WireError> {
        self.array().map(InstanceId::from_bytes)
    }

    fn epoch(&mut self) -> Result<EpochId, WireError> {
        Ok(EpochId { generation: Generation(self.u64()?), epoch: self.u64()? })
    }

    fn named<T: Copy>(&mut self, table: &[(u8, T)], what: &'static str) -> Result<T, WireError> {
        let number = self.u8()?;
        let found = table.iter().find(|(named, _)| *named == number).map(|(_, value)| *value);
        found.ok_or(WireError::Malformed { what })
    }

    fn text_slice(&mut self) -> Result<&'a str, WireError> {
        let length = usize::from(self.u16()?);
        if length > TEXT_BYTES_MAX {
            return malformed("message: a text is longer than 512 bytes");
        }
        std::str::from_utf8(self.take(length)?).or_else(|_| malformed("message: a text is not UTF-8"))
    }

    fn text(&mut self) -> Result<String, WireError> {
        self.text_slice().map(str::to_owned)
    }

    fn hello(&mut self) -> Result<Hello, WireError> {
        Ok(Hello {
            channel: self.named(&CHANNELS, "hello: unknown channel")?,
            version: self.u16()?,
            guest: self.guest_name()?,
            instance: self.instance()?,
            features: self.u64()?,
            staging_bytes_max: self.u64()?,
            cpu: HostCpu { digest: self.u64()?, tsc_khz: self.u32()?, tsc_scales: self.flag()? },
        })
    }

    fn guest_name(&mut self) -> Result<GuestName, WireError> {
        GuestName::new(self.text_slice()?).ok_or(WireError::Malformed { what: "hello: not a guest's name" })
    }

    fn welcome(&mut self) -> Result<Welcome, WireError> {
        Ok(Welcome {
            instance: self.instance()?,
            generation: Generation(self.u64()?),
            shape: self.shape()?,
            tsc_khz: self.u32()?,
            features: self.u64()?,
            interval_us: self.u64()?,
            heartbeat_interval_us: self.u64()?,
            heartbeat_timeout_us: self.u64()?,
        })
    }

    fn shape(&mut self) -> Result<MachineShape, WireError> {
        let (memory_bytes, cpus, mac, rng) = (self.u64()?, self.u8()?, self.array()?, self.flag()?);
        if cpus == 0 || memory_bytes == 0 || !memory_bytes.is_multiple_of(PAGE_BYTES as u64) {
            return malformed("welcome: no machine has this shape");
        }
        let count = usize::from(self.u8()?);
        if count > DISKS_MAX {
            return malformed("welcome: no machine has so many disks");
        }
        let mut disks = Vec::with_capacity(count);
        for _ in 0..count {
            disks.push(self.disk()?);
        }
        Ok(MachineShape { memory_bytes, cpus, mac, disks, rng })
    }

    fn disk(&mut self) -> Result<DiskShape, WireError> {
        let bytes = self.u64()?;
        let (read_only, shared) = self.named(&USES, "welcome: unknown use of a disk")?;
        let disk = DiskShape { bytes, read_only, shared, serial: self.array()? };
        if disk.is_possible() { Ok(disk) } else { malformed("welcome: no disk has this size") }
    }

    fn resync_left(&mut self) -> Result<Vec<u64>, WireError> {
        match usize::from(self.u8()?) {
            count if count <= PARTS_MAX => (0..count).map(|_| self.u64()).collect(),
            _ => malformed("resync: no machine has so many disks"),
        }
    }

    fn heartbeat(&mut self) -> Result<Heartbeat, WireError> {
        Ok(Heartbeat {
            instance: self.instance()?,
            generation: Generation(self.u64()?),
            sequence: self.u64()?,
            committed: self.option(Self::epoch)?,
            activity: match self.u8()? {
                ACTIVITY_READY => Activity::Ready,
                ACTIVITY_BUILDING => Activity::Building { done_bytes: self.u64()? },
                ACTIVITY_CAPTURING => Activity::Capturing,
                _ => return malformed("heartbeat: unknown activity"),
            },
        })
    }

    fn record(&mut self) -> Result<Record, WireError> {
        let record = Record {
            generation: Generation(self.u64()?),
            state: self.named(&STATES, "record: unknown state")?,
            owner: self.instance()?,
            peer: self.option(Self::instance)?,
        };
        if record.peer.is_some() != (record.state == RecordState::Paired) {
            return malformed("record: a pair has a peer, and only a pair");
        }
        Ok(record)
    }
}
