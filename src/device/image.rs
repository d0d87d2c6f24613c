//! A disk kept in a raw image: a file or a block device, byte for byte.
//!
//! An image is locked for as long as it is open, so that two nodes never write one image (two that
//! only read it may). What is written goes through the host's page cache; a flush is `fdatasync`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::block::{BlockBackend, Stored};
use super::shared_image;
use crate::protocol::machine_shape::SECTOR_BYTES;

/// Bytes of zeros written at a time where the storage cannot make zeros by itself.
const ZEROS_BYTES: usize = 64 << 10;

/// Why an image could not be opened. Each message is one line that says what to do.
#[derive(Debug, Error)]
pub enum ImageError {
    /// There is no such file.
    #[error("there is no disk image {}: create it (truncate -s 1G {}) or name another", path.display(), path.display())]
    Missing {
        /// The image.
        path: PathBuf,
    },
    /// This process may not open it so.
    #[error("no permission to open disk image {} ({reason}): run as a user who may, \
        or make it read-only for the guest", path.display())]
    NotPermitted {
        /// The image.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// Another process has it open.
    #[error("disk image {} is in use: another node or program has it locked or mounted; \
        end that one or name another", path.display())]
    InUse {
        /// The image.
        path: PathBuf,
    },
    /// It is a directory, a pipe or the like.
    #[error("{} is neither a file nor a block device: name a raw disk image", path.display())]
    NotAnImage {
        /// The path.
        path: PathBuf,
    },
    /// Its size is not one of a disk.
    #[error("disk image {} has {bytes} bytes: a disk has a multiple of {SECTOR_BYTES}, not 0; \
        resize it with truncate", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Anything else the system says.
    #[error("cannot use disk image {}: {reason}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
}

/// An open, locked image.
#[derive(Debug)]
pub struct RawImage {
    file: File,
    bytes: u64,
    read_only: bool,
    is_device: bool,
    is_limited: bool,
}

impl RawImage {
    /// Opens and locks the image at `path`; with `read_only` nothing can be written to it.
    ///
    /// # Errors
    /// As [`ImageError`] says.
    pub fn open(path: &Path, read_only: bool) -> Result<RawImage, ImageError> {
        RawImage::open_unlocked(path, read_only)?.locked(path)
    }

    fn locked(self, path: &Path) -> Result<RawImage, ImageError> {
        if shared_image::is_taken(&self.file, self.read_only) {
            return Err(ImageError::InUse { path: path.to_path_buf() });
        }
        let locked = if self.read_only { self.file.try_lock_shared() } else { self.file.try_lock() };
        locked.map_err(|error| match error {
            TryLockError::WouldBlock => ImageError::InUse { path: path.to_path_buf() },
            TryLockError::Error(reason) => ImageError::Io { path: path.to_path_buf(), reason },
        })?;
        Ok(self)
    }

    /// Opens the image at `path` without locking it.
    pub(super) fn open_unlocked(path: &Path, read_only: bool) -> Result<RawImage, ImageError> {
        let owned = || path.to_path_buf();
        let kind = std::fs::metadata(path).map_err(|reason| explain(path, reason))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::NotAnImage { path: owned() });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        if kind.is_block_device() && !read_only {
            // For a block device this means: not while it is mounted, or part of something that is.
            options.custom_flags(libc::O_EXCL);
        }
        let file = options.open(path).map_err(|reason| explain(path, reason))?;
        let image = RawImage::of_file(path, file, read_only)?;
        Ok(RawImage { is_device: kind.is_block_device(), ..image })
    }

