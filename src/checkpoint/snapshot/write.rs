//! Writing a snapshot: under another name, made durable, then renamed, so that who looks sees a
//! whole one or none.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::read::state_bytes_max;
use super::{SnapshotError, SnapshotHead};
use crate::machine::GuestRam;
use crate::protocol::messages::Message;
use crate::protocol::pages::PAGE_BYTES;
use crate::wire::pages::is_zero;
use crate::wire::{FrameBatch, FrameKind, PageEncoder, WireError};

/// Pages encoded into one frame.
const PAGES_PER_FRAME: usize = 128;
/// Bytes gathered before they are written.
const BATCH_BYTES_MAX: usize = 1 << 20;

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Pages in the file; those of zeros are not.
    pub pages: u64,
    /// Bytes of the file.
    pub bytes: u64,
}

/// Writes the snapshot `head` of a paused machine, with its memory and its saved state,
/// to `path`. What is at `path` is replaced in the end, and not touched before. Returns when the
/// file outlives a loss of power. Only the caller's user may read it.
///
/// # Errors
/// [`SnapshotError`]; a part that was written is removed. Also if `cancelled` becomes true
/// meanwhile.
pub fn write(
    path: &Path,
    head: &SnapshotHead,
    memory: &GuestRam,
    state: &[u8],
    cancelled: &AtomicBool,
) -> Result<Written, SnapshotError> {
    if fs::symlink_metadata(path).is_ok_and(|there| !there.is_file()) {
        return Err(SnapshotError::NotAFile { path: path.to_owned() });
    }
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let file = create(path, &partial)?;
    let written = write_file(path, &file, head, (memory, state), cancelled).and_then(|written| {
        not_cancelled(path, cancelled)?;
        fs::rename(&partial, path).map_err(failed(path, "replace"))?;
        Ok(written)
    });
    if written.is_err() {
        // If it cannot be removed it is overwritten by the next.
        let _ = fs::remove_file(&partial);
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let written = written?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed(path, "sync"))?;
    Ok(written)
}

fn not_cancelled(path: &Path, cancelled: &AtomicBool) -> Result<(), SnapshotError> {
    match cancelled.load(Ordering::Acquire) {
        true => Err(SnapshotError::Cancelled { path: path.to_owned() }),
        false => Ok(()),
    }
}

fn failed(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |reason| SnapshotError::Write { doing, path, reason }
}

/// The file under its first name, empty and locked. What a crash left there is overwritten, but
/// never what a link leads to, nor what another node writes that was given the same name.
fn create(path: &Path, partial: &Path) -> Result<File, SnapshotError> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    let file = options.open(partial).map_err(failed(path, "create"))?;
    file.try_lock().map_err(|error| failed(path, "lock")(error.into()))?;
    // Whoever held the lock may have given the file its name meanwhile: then it is no more ours to
    // write.
    let (ours, there) = (file.metadata(), fs::symlink_metadata(partial));
    match (ours, there) {
        (Ok(ours), Ok(there)) if ours.ino() == there.ino() => {}
        _ => return Err(failed(path, "lock")(std::io::ErrorKind::WouldBlock.into())),
    }
    file.set_len(0).map_err(failed(path, "empty"))?;
    Ok(file)
}

fn write_file(
    path: &Path,
    mut file: &File,
    head: &SnapshotHead,
    (memory, state): (&GuestRam, &[u8]),
    cancelled: &AtomicBool,
) -> Result<Written, SnapshotError> {
    let bytes_max = state_bytes_max(&head.shape);
    if state.len() as u64 > bytes_max {
        return Err(SnapshotError::StateTooLarge { path: path.to_owned(), bytes: state.len() as u64, bytes_max });
    }
    file.write_all(&head.encode()).map_err(failed(path, "write"))?;
    let mut stream = Stream { path, file, batch: FrameBatch::new(), digest: 0, bytes: head.encode().len() as u64 };
    stream.add(|batch| batch.push_message(&Message::EpochBegin { id: head.at, completes_resync: true }))?;
    let pages = stream.pages(memory, cancelled)?;
    for part in state.chunks(FrameKind::State.bytes_max()) {
        stream.digest = crc32c::crc32c_append(stream.digest, part);
        stream.add(|batch| batch.push(FrameKind::State, part))?;
    }
    let (digest, state_bytes) = (stream.digest, state.len() as u64);
    stream.add(|batch| batch.push_message(&Message::EpochEnd { id: head.at, pages, state_bytes, digest }))?;
    stream.flush()?;
    // Making it durable may take longest of all.
    not_cancelled(path, cancelled)?;
    stream.file.sync_all().map_err(failed(path, "sync"))?;
    Ok(Written { pages, bytes: stream.bytes })
}

/// The frames.
struct Stream<'a> {
    path: &'a Path,
    file: &'a File,
    batch: FrameBatch,
    digest: u32,
    bytes: u64,
}

impl Stream<'_> {
    fn pages(&mut self, memory: &GuestRam, cancelled: &AtomicBool) -> Result<u64, SnapshotError> {
        let mut encoder = PageEncoder::new(true);
        let mut page = [0; PAGE_BYTES];
        let (mut next, mut written) = (0, 0);
        while next < memory.pages() {
            not_cancelled(self.path, cancelled)?;
            let (mut in_frame, digest) = (0, self.digest);
            let mut chunk = Vec::new();
            while next < memory.pages() && in_frame < PAGES_PER_FRAME {
                let path = || self.path.to_owned();
                memory.read_page(next, &mut page).map_err(|reason| SnapshotError::Memory { path: path(), reason })?;
                if !is_zero(&page) {
                    encoder.encode(next, &page, &mut chunk);
                    in_frame += 1;
                }
                next += 1;
                // Memory that was never used is passed over fast, but there may be a lot of it.
                if in_frame == 0 && next.is_multiple_of(1 << 16) {
                    break;
                }
            }
            if !chunk.is_empty() {
                self.digest = crc32c::crc32c_append(digest, &chunk);
                self.add(|batch| batch.push(FrameKind::Pages, &chunk))?;
            }
            written += in_frame as u64;
        }
        Ok(written)
    }

    fn add(&mut self, add: impl FnOnce(&mut FrameBatch) -> Result<(), WireError>) -> Result<(), SnapshotError> {
        add(&mut self.batch).map_err(|error| SnapshotError::of_frame(self.path, error))?;
        if self.batch.as_bytes().len() < BATCH_BYTES_MAX { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        self.file.write_all(self.batch.as_bytes()).map_err(failed(self.path, "write"))?;
        self.bytes += self.batch.as_bytes().len() as u64;
        self.batch.clear();
        Ok(())
    }
}
