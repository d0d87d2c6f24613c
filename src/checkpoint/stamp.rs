//! The stamp beside a disk image: whose it is, how new, and whether it can be started from.
//!
//! A few lines of text in `IMAGE.mcd`. It is written whole, synced and renamed into place, so that
//! a reader sees the old one or the new one.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use thiserror::Error;

use super::snapshot::SnapshotId;
use crate::protocol::stamp::check_start_from;
pub use crate::protocol::stamp::{StampRefusal, StampState};
use crate::protocol::types::{EpochId, Generation, GuestName};

/// The first line: what this is, and the version of its form.
const TITLE: &str = "mcd disk stamp 1";
/// No stamp is longer.
const TEXT_BYTES_MAX: u64 = 1024;

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The guest it belongs to.
    pub guest: GuestName,
    /// The epoch it was at when the stamp was written; it may be ahead of it.
    pub at: EpochId,
    /// What it is good for.
    pub state: StampState,
    /// When the stamp was written, in seconds since 1970; for people only.
    pub written_s: u64,
    /// The guest's disk has so many bytes and its device here more; `None`: as many as the image.
    pub disk_bytes: Option<u64>,
    /// The snapshot that was taken as the guest stopped: the image is of its very moment.
    pub snapshot: Option<SnapshotId>,
}

/// Why a stamp cannot be read or written.
#[derive(Debug, Error)]
pub enum StampError {
    /// The system refused.
    #[error("cannot {doing} {}, the stamp of a disk image ({reason}): \
        the directory must be writable and have room", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The stamp.
        path: PathBuf,
        /// What the system said.
        reason: io::Error,
    },
    /// It is not one.
    #[error("{} is no stamp of a disk image ({what}): look what wrote it, \
        and remove it if the image is as it should be", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// Where the stamp of `image` is.
pub fn stamp_path(image: &Path) -> PathBuf {
    let mut path = image.as_os_str().to_owned();
    path.push(".mcd");
    path.into()
}

impl Stamp {
    /// A stamp that is written now.
    pub fn now(guest: &GuestName, at: EpochId, state: StampState) -> Stamp {
        let written_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Stamp { guest: guest.clone(), at, state, written_s, disk_bytes: None, snapshot: None }
    }