    fn of_file(path: &Path, mut file: File, read_only: bool) -> Result<RawImage, ImageError> {
        // A block device has no length of its own, but an end.
        let end = file.seek(SeekFrom::End(0));
        let bytes = end.map_err(|reason| ImageError::Io { path: path.to_path_buf(), reason })?;
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Size { path: path.to_path_buf(), bytes });
        }
        Ok(RawImage { file, bytes, read_only, is_device: false, is_limited: false })
    }

    /// Makes an image of `bytes` zeros at `path`, which takes no space yet, and locks it. Only its
    /// owner may read it: it is to hold what a guest keeps private.
    ///
    /// # Errors
    /// As [`ImageError`] says; an image that is there already is not touched.
    pub fn create(path: &Path, bytes: u64) -> Result<RawImage, ImageError> {
        // The file that was made is the one that is used, whatever has its name by then.
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
        let file = file.map_err(|reason| match reason.raw_os_error() {
            // Here it is the directory that is missing.
            Some(libc::ENOENT | libc::ENOTDIR) => ImageError::Io { path: path.to_path_buf(), reason },
            _ => explain(path, reason),
        })?;
        if let Err(reason) = file.set_len(bytes) {
            // An image without its size would be in the way of the next try.
            let _ = std::fs::remove_file(path);
            return Err(explain(path, reason));
        }
        RawImage::of_file(path, file, false)?.locked(path)
    }

    /// True if nothing was ever written to it, as far as its ends and a file's holes show: what a
    /// disk is used for (a partition table, a file system, a label of LVM or RAID) leaves its mark
    /// there.
    ///
    /// # Errors
    /// What the storage says.
    pub fn is_blank(&self) -> io::Result<bool> {
        const HEAD_BYTES: u64 = 16 << 20;
        const TAIL_BYTES: u64 = 1 << 20;
        let tail = self.bytes.saturating_sub(TAIL_BYTES).max(HEAD_BYTES);
        Ok(self.is_zero(0, HEAD_BYTES.min(self.bytes))? && self.is_zero(tail, self.bytes)?)
    }

    fn is_zero(&self, from: u64, to: u64) -> io::Result<bool> {
        let mut buffer = vec![0; ZEROS_BYTES];
        let mut at = from;
        while at < to {
            let length = usize::try_from(to - at).unwrap_or(usize::MAX).min(ZEROS_BYTES);
            let part = buffer.get_mut(..length).unwrap_or_default();
            self.file.read_exact_at(part, at)?;
            if part.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            at += part.len() as u64;
        }
        Ok(true)
    }

    /// The file behind it.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// The same with the first `bytes` only, if it has more.
    #[must_use]
    pub fn limited_to(self, bytes: u64) -> RawImage {
        match bytes < self.bytes {
            true => RawImage { bytes, is_limited: true, ..self },
            false => self,
        }
    }

    /// True if there is more of it than is used.
    pub fn is_limited(&self) -> bool {
        self.is_limited
    }

    /// True if it is a block device, whose size its file system or volume manager decides.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// True if nothing can be written to it.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// An image never grows, whatever it is asked.
    fn check(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "beyond the end of the image")),
        }
    }

    /// Makes a range zeros in the ways `modes`, of which the storage may know none, and else by
    /// writing them.
    fn make_zeros(&self, offset: u64, bytes: u64, modes: &[libc::c_int]) -> io::Result<Stored> {
        self.check(offset, bytes)?;
        if bytes == 0 {
            return Ok(Stored::Accepted);
        }
        for mode in modes {
            match fallocate(&self.file, *mode, offset, bytes) {
                Err(reason) if is_unknown(&reason) => {}
                done => return done.map(|()| Stored::Accepted),
            }
        }
        let zeros = [0; ZEROS_BYTES];
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS_BYTES);
            let now = zeros.get(..length).unwrap_or_default();
            self.file.write_all_at(now, at)?;
            at += now.len() as u64;
        }
        Ok(Stored::Accepted)
    }
}

