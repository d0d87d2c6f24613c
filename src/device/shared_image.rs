//! A raw image on storage that both nodes of a guest reach: whoever writes it holds its lock.
//!
//! The lock is an exclusive one of the open file (`F_OFD_SETLK`), over the whole image. A local
//! file system, NFSv4, GFS2 and OCFS2 keep it; NFS takes no write under a lock whose lease ran out.
//! On a block device it reaches no further than this host, so there something else must keep the
//! other host out.
//!
//! Nothing is written without the lock, and it is given up only when no write is under way.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, PosixFadviseAdvice, fcntl, posix_fadvise};
use parking_lot::RwLock;

use super::block::{BlockBackend, Stored};
use super::image::{ImageError, RawImage};

/// An open image, locked or not.
#[derive(Debug)]
pub struct SharedImage {
    raw: RawImage,
    path: PathBuf,
    /// The lock is ours. Held for reading as long as something that needs it takes.
    ours: RwLock<bool>,
}

impl SharedImage {
    /// Opens the image at `path` and leaves its lock alone.
    ///
    /// # Errors
    /// As [`ImageError`] says.
    pub fn open(path: &Path) -> Result<SharedImage, ImageError> {
        let raw = RawImage::open_unlocked(path, false)?;
        Ok(SharedImage { raw, path: path.to_path_buf(), ours: RwLock::new(false) })
    }

    /// Takes the lock if nobody else has it. What this host remembers of the image is forgotten:
    /// another host may have written it since.
    ///
    /// # Errors
    /// [`ImageError::InUse`] if another node has it, and what else the system says.
    pub fn take(&self) -> Result<(), ImageError> {
        let mut ours = self.ours.write();
        if *ours {
            return Ok(());
        }
        let path = || self.path.clone();
        fcntl(self.raw.file(), FcntlArg::F_OFD_SETLK(&whole_file(libc::F_WRLCK))).map_err(|error| match error {
            nix::Error::EAGAIN | nix::Error::EACCES => ImageError::InUse { path: path() },
            error => ImageError::Io { path: path(), reason: error.into() },
        })?;
        posix_fadvise(self.raw.file(), 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .map_err(|error| ImageError::Io { path: path(), reason: error.into() })?;
        *ours = true;
        Ok(())
    }

    /// Gives the lock up once no write is under way; nothing is written from then on.
    pub fn give_up(&self) {
        let mut ours = self.ours.write();
        if std::mem::take(&mut *ours)
            && let Err(error) = fcntl(self.raw.file(), FcntlArg::F_OFD_SETLK(&whole_file(libc::F_UNLCK)))
        {
            tracing::error!(
                image = %self.path.display(),
                %error,
                "the lock of a shared image stays ours until this node ends"
            );
        }
    }

    /// Does what needs the lock, if that is ours, and keeps it meanwhile.
    pub fn while_ours<T>(&self, what: impl FnOnce() -> T) -> Option<T> {
        let ours = self.ours.read();
        ours.then(what)
    }

    /// Where the image is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn change(&self, change: impl FnOnce() -> io::Result<Stored>) -> io::Result<Stored> {
        self.while_ours(change).unwrap_or_else(|| Err(io::Error::other("the lock of this shared image is not ours")))
    }
}

impl BlockBackend for SharedImage {
    fn bytes(&self) -> u64 {
        self.raw.bytes()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.raw.read(offset, into)
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<Stored> {
        self.change(|| self.raw.write(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        self.raw.flush()
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<Stored> {
        self.change(|| self.raw.discard(offset, bytes))
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> io::Result<Stored> {
        self.change(|| self.raw.write_zeroes(offset, bytes, may_unmap))
    }
}

/// True if `path` is a block device, whose locks reach no other host.
pub fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

/// True if another open file has a lock on `file` with which this one must not be written (or,
/// `read_only`, read).
pub(super) fn is_taken(file: &File, read_only: bool) -> bool {
    let mut lock = whole_file(if read_only { libc::F_RDLCK } else { libc::F_WRLCK });
    // SAFETY: the descriptor belongs to `file` and is open; the call reads and writes `lock`, which
    // lives longer than it.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    // A file system without locks has nobody's.
    asked == 0 && lock.l_type != libc::F_UNLCK as libc::c_short
}

fn whole_file(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("shared.img");
        File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("an image");
        (directory, path)
    }

    #[test]
    fn only_the_holder_of_the_lock_writes() {
        let (_directory, path) = image();
        let [one, other] = [(); 2].map(|()| SharedImage::open(&path).expect("open"));
        assert!(one.write(0, &[1; 512]).is_err(), "nobody has the lock yet");
        one.take().expect("the lock");
        one.take().expect("twice is once");
        assert!(matches!(other.take(), Err(ImageError::InUse { .. })));
        assert_eq!(one.write(0, &[1; 512]).expect("write"), Stored::Accepted);
        assert!(other.write(0, &[2; 512]).is_err() && other.discard(0, 512).is_err());
        assert!(other.write_zeroes(0, 512, true).is_err());
        assert_eq!(other.while_ours(|| ()), None);
        one.give_up();
        assert!(one.write(0, &[3; 512]).is_err());
        other.take().expect("the lock is free");
        other.write(512, &[2; 512]).expect("write");
        drop(other);
        one.take().expect("a closed image has no lock");
        let mut read = [0; 1024];
        one.read(0, &mut read).expect("read");
        assert_eq!((&read[..512], &read[512..]), (&[1; 512][..], &[2; 512][..]));
    }

    #[test]
    fn a_shared_image_in_use_is_nobody_elses() {
        let (_directory, path) = image();
        let shared = SharedImage::open(&path).expect("open");
        drop(RawImage::open(&path, false).expect("it is not in use yet"));
        shared.take().expect("the lock");
        assert!(matches!(RawImage::open(&path, false), Err(ImageError::InUse { .. })));
        assert!(matches!(RawImage::open(&path, true), Err(ImageError::InUse { .. })));
    }
}
