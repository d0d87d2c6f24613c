//! The bytes of the data connection: epochs and pushes as a sender writes them, and a receiver that
//! makes epochs of them again, with the real frames, page codec and staging in between.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;

use mcd::checkpoint::receiver::{EpochReceiver, Received};
use mcd::checkpoint::stage::{StagedEpoch, StagingBudget};
use mcd::protocol::block_hashes::BlockHash;
use mcd::protocol::messages::Message;
use mcd::protocol::pages::PAGE_BYTES;
use mcd::protocol::types::{EpochId, Instant};
use mcd::wire::block_hashes::{decode_hashes, encode_hashes};
use mcd::wire::{FrameBatch, FrameKind, FrameReader, PageDecoder, PageEncoder};

use crate::node::Staged;
use crate::rng::Rng;

type Page = [u8; PAGE_BYTES];

/// Pages of one frame: few, so that most epochs have several frames.
const PAGES_PER_FRAME: usize = 5;

/// Bytes of such a frame, and some more.
pub const FRAME_BYTES_MAX: usize = PAGES_PER_FRAME * (PAGE_BYTES + 64);

/// A guest page of this version: zero, one that compresses, or one that does not, so that every
/// form of a page travels.
fn page_of(version: u64) -> Page {
    let mut page = [0; PAGE_BYTES];
    if version == 0 {
        return page;
    }
    page[..8].copy_from_slice(&version.to_le_bytes());
    if version.is_multiple_of(16) {
        let mut noise = Rng::new(version);
        page[8..].as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = noise.next().to_le_bytes());
    }
    page
}

/// The version of a page, all of whose bytes must be that version's.
fn version_of(page: &Page) -> Result<u64, String> {
    let mut word = [0; 8];
    word.copy_from_slice(&page[..8]);
    let version = u64::from_le_bytes(word);
    if page_of(version) == *page { Ok(version) } else { Err(format!("a page of version {version} has other bytes")) }
}

/// Writes what a sender sends.
pub struct Encoder {
    pages: PageEncoder,
    batch: FrameBatch,
}

impl Encoder {
    pub fn new() -> Encoder {
        Encoder { pages: PageEncoder::new(true), batch: FrameBatch::new() }
    }

    pub fn epoch(
        &mut self,
        id: EpochId,
        completes_resync: bool,
        pages: &[(u64, u64)],
        (counter, life): (u64, u64),
    ) -> Vec<u8> {
        self.batch.clear();
        let begin = Message::EpochBegin { id, completes_resync };
        self.batch.push_message(&begin).expect("a short message");
        let mut digest = 0;
        for part in pages.chunks(PAGES_PER_FRAME) {
            digest = self.frame(FrameKind::Pages, part, digest);
        }
        let mut state = [0; 16];
        state[..8].copy_from_slice(&counter.to_le_bytes());
        state[8..].copy_from_slice(&life.to_le_bytes());
        self.batch.push(FrameKind::State, &state).expect("a short state");
        digest = crc32c::crc32c_append(digest, &state);
        let end = Message::EpochEnd { id, pages: pages.len() as u64, state_bytes: state.len() as u64, digest };
        self.batch.push_message(&end).expect("a short message");
        if id.epoch.is_multiple_of(8) {
            self.batch.push(FrameKind::Probe, &[]).expect("nothing");
        }
        self.batch.as_bytes().to_vec()
    }

    pub fn push(&mut self, pages: &[(u64, u64)]) -> Vec<u8> {
        self.batch.clear();
        for part in pages.chunks(PAGES_PER_FRAME) {
            self.frame(FrameKind::Background, part, 0);
        }
        self.batch.as_bytes().to_vec()
    }

    fn frame(&mut self, kind: FrameKind, pages: &[(u64, u64)], digest: u32) -> u32 {
        let encoder = &mut self.pages;
        let written = self.batch.build(kind, |payload| {
            let start = payload.len();
            for (page, version) in pages {
                encoder.encode(*page, &page_of(*version), payload);
            }
            crc32c::crc32c_append(digest, &payload[start..])
        });
        written.expect("a few pages fit a frame")
    }
}

