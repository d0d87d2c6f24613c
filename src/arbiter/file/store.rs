//! The files of one guest's record, and what is done with them. Everything here blocks as long as
//! the storage does.

use super::super::text;
use super::super::{ArbiterError, Swap};
use crate::protocol::record::Record;
use crate::protocol::types::GuestName;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where a guest's record lives.
pub(super) struct Store {
    directory: PathBuf,
    guest: GuestName,
    record: PathBuf,
    temporary: PathBuf,
    lock: PathBuf,
}

impl Store {
    pub(super) fn new(directory: &Path, guest: &GuestName) -> Store {
        Store {
            directory: directory.to_owned(),
            guest: guest.clone(),
            record: directory.join(format!("{guest}.record")),
            temporary: directory.join(format!("{guest}.record.new")),
            lock: directory.join(format!("{guest}.lock")),
        }
    }

    pub(super) fn record_path(&self) -> &Path {
        &self.record
    }

    pub(super) fn lock_path(&self) -> &Path {
        &self.lock
    }

    /// The current record. Needs no lock, because a rename shows the old file or the new one,
    /// whole.
    pub(super) fn read(&self) -> Result<Option<Record>, ArbiterError> {
        let file = match File::open(&self.record) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return self.missing(),
            Err(error) => return Err(self.failed("open", &self.record, error)),
        };
        let mut bytes = Vec::with_capacity(text::TEXT_BYTES_MAX);
        // One byte more than allowed shows a file that is too long.
        let most = text::TEXT_BYTES_MAX as u64 + 1;
        file.take(most).read_to_end(&mut bytes).map_err(|error| self.failed("read", &self.record, error))?;
        let record = text::read(&self.guest, &bytes);
        record.map(Some).map_err(|what| ArbiterError::Corrupt { record: self.record.display().to_string(), what })
    }

    /// No record in a directory that is there; a directory that is not there is not an empty one.
    fn missing(&self) -> Result<Option<Record>, ArbiterError> {
        match std::fs::metadata(&self.directory) {
            Ok(_) => Ok(None),
            Err(error) => Err(self.failed("find", &self.directory, error)),
        }
    }

    /// Puts `new` in place of `expected` under the lock. Past `deadline` nothing is changed: the
    /// node that asked has gone on in the belief that nobody knows the outcome, and the sooner that
    /// is settled the better.
    pub(super) fn swap(
        &self,
        expected: Option<&Record>,
        new: &Record,
        deadline: Instant,
    ) -> Result<Swap, ArbiterError> {
        let _locked = self.lock()?;
        let current = self.read()?;
        if current.as_ref() != expected {
            return Ok(Swap::Lost(current));
        }
        self.write_temporary(new).inspect_err(|_| self.remove_temporary())?;
        if Instant::now() >= deadline {
            self.remove_temporary();
            return Err(ArbiterError::Unreachable {
                arbiter: format!("file:{}", self.directory.display()),
                why: "the storage answered too late, and nothing was changed".to_owned(),
            });
        }
        std::fs::rename(&self.temporary, &self.record).map_err(|error| self.failed("replace", &self.record, error))?;
        self.sync_directory()?;
        Ok(Swap::Won)
    }

    /// The lock, held until the file is dropped. An open-file-description lock, so that two threads
    /// of one process exclude each other too.
    fn lock(&self) -> Result<File, ArbiterError> {
        // Whoever may read the file could hold the lock against both nodes.
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&self.lock).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.failed("find", &self.directory, error),
            _ => self.failed("open", &self.lock, error),
        })?;
        let whole_file = libc::flock {
            l_type: libc::F_WRLCK as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        loop {
            match fcntl(&file, FcntlArg::F_OFD_SETLKW(&whole_file)) {
                Ok(_) => return Ok(file),
                Err(Errno::EINTR) => {}
                Err(error @ (Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS)) => {
                    return Err(ArbiterError::NoLocks { path: self.directory.clone(), source: error.into() });
                }
                Err(error) => return Err(self.failed("lock", &self.lock, error.into())),
            }
        }
    }

    fn write_temporary(&self, new: &Record) -> Result<(), ArbiterError> {
        let failed = |error| self.failed("write", &self.temporary, error);
        // What a crash left there goes, and no link that lies there leads anywhere.
        self.remove_temporary();
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(&self.temporary).map_err(failed)?;
        file.write_all(text::write(&self.guest, new).as_bytes()).map_err(failed)?;
        file.sync_all().map_err(failed)
    }

    fn remove_temporary(&self) {
        // Left behind it does no harm: the next swap overwrites it.
        let _ = std::fs::remove_file(&self.temporary);
    }

    fn sync_directory(&self) -> Result<(), ArbiterError> {
        let synced = File::open(&self.directory).and_then(|directory| directory.sync_all());
        // Even for lack of space: the new record is in place by now, so the answer must not be
        // that the old one is current.
        synced.map_err(|source| ArbiterError::Io { doing: "sync", path: self.directory.clone(), source })
    }

    fn failed(&self, doing: &'static str, path: &Path, source: io::Error) -> ArbiterError {
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC | Errno::EDQUOT) => ArbiterError::Full { path: self.record.clone() },
            Some(Errno::ENOENT) if path == self.directory => ArbiterError::NoDirectory { path: path.to_owned() },
            _ => ArbiterError::Io { doing, path: path.to_owned(), source },
        }
    }
}
