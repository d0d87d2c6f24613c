//! Opening the socket: private to its user from its first moment, and never at the cost of a live
//! one.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;
use socket2::{Domain, SockAddr, Socket, Type};

use super::ControlError;

/// Connections the kernel keeps for us until they are accepted.
const BACKLOG: i32 = 128;

/// Longest path of a unix socket, in bytes.
const PATH_BYTES_MAX: usize = 107;

/// A listening socket and the name it has in the file system; the name goes when this is dropped.
pub(super) struct BoundSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket we made: the name may have become someone else's.
    identity: Option<(u64, u64)>,
}

impl BoundSocket {
    pub(super) fn new(path: &Path) -> Result<BoundSocket, ControlError> {
        if path.as_os_str().len() > PATH_BYTES_MAX {
            return Err(ControlError::PathTooLong { path: path.to_owned() });
        }
        let fail = |action| move |source| ControlError::Io { path: path.to_owned(), action, source };
        // Two starts at once must not take each other's new socket for a stale one.
        make_directory(path).map_err(fail("make its directory"))?;
        let _lock = NameLock::take(path).map_err(fail("lock its name"))?;
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(fail("open a socket"))?;
        let address = SockAddr::unix(path).map_err(fail("use its path"))?;
        socket.bind(&address).map_err(fail("bind"))?;
        // Nobody can connect before listen(), so the mode holds from the first connection on.
        let metadata =
            fs::set_permissions(path, Permissions::from_mode(0o600)).and_then(|()| fs::symlink_metadata(path));
        let identity = metadata.map_err(fail("set its mode"))?;
        socket.listen(BACKLOG).map_err(fail("listen"))?;
        socket.set_nonblocking(true).map_err(fail("listen"))?;
        Ok(BoundSocket {
            listener: UnixListener::from(OwnedFd::from(socket)),
            path: path.to_owned(),
            identity: Some((identity.dev(), identity.ino())),
        })
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let Ok(_lock) = NameLock::take(&self.path) else { return };
        let now = fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if now.is_some() && now == self.identity {
            // Nothing is lost if this fails: the next start takes it for stale.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the socket's directory if there is none, for this user only.
fn make_directory(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => DirBuilder::new().recursive(true).mode(0o700).create(parent),
        _ => Ok(()),
    }
}

/// The right to make or remove the socket of a name, until it is dropped. It is the lock of a file
/// beside the socket that only this user can open: whoever could read a directory could lock that.
struct NameLock {
    path: PathBuf,
    _file: Flock<File>,
}

impl NameLock {
    fn take(socket: &Path) -> io::Result<NameLock> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        loop {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let file = options.open(&path)?;
            let ours = file.metadata()?;
            if ours.uid() != geteuid().as_raw() || ours.mode() & 0o077 != 0 {
                return Err(io::Error::other(format!(
                    "{} can be opened by other users, who could hold it: remove it, or name a directory of your own",
                    path.display()
                )));
            }
            let file = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io::Error::from(errno))?;
            // Whoever had the lock before may have removed the file with it.
            let there = fs::symlink_metadata(&path).ok().map(|there| (there.dev(), there.ino()));
            if there == Some((ours.dev(), ours.ino())) {
                return Ok(NameLock { path, _file: file });
            }
        }
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        // Left behind it does no harm: the next start takes its lock.
        let _ = fs::remove_file(&self.path);
    }
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path) -> Result<(), ControlError> {
    let fail = |action| move |source| ControlError::Io { path: path.to_owned(), action, source };
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(fail("look at it")(e)),
    };
    if !metadata.file_type().is_socket() {
        return Err(ControlError::NotASocket { path: path.to_owned() });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ControlError::InUse { path: path.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::info!(path = %path.display(), "removing the socket of a process that is gone");
            fs::remove_file(path).map_err(fail("remove the stale socket"))
        }
        Err(e) => Err(fail("find out who listens")(e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deeper/mcd.sock");
        let bound = BoundSocket::new(&path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert!(matches!(BoundSocket::new(&path), Err(ControlError::InUse { .. })));
        drop(bound);
        assert_eq!(fs::read_dir(dir.path().join("deeper")).unwrap().count(), 0, "nothing is left behind");
        assert_eq!(fs::metadata(dir.path().join("deeper")).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_lock_that_other_users_can_hold_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mcd.sock");
        // Whoever can read a directory can lock it.
        let _theirs = Flock::lock(File::open(dir.path()).unwrap(), FlockArg::LockExclusive).unwrap();
        let (done, bound) = std::sync::mpsc::channel();
        let bind = |path: PathBuf| {
            let done = done.clone();
            std::thread::spawn(move || done.send(BoundSocket::new(&path).map(drop)));
            bound.recv_timeout(std::time::Duration::from_secs(60)).expect("it does not wait for the lock")
        };
        bind(path.clone()).unwrap();
        // A file that others can open is not trusted, and a link is not followed.
        let lock = dir.path().join("mcd.sock.lock");
        fs::write(&lock, "").unwrap();
        fs::set_permissions(&lock, Permissions::from_mode(0o644)).unwrap();
        let error = bind(path.clone()).unwrap_err().to_string();
        assert!(error.contains("mcd.sock.lock can be opened by other users"), "{error}");
        fs::remove_file(&lock).unwrap();
        std::os::unix::fs::symlink(dir.path().join("victim"), &lock).unwrap();
        assert!(bind(path).is_err() && !dir.path().join("victim").exists());
    }

    #[test]
    fn two_starts_at_once_get_one_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mcd.sock");
        for _ in 0..20 {
            Socket::new(Domain::UNIX, Type::STREAM, None).unwrap().bind(&SockAddr::unix(&path).unwrap()).unwrap();
            let starts: Vec<_> = (0..8)
                .map(|_| {
                    std::thread::spawn({
                        let path = path.clone();
                        move || BoundSocket::new(&path).ok()
                    })
                })
                .collect();
            let bound: Vec<_> = starts.into_iter().filter_map(|start| start.join().unwrap()).collect();
            assert_eq!(bound.len(), 1);
        }
    }

    #[test]
    fn a_stale_socket_is_taken_over_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mcd.sock");
        // Never listened on: a test that forks at this moment cannot keep it alive, as it could a
        // dropped listener.
        Socket::new(Domain::UNIX, Type::STREAM, None).unwrap().bind(&SockAddr::unix(&path).unwrap()).unwrap();
        assert!(path.exists());
        drop(BoundSocket::new(&path).unwrap());
        fs::write(&path, "precious").unwrap();
        assert!(matches!(BoundSocket::new(&path), Err(ControlError::NotASocket { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn another_socket_under_our_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mcd.sock");
        let ours = BoundSocket::new(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _theirs = UnixListener::bind(&path).unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn a_path_too_long_is_said() {
        let path = Path::new("/").join("x".repeat(200));
        assert!(matches!(BoundSocket::new(&path), Err(ControlError::PathTooLong { .. })));
    }
}