/// Bytes that arrived and were not read yet.
struct Pipe(VecDeque<u8>);

impl Read for Pipe {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { self.0.read(into) }
    }
}

/// What a primary reads of a secondary's hashes.
pub fn sums_over_the_wire(first: u64, hashes: &[BlockHash]) -> Result<(u64, Vec<BlockHash>), String> {
    let mut batch = FrameBatch::new();
    batch.push(FrameKind::Hashes, &encode_hashes(first, hashes)).map_err(|error| error.to_string())?;
    let mut reader = FrameReader::new(batch.as_bytes());
    match reader.read() {
        Ok(frame) if frame.kind == FrameKind::Hashes => decode_hashes(frame.payload).map_err(|error| error.to_string()),
        Ok(frame) => Err(format!("a frame of kind {:?}", frame.kind)),
        Err(error) => Err(error.to_string()),
    }
}

/// What a receiver made of bytes.
pub enum Arrived {
    Epoch { staged: Staged, began: Instant },
    Background { pages: Vec<(u64, u64)>, staged_bytes: u64 },
}

/// Reads the bytes of one connection with the node's own receiver.
pub struct Receiver {
    reader: FrameReader<Pipe>,
    epochs: EpochReceiver,
    pages: u64,
}

impl Receiver {
    /// For a guest of so many pages; what it stages is given back to `budget` when it is applied.
    pub fn new(pages: u64, budget: Arc<StagingBudget>) -> Receiver {
        let epochs = EpochReceiver::for_pages(budget, pages);
        Receiver { reader: FrameReader::new(Pipe(VecDeque::new())), epochs, pages }
    }

    /// The most that so many bytes more can take of the budget, with those that were read before
    /// and make no frame yet.
    pub fn staged_bytes_max(&mut self, bytes: usize) -> u64 {
        (self.reader.source_mut().0.len() + FRAME_BYTES_MAX + bytes) as u64
    }

    /// Takes bytes as they come, wherever they were cut.
    pub fn take(&mut self, now: Instant, bytes: &[u8]) -> Result<Vec<Arrived>, String> {
        self.reader.source_mut().0.extend(bytes);
        let mut arrived = Vec::new();
        loop {
            let frame = match self.reader.read() {
                Ok(frame) => frame,
                Err(error) if error.is_timeout() => return Ok(arrived),
                Err(error) => return Err(error.to_string()),
            };
            match self.epochs.take(now, frame).map_err(|error| error.to_string())? {
                Received::Nothing => {}
                Received::Background(payload) => {
                    let staged_bytes = payload.len() as u64;
                    arrived.push(Arrived::Background { pages: decode(&payload, self.pages)?, staged_bytes });
                }
                Received::Epoch { epoch, began } => {
                    arrived.push(Arrived::Epoch { staged: staged(&epoch, self.pages)?, began });
                }
                Received::Message(other) => return Err(format!("a {} inside an epoch", other.name())),
            }
        }
    }
}

fn decode(chunk: &[u8], pages: u64) -> Result<Vec<(u64, u64)>, String> {
    let mut page = [0; PAGE_BYTES];
    let record = |record: Result<mcd::wire::PageRecord<'_>, mcd::wire::PageError>| {
        let record = record.map_err(|error| error.to_string())?;
        record.expand(&mut page).map_err(|error| error.to_string())?;
        Ok((record.index, version_of(&page)?))
    };
    PageDecoder::new(chunk, pages).map(record).collect()
}

fn staged(epoch: &StagedEpoch, pages_total: u64) -> Result<Staged, String> {
    let mut pages = Vec::new();
    for chunk in &epoch.chunks {
        pages.extend(decode(chunk, pages_total)?);
    }
    let state = <[u8; 16]>::try_from(epoch.state.as_slice()).map_err(|_| "a state of another length")?;
    let both = u128::from_le_bytes(state);
    let (counter, life) = (both as u64, (both >> 64) as u64);
    Ok(Staged { id: epoch.id, completes: epoch.completes_resync, pages, counter, life, staged_bytes: epoch.bytes })
}