    /// The stamp of `image`; `None` if it has none.
    ///
    /// # Errors
    /// [`StampError`].
    pub fn read(image: &Path) -> Result<Option<Stamp>, StampError> {
        let path = stamp_path(image);
        let failed = |reason| StampError::Io { doing: "read", path: path.clone(), reason };
        // Neither is a link followed nor a pipe waited for.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut bytes = Vec::new();
        file.take(TEXT_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
        Stamp::parse(&bytes).map(Some).map_err(|what| StampError::Malformed { path, what })
    }

    /// Makes this the stamp of `image`; it outlives a loss of power.
    ///
    /// # Errors
    /// [`StampError::Io`]; the stamp is then the old one or this one.
    pub fn write(&self, image: &Path) -> Result<(), StampError> {
        let path = stamp_path(image);
        let mut temporary = path.clone().into_os_string();
        temporary.push(".new");
        let failed = |doing| {
            let path = path.clone();
            move |reason| StampError::Io { doing, path, reason }
        };
        // What a crash left there goes, and no link that lies there leads anywhere.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("create")(error)),
            _ => {}
        }
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary).map_err(failed("create"))?;
        file.write_all(self.to_string().as_bytes()).map_err(failed("write"))?;
        file.sync_all().map_err(failed("sync"))?;
        fs::rename(&temporary, &path).map_err(failed("replace"))?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed("sync"))
    }

    fn parse(bytes: &[u8]) -> Result<Stamp, &'static str> {
        let text = std::str::from_utf8(bytes).map_err(|_| "it is not text")?;
        let mut lines = text.lines();
        if lines.next() != Some(TITLE) {
            return Err("it does not begin as one");
        }
        let mut field = |name| {
            let line = lines.next().ok_or("a line is missing")?;
            line.strip_prefix(name).and_then(|rest| rest.strip_prefix(' ')).ok_or("a line is not what it should be")
        };
        let number = |text: &str| text.parse::<u64>().map_err(|_| "a number is none");
        let guest = GuestName::new(field("guest")?).ok_or("the guest's name is none")?;
        let (generation, epoch) = (Generation(number(field("generation")?)?), number(field("epoch")?)?);
        let word = field("state")?;
        let state = StampState::ALL.into_iter().find(|state| state.word() == word).ok_or("its state is unknown")?;
        let written_s = number(field("written")?)?;
        let (mut disk_bytes, mut snapshot) = (None, None);
        for line in lines {
            match line.split_once(' ') {
                Some(("bytes", bytes)) if disk_bytes.is_none() => disk_bytes = Some(number(bytes)?),
                Some(("snapshot", id)) if snapshot.is_none() => {
                    snapshot = Some(SnapshotId::parse(id).ok_or("the name of its snapshot is none")?);
                }
                _ => return Err("the line behind its last is none of a stamp's"),
            }
        }
        Ok(Stamp { guest, at: EpochId { generation, epoch }, state, written_s, disk_bytes, snapshot })
    }

    /// Whether `guest` may start from the image, when `newest` is the newest generation on record,
    /// if there is a record.
    ///
    /// # Errors
    /// [`StampRefusal`]: see [`check_start_from`].
    pub fn may_start(&self, guest: &GuestName, newest: Option<Generation>) -> Result<(), StampRefusal> {
        check_start_from((&self.guest, self.at, self.state), guest, newest)
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { guest, at, state, written_s, disk_bytes, snapshot } = self;
        let EpochId { generation: Generation(generation), epoch } = at;
        writeln!(
            f,
            "{TITLE}\nguest {guest}\ngeneration {generation}\nepoch {epoch}\nstate {state}\nwritten {written_s}"
        )?;
        disk_bytes.map_or(Ok(()), |bytes| writeln!(f, "bytes {bytes}"))?;
        snapshot.map_or(Ok(()), |id| writeln!(f, "snapshot {id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(generation: u64, state: StampState) -> Stamp {
        let at = EpochId { generation: Generation(generation), epoch: 12 };
        Stamp {
            guest: GuestName::new("web").expect("a name"),
            at,
            state,
            written_s: 5,
            disk_bytes: None,
            snapshot: None,
        }
    }

    #[test]
    fn stamps_survive_a_file_and_nothing_else_is_one() {
        let directory = tempfile::tempdir().expect("directory");
        let image = directory.path().join("disk.img");
        assert_eq!(Stamp::read(&image).expect("none"), None);
        for state in StampState::ALL {
            stamp(7, state).write(&image).expect("write");
            assert_eq!(Stamp::read(&image).expect("read"), Some(stamp(7, state)));
        }
        let of_a_snapshot = Stamp { snapshot: Some(SnapshotId(77)), ..stamp(7, StampState::Whole) };
        of_a_snapshot.write(&image).expect("write");
        assert_eq!(Stamp::read(&image).expect("read"), Some(of_a_snapshot));
        let of_a_device =
            Stamp { disk_bytes: Some(8 << 20), snapshot: Some(SnapshotId(77)), ..stamp(7, StampState::Whole) };
        of_a_device.write(&image).expect("write");
        assert_eq!(Stamp::read(&image).expect("read"), Some(of_a_device));
        let names: Vec<_> = fs::read_dir(&directory).expect("list").flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(names, ["disk.img.mcd"]);
        let good = stamp(7, StampState::Whole).to_string();
        let bad = [
            String::new(),
            "mcd disk stamp 2\n".to_owned() + &good,
            good.replace("epoch 12", "epoch x"),
            good.replace("state whole", "state so-so"),
            good.replace("guest web", "guest a b"),
            good.replace("written 5\n", ""),
            good.clone() + "snapshot 12\n",
            good.clone() + "bytes 12\nbytes 12\n",
            good.clone() + "bytes many\n",
            good.clone() + "colour red\n",
        ];
        for text in bad {
            fs::write(stamp_path(&image), &text).expect("write");
            let error = Stamp::read(&image).expect_err("no stamp").to_string();
            assert!(error.contains("disk.img.mcd is no stamp") && !error.contains('\n'), "{error}");
        }
        let error =
            stamp(1, StampState::Whole).write(&directory.path().join("none/disk.img")).expect_err("no directory");
        assert!(error.to_string().contains("cannot create"), "{error}");
    }

    #[test]
    fn a_stamp_is_private_and_written_through_no_link() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let directory = tempfile::tempdir().expect("directory");
        let path = |name: &str| directory.path().join(name);
        fs::write(path("victim"), "precious").expect("write");
        // What a crash left, or somebody else put there: a link, and a file that others may write.
        symlink(path("victim"), path("disk.img.mcd.new")).expect("link");
        stamp(7, StampState::Whole).write(&path("disk.img")).expect("write");
        fs::write(path("disk.img.mcd.new"), "half").expect("write");
        fs::set_permissions(path("disk.img.mcd.new"), fs::Permissions::from_mode(0o666)).expect("mode");
        stamp(8, StampState::Whole).write(&path("disk.img")).expect("write");
        assert_eq!(fs::read_to_string(path("victim")).expect("read"), "precious");
        let metadata = fs::symlink_metadata(path("disk.img.mcd")).expect("a stamp");
        assert!(metadata.is_file());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        // Nor is one read through a link.
        symlink(path("disk.img.mcd"), path("other.img.mcd")).expect("link");
        assert!(Stamp::read(&path("other.img")).expect_err("a link").to_string().contains("cannot read"));
    }

    #[test]
    fn only_the_guests_own_newest_whole_image_may_be_started_from() {
        let [web, db] = ["web", "db"].map(|name| GuestName::new(name).expect("a name"));
        let may = |stamp: Stamp, guest, newest| stamp.may_start(guest, newest);
        let of = Generation;
        assert_eq!(may(stamp(7, StampState::Whole), &web, Some(of(7))), Ok(()));
        assert_eq!(may(stamp(7, StampState::Whole), &web, None), Ok(()));
        assert_eq!(may(stamp(7, StampState::Whole), &web, Some(of(6))), Ok(()));
        assert_eq!(may(stamp(7, StampState::Whole), &db, Some(of(7))), Err(StampRefusal::OtherGuest(web.clone())));
        assert!(matches!(may(stamp(7, StampState::Whole), &web, Some(of(8))), Err(StampRefusal::Old { .. })));
        assert!(matches!(may(stamp(7, StampState::Filling), &web, None), Err(StampRefusal::Filling(_))));
        assert!(matches!(may(stamp(7, StampState::Applying), &web, Some(of(7))), Err(StampRefusal::Applying(_))));
        assert!(matches!(may(stamp(7, StampState::Applying), &web, Some(of(9))), Err(StampRefusal::Old { .. })));
    }
}