/// Gives the space back; the range reads as zeros.
const PUNCH_HOLE: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// Makes the range zeros and keeps its space.
const ZERO_RANGE: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl BlockBackend for RawImage {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn next_data(&self, offset: u64) -> io::Result<u64> {
        seek(&self.file, offset, libc::SEEK_DATA).map(|at| at.unwrap_or(self.bytes).min(self.bytes))
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        seek(&self.file, offset, libc::SEEK_HOLE).map(|at| at.unwrap_or(self.bytes).min(self.bytes))
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.check(offset, into.len() as u64)?;
        self.file.read_exact_at(into, offset)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
        self.check(offset, from.len() as u64)?;
        self.file.write_all_at(from, offset).map(|()| Stored::Accepted)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<Stored> {
        self.make_zeros(offset, bytes, &[PUNCH_HOLE, ZERO_RANGE])
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<Stored> {
        let modes: &[libc::c_int] = if may_unmap { &[PUNCH_HOLE, ZERO_RANGE] } else { &[ZERO_RANGE] };
        self.make_zeros(offset, bytes, modes)
    }
}

/// Where data or a hole begins; `None` if there is none behind `offset`. A file system that does
/// not know holes has one piece of data, and so has a block device.
fn seek(file: &File, offset: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    let Ok(from) = libc::off_t::try_from(offset) else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: the descriptor belongs to `file` and is open; the call takes numbers only. It moves
    // the position of the file, which nobody here uses.
    match unsafe { libc::lseek(file.as_raw_fd(), from, whence) } {
        at if at >= 0 => Ok(u64::try_from(at).ok()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error if is_unknown(&error) => Ok((whence == libc::SEEK_DATA).then_some(offset)),
            error => Err(error),
        },
    }
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
    let range = (libc::off_t::try_from(offset), libc::off_t::try_from(bytes));
    let (Ok(offset), Ok(bytes)) = range else { return Err(io::ErrorKind::InvalidInput.into()) };
    // SAFETY: the descriptor belongs to `file` and is open; the call takes numbers only and touches
    // no memory of ours.
    match unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, bytes) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The storage does not know this mode (some file systems, and some block devices).
fn is_unknown(reason: &io::Error) -> bool {
    matches!(reason.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}

fn explain(path: &Path, reason: io::Error) -> ImageError {
    let path = path.to_path_buf();
    match reason.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => ImageError::Missing { path },
        Some(libc::EACCES | libc::EPERM | libc::EROFS) => ImageError::NotPermitted { path, reason },
        Some(libc::EBUSY | libc::ETXTBSY) => ImageError::InUse { path },
        _ => ImageError::Io { path, reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    const BYTES: u64 = 1 << 20;

    fn image(directory: &tempfile::TempDir, name: &str, bytes: u64) -> PathBuf {
        let path = directory.path().join(name);
        File::create(&path).and_then(|file| file.set_len(bytes)).expect("image");
        path
    }

    fn directory() -> tempfile::TempDir {
        tempfile::tempdir().expect("directory")
    }

    #[test]
    fn what_is_written_is_read_and_the_image_keeps_its_size() {
        let directory = directory();
        let path = image(&directory, "a", BYTES);
        let disk = RawImage::open(&path, false).expect("open");
        assert_eq!(disk.bytes(), BYTES);
        assert_eq!(disk.write(BYTES - 512, &[7; 512]).expect("write"), Stored::Accepted);
        disk.flush().expect("flush");
        let mut sector = [0; 512];
        disk.read(BYTES - 512, &mut sector).expect("read");
        assert_eq!(sector, [7; 512]);
        assert!(disk.write(BYTES - 511, &[1; 512]).is_err());
        assert!(disk.write(u64::MAX - 100, &[1; 512]).is_err());
        assert!(disk.read(BYTES, &mut sector).is_err());
        assert!(disk.discard(BYTES - 512, 1024).is_err());
        assert!(disk.write_zeroes(BYTES, 512, true).is_err());
        assert_eq!(std::fs::metadata(&path).expect("metadata").len(), BYTES);
    }

    #[test]
    fn discarded_and_zeroed_ranges_read_as_zeros_and_their_neighbours_stay() {
        let directory = directory();
        let path = image(&directory, "a", BYTES);
        let disk = RawImage::open(&path, false).expect("open");
        disk.write(0, &vec![0xff; BYTES as usize]).expect("write");
        disk.flush().expect("flush");
        let before = std::fs::metadata(&path).expect("metadata").blocks();
        disk.discard(64 << 10, 256 << 10).expect("discard");
        disk.write_zeroes(512 << 10, 512, false).expect("zero");
        disk.write_zeroes(640 << 10, 64 << 10, true).expect("zero");
        // The way for storage that knows nothing of zeros.
        disk.make_zeros(800 << 10, (ZEROS_BYTES + 512) as u64, &[]).expect("zeros");
        let mut all = vec![0; BYTES as usize];
        disk.read(0, &mut all).expect("read");
        let zeros = [(64 << 10, 256 << 10), (512 << 10, 512), (640 << 10, 64 << 10), (800 << 10, ZEROS_BYTES + 512)];
        for (at, byte) in all.iter().enumerate() {
            let inside = zeros.iter().any(|(from, length)| (*from..from + length).contains(&at));
            assert_eq!(*byte, if inside { 0 } else { 0xff }, "{at}");
        }
        let after = std::fs::metadata(&path).expect("metadata").blocks();
        assert!(after < before, "space was given back: {before} to {after} blocks");
    }

    #[test]
    fn an_image_that_is_made_is_private_and_made_through_no_link() {
        use std::os::unix::fs::symlink;
        let directory = directory();
        let path = directory.path().join("made");
        drop(RawImage::create(&path, BYTES).expect("made"));
        let metadata = std::fs::metadata(&path).expect("metadata");
        assert_eq!((metadata.mode() & 0o777, metadata.len()), (0o600, BYTES));
        let victim = directory.path().join("victim");
        symlink(&victim, directory.path().join("link")).expect("link");
        assert!(RawImage::create(&directory.path().join("link"), BYTES).is_err());
        assert!(!victim.exists());
        // A size that no file can have leaves nothing in the way of the next try.
        let path = directory.path().join("huge");
        assert!(RawImage::create(&path, u64::MAX / 2 / 512 * 512).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn a_blank_image_has_nothing_at_either_end() {
        const LARGE: u64 = 64 << 20;
        let directory = directory();
        for (name, at, blank) in [("b", None, true), ("c", Some(1024), false), ("d", Some(LARGE - 1), false)] {
            let path = image(&directory, name, LARGE);
            let disk = RawImage::open(&path, false).expect("open");
            if let Some(at) = at {
                disk.write(at, &[1]).expect("write");
            }
            assert_eq!(disk.is_blank().expect("read"), blank, "{name}");
        }
        // What is beyond a limit is not the guest's.
        let limited = RawImage::open(&directory.path().join("d"), false).expect("open").limited_to(LARGE - 512);
        assert!(limited.is_limited() && limited.bytes() == LARGE - 512 && limited.is_blank().expect("read"));
        assert!(limited.write(LARGE - 512, &[1]).is_err());
        let small = RawImage::open(&image(&directory, "e", 512), false).expect("open").limited_to(1024);
        assert!(!small.is_limited() && !small.is_device());
        assert!(small.is_blank().expect("read"));
        small.write(511, &[1]).expect("write");
        assert!(!small.is_blank().expect("read"));
    }

    #[test]
    fn holes_are_found_without_reading() {
        let directory = directory();
        let path = image(&directory, "sparse", 16 << 20);
        let disk = RawImage::open(&path, false).expect("open");
        assert_eq!(disk.next_data(0).expect("seek"), 16 << 20, "nothing was written");
        disk.write(8 << 20, &[1; 4096]).expect("write");
        let data = disk.next_data(4096).expect("seek");
        assert!((1 << 20..=8 << 20).contains(&data), "{data}");
        let hole = disk.next_hole(8 << 20).expect("seek");
        assert!(((8 << 20) + 4096..16 << 20).contains(&hole), "{hole}");
        assert_eq!(disk.next_data(hole).expect("seek"), 16 << 20);
    }

    #[test]
    fn two_never_write_one_image() {
        let directory = directory();
        let path = image(&directory, "a", BYTES);
        let first = RawImage::open(&path, false).expect("open");
        for read_only in [false, true] {
            let error = RawImage::open(&path, read_only).expect_err("locked").to_string();
            assert!(error.contains("in use") && !error.contains('\n'), "{error}");
        }
        drop(first);
        let reader = RawImage::open(&path, true).expect("open");
        let other = RawImage::open(&path, true).expect("two readers");
        assert!(matches!(RawImage::open(&path, false), Err(ImageError::InUse { .. })));
        assert!(reader.is_read_only() && reader.write(0, &[0; 512]).is_err());
        other.flush().expect("nothing to do");
    }

    #[test]
    fn what_is_no_image_is_named() {
        let directory = directory();
        let error = |path: &Path| RawImage::open(path, false).expect_err("no image").to_string();
        assert!(error(&directory.path().join("missing")).contains("there is no disk image"));
        assert!(error(directory.path()).contains("neither a file nor a block device"));
        assert!(error(Path::new("/dev/null")).contains("neither a file nor a block device"));
        assert!(error(&image(&directory, "empty", 0)).contains("0 bytes"));
        assert!(error(&image(&directory, "odd", 1000)).contains("1000 bytes"));
    }
}
