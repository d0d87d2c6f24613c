//! `mcd status`: one question to a node, one screen.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::args::StatusArgs;
use super::config;
use super::exit::Failure;
use crate::control::{Client, ClientError, is_listening};

/// Asks and prints.
pub(super) fn run(args: &StatusArgs) -> Result<(), Failure> {
    let path = match (&args.control, &args.guest) {
        (Some(path), _) => path.clone(),
        (None, Some(guest)) => config::default_control(guest)?,
        (None, None) => only_socket()?,
    };
    let text =
        ask(&path, Duration::from_millis(args.timeout_ms), args.json).map_err(|e| Failure::run(e.to_string()))?;
    match io::stdout().write_all(text.as_bytes()) {
        // The reader, such as `head`, has seen enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written.map_err(|e| Failure::run(format!("the status could not be printed: {e}"))),
    }
}

fn ask(path: &Path, timeout: Duration, json: bool) -> Result<String, ClientError> {
    let mut client = Client::connect(path, timeout)?;
    if json {
        // As the node sent it, with what this build may not know.
        let answer = client.execute("mc-query", Value::Null, timeout)?;
        return Ok(format!("{answer:#}\n"));
    }
    Ok(client.status(timeout)?.to_string())
}

/// The one control socket there is by default, if there is one.
fn only_socket() -> Result<PathBuf, Failure> {
    let ask = "give --guest NAME or --control PATH";
    let directory = config::control_directory()
        .ok_or_else(|| Failure::usage(format!("which node? {ask} (XDG_RUNTIME_DIR is not set)")))?;
    the_one_in(&directory)
}

/// The one control socket in a directory at which a node listens.
fn the_one_in(directory: &Path) -> Result<PathBuf, Failure> {
    let ask = "give --guest NAME or --control PATH";
    let (alive, dead): (Vec<_>, Vec<_>) = control_sockets(directory).into_iter().partition(|path| is_listening(path));
    match alive.as_slice() {
        [] if !dead.is_empty() => {
            let names: Vec<_> = dead.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
            Err(Failure::run(format!(
                "no node runs: the control sockets in {} were left by nodes that died ({}); see their logs, or {ask}",
                directory.display(),
                names.join(", ")
            )))
        }
        [] => Err(Failure::run(format!("no node has its control socket in {}; {ask}", directory.display()))),
        [path] => Ok(path.clone()),
        several => {
            let names: Vec<_> = several.iter().filter_map(|path| path.file_stem()?.to_str()).collect();
            Err(Failure::usage(format!("which of {}? {ask}", names.join(", "))))
        }
    }
}

/// The control sockets in a directory, where consoles' sockets may lie beside them.
fn control_sockets(directory: &Path) -> Vec<PathBuf> {
    let mut sockets: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_socket()))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == config::CONTROL_EXTENSION))
        .collect();
    sockets.sort();
    sockets
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_console_beside_it_is_no_node() {
        let directory = tempfile::tempdir().expect("directory");
        let control = directory.path().join("web.sock");
        let sockets = [control.clone(), config::console_beside(&control)];
        let _listeners = sockets.map(|path| UnixListener::bind(path).expect("listen"));
        fs::write(directory.path().join("old.sock"), "no socket").expect("write");
        assert_eq!(control_sockets(directory.path()), [control]);
    }

    #[test]
    fn a_guest_whose_node_died_is_not_offered() {
        let directory = tempfile::tempdir().expect("directory");
        let path = |name: &str| directory.path().join(format!("{name}.sock"));
        // Bound and never listened on: what a process that was killed leaves.
        let dead = |name: &str| {
            let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).expect("socket");
            socket.bind(&socket2::SockAddr::unix(path(name)).expect("path")).expect("bind");
        };
        let text = |directory: &Path| the_one_in(directory).expect_err("none").line;
        assert!(text(directory.path()).contains("no node has its control socket in"));
        dead("old");
        let line = text(directory.path());
        assert!(line.contains("no node runs") && line.contains("(old)") && !line.contains("which of"), "{line}");
        let _web = UnixListener::bind(path("web")).expect("listen");
        assert_eq!(the_one_in(directory.path()).ok(), Some(path("web")));
        let _mail = UnixListener::bind(path("mail")).expect("listen");
        assert!(text(directory.path()).contains("which of mail, web?"));
    }
}
