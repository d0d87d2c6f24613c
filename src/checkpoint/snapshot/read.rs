//! Reading a snapshot: page by page, believing nothing before its check sum and nothing at all
//! before the file's end.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{PREFACE_BYTES, SnapshotError, SnapshotHead};
use crate::machine::GuestRam;
use crate::machine::memory::MemoryError;
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::messages::Message;
use crate::protocol::pages::PAGE_BYTES;
use crate::wire::{FrameKind, FrameReader, PageDecoder, WireError};

/// Most bytes of machine state in a snapshot of a machine of `shape`: far above what one has (30
/// KiB a vCPU).
pub(super) fn state_bytes_max(shape: &MachineShape) -> u64 {
    (1 << 20) * (1 + u64::from(shape.cpus))
}

/// What a whole file held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotChecks {
    /// Pages that are not zeros.
    pub pages: u64,
    /// Bytes of machine state.
    pub state_bytes: u64,
    /// CRC32C over all payloads of pages and state.
    pub digest: u32,
}

/// An open snapshot whose head is known.
#[derive(Debug)]
pub struct SnapshotReader {
    path: PathBuf,
    head: SnapshotHead,
    frames: FrameReader<File>,
    bytes: u64,
}

impl SnapshotReader {
    /// Opens the file and reads its head.
    ///
    /// # Errors
    /// [`SnapshotError`]: it cannot be read, is no snapshot, of another version, cut off or
    /// damaged.
    pub fn open(path: &Path) -> Result<SnapshotReader, SnapshotError> {
        let failed = |reason| SnapshotError::Read { path: path.to_owned(), reason };
        // A pipe that nobody writes to would else be waited for.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
        let mut file = file.map_err(failed)?;
        let about = file.metadata().map_err(failed)?;
        if !about.is_file() {
            return Err(SnapshotError::NotASnapshot { path: path.to_owned() });
        }
        let mut preface = [0; PREFACE_BYTES];
        read_exact(&mut file, &mut preface, path, "its preface").map_err(|error| match error {
            // Too short to be anything of ours.
            SnapshotError::CutOff { .. } if !preface.starts_with(&super::MAGIC) => {
                SnapshotError::NotASnapshot { path: path.to_owned() }
            }
            error => error,
        })?;
        let preface = SnapshotHead::preface(path, &preface)?;
        let mut head = vec![0; preface.head_bytes];
        read_exact(&mut file, &mut head, path, "its head")?;
        let damaged = |what: &str| SnapshotError::Damaged { path: path.to_owned(), what: what.to_owned() };
        if crc32c::crc32c(&head) != preface.head_crc {
            return Err(damaged("the check sum of its head is wrong"));
        }
        let head = SnapshotHead::decode(&head).map_err(damaged)?;
        Ok(SnapshotReader { path: path.to_owned(), head, frames: FrameReader::new(file), bytes: about.len() })
    }

    /// What the file says of itself.
    pub fn head(&self) -> &SnapshotHead {
        &self.head
    }

    /// The file's size in bytes, when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the rest and checks it, and keeps nothing of it.
    ///
    /// # Errors
    /// As [`SnapshotReader::load`].
    pub fn check(self) -> Result<SnapshotChecks, SnapshotError> {
        self.read(|_, _| Ok(())).map(|(_, hashes)| hashes)
    }

    /// Puts the pages into `memory`, which is of the head's shape and all zeros; gives the
    /// machine's state. After an error memory holds a part that is of no use.
    ///
    /// # Errors
    /// [`SnapshotError`]: the file is cut off or damaged.
    pub fn load(self, memory: &GuestRam) -> Result<Vec<u8>, SnapshotError> {
        self.read(|index, page| memory.write_page(index, page)).map(|(state, _)| state)
    }

    fn read(
        mut self,
        mut put: impl FnMut(u64, &[u8; PAGE_BYTES]) -> Result<(), MemoryError>,
    ) -> Result<(Vec<u8>, SnapshotChecks), SnapshotError> {
        let path = self.path.clone();
        let damaged = |what: &str| SnapshotError::Damaged { path: path.clone(), what: what.to_owned() };
        let broken = |error| SnapshotError::of_frame(&path, error);
        let memory_pages = self.head.shape.memory_bytes / PAGE_BYTES as u64;
        let state_max = state_bytes_max(&self.head.shape);
        let (mut state, mut hashes, mut next_index, mut begun) = (Vec::new(), SnapshotChecks::default(), 0, false);
        let mut content = [0; PAGE_BYTES];
        loop {
            let frame = self.frames.read().map_err(broken)?;
            match frame.kind {
                FrameKind::Message => match frame.message().map_err(broken)? {
                    Message::EpochBegin { id, .. } if !begun && id == self.head.at => begun = true,
                    Message::EpochEnd { id, pages, state_bytes, digest } if begun && id == self.head.at => {
                        hashes.state_bytes = state.len() as u64;
                        if (SnapshotChecks { pages, state_bytes, digest }) != hashes {
                            return Err(damaged("its figures do not agree with what is in it"));
                        }
                        break;
                    }
                    _ => return Err(damaged("a message has no place there")),
                },
                FrameKind::Pages if begun && state.is_empty() => {
                    hashes.digest = crc32c::crc32c_append(hashes.digest, frame.payload);
                    for record in PageDecoder::new(frame.payload, memory_pages) {
                        let record = record.map_err(|error| damaged(&error.to_string()))?;
                        if record.index < next_index {
                            return Err(damaged("its pages are not in order"));
                        }
                        record.expand(&mut content).map_err(|error| damaged(&error.to_string()))?;
                        put(record.index, &content)
                            .map_err(|reason| SnapshotError::Memory { path: path.clone(), reason })?;
                        (next_index, hashes.pages) = (record.index + 1, hashes.pages + 1);
                    }
                }
                FrameKind::State if begun && (state.len() + frame.payload.len()) as u64 <= state_max => {
                    hashes.digest = crc32c::crc32c_append(hashes.digest, frame.payload);
                    state.extend_from_slice(frame.payload);
                }
                _ => return Err(damaged(&format!("a {} frame has no place there", frame.kind))),
            }
        }
        match self.frames.read() {
            Err(WireError::Closed) => Ok((state, hashes)),
            Ok(_) | Err(WireError::NotMcd { .. } | WireError::ClosedMidFrame { .. }) => {
                Err(damaged("it goes on behind its end"))
            }
            Err(error) => Err(broken(error)),
        }
    }
}

fn read_exact(file: &mut File, into: &mut [u8], path: &Path, part: &'static str) -> Result<(), SnapshotError> {
    let mut have = 0;
    while have < into.len() {
        match file.read(into.get_mut(have..).unwrap_or_default()) {
            Ok(0) => return Err(SnapshotError::CutOff { path: path.to_owned(), part }),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(reason) => return Err(SnapshotError::Read { path: path.to_owned(), reason }),
        }
    }
    Ok(())
}
