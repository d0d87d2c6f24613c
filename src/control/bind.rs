//! Opening the socket: private to its user from its first moment, and never at the cost of a live
//! one.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
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
        let _lock = lock_directory(path).map_err(fail("open its directory"))?;
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
        let Ok(_lock) = lock_directory(&self.path) else { return };
        let now = fs::symlink_metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if now.is_some() && now == self.identity {
            // Nothing is lost if this fails: the next start takes it for stale.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes the socket's directory if there is none, and locks it until the answer is dropped.
fn lock_directory(path: &Path) -> io::Result<Flock<File>> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
    Flock::lock(File::open(directory)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
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
        assert!(!path.exists());
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
