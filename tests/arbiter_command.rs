//! The `command:` arbiter with real scripts: what each way to end means, and that no script can
//! hold a node up.

use mcd::arbiter::command::CommandArbiter;
use mcd::arbiter::{Arbiter, ArbiterError, Swap};
use mcd::protocol::record::Record;
use mcd::protocol::types::{GuestName, InstanceId};
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;

const P: InstanceId = InstanceId(0xaa);
const S: InstanceId = InstanceId(0xbb);

/// Long enough for any script that ends by itself.
const LONG: Duration = Duration::from_secs(30);
/// Long enough for one that does not.
const SHORT: Duration = Duration::from_millis(100);

/// A directory for a script and what it leaves behind.
struct ScriptDirectory {
    directory: TempDir,
}

impl ScriptDirectory {
    fn new() -> ScriptDirectory {
        ScriptDirectory { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn script(&self, body: &str) -> PathBuf {
        let path = self.path("fence");
        // Written by another process: a file that one thread writes while another starts a process
        // cannot be run for a moment.
        let mut install = Command::new("install");
        install.args(["-m", "755", "/dev/stdin"]).arg(&path).stdin(Stdio::piped());
        let mut install = install.spawn().unwrap();
        write!(install.stdin.take().unwrap(), "#!/bin/sh\n{body}\n").unwrap();
        assert!(install.wait().unwrap().success());
        path
    }
}

fn arbiter(script: impl AsRef<Path>, timeout: Duration) -> CommandArbiter {
    CommandArbiter::new(script, &GuestName::new("web").unwrap(), timeout).unwrap()
}

fn pair() -> Record {
    Record::first(P).next_paired(P, S)
}

#[track_caller]
fn unreachable<T: std::fmt::Debug>(result: Result<T, ArbiterError>) -> String {
    let error = result.unwrap_err();
    assert!(matches!(error, ArbiterError::Unreachable { .. }), "{error}");
    let text = error.to_string();
    assert!(!text.contains('\n'), "{text}");
    text
}

#[test]
fn exit_code_0_means_that_the_peer_is_down() {
    let scripts = ScriptDirectory::new();
    let mut arbiter = arbiter(scripts.script("exit 0"), LONG);
    let first = Record::first(P);
    assert_eq!(arbiter.read().unwrap(), None);
    assert_eq!(arbiter.swap(None, &first).unwrap(), Swap::Won);
    assert_eq!(arbiter.swap(Some(&first), &pair()).unwrap(), Swap::Won);
    let alone = pair().next_solo(P);
    assert_eq!(arbiter.swap(Some(&pair()), &alone).unwrap(), Swap::Won);
    assert_eq!(arbiter.read().unwrap(), Some(alone));
    assert_eq!(arbiter.swap(Some(&alone), &alone.next_stopped()).unwrap(), Swap::Won);
}

#[test]
fn exit_code_1_means_that_the_peer_has_the_guest() {
    let scripts = ScriptDirectory::new();
    let script = scripts.script("exit 1");
    // Each is told the record that its peer won.
    let lost_to = |peer| Swap::Lost(Some(pair().next_solo(peer)));
    assert_eq!(arbiter(&script, LONG).swap(Some(&pair()), &pair().next_solo(S)).unwrap(), lost_to(P));
    assert_eq!(arbiter(&script, LONG).swap(Some(&pair()), &pair().next_solo(P)).unwrap(), lost_to(S));
    // A primary that starts is told no more than that.
    let mut starting = arbiter(&script, LONG);
    assert_eq!(starting.swap(None, &Record::first(P)).unwrap(), Swap::Lost(None));
    assert_eq!(starting.read().unwrap(), None);
}

#[test]
fn any_other_exit_code_decides_nothing() {
    let scripts = ScriptDirectory::new();
    let endings = [
        ("echo power switch does not answer >&2; exit 2", "status 2 (power switch does not answer)"),
        ("exit 255", "status 255"),
        ("kill -9 $$", "signal 9"),
        ("printf 'odd \\033[31m \\000 bytes \\377'; exit 3", "status 3 (odd"),
    ];
    for (body, said) in endings {
        let mut arbiter = arbiter(scripts.script(body), LONG);
        let text = unreachable(arbiter.swap(Some(&pair()), &pair().next_solo(S)));
        assert!(text.contains(said) && !text.contains('\u{1b}'), "{body}: {text}");
        assert_eq!(arbiter.read().unwrap(), None);
    }
}

#[test]
fn the_script_gets_the_documented_arguments_and_environment() {
    let scripts = ScriptDirectory::new();
    let seen = scripts.path("seen");
    let script = scripts.script(&format!(
        "echo \"$1 $2 $# $MCD_QUESTION $MCD_GUEST $MCD_GENERATION $MCD_INSTANCE \
            $MCD_PEER $MCD_TIMEOUT_MS $(pwd)\" >> {}; cat",
        seen.display()
    ));
    let (p, s) = (P.to_string(), S.to_string());
    let mut primary = arbiter(&script, LONG);
    assert_eq!(primary.swap(None, &Record::first(P)).unwrap(), Swap::Won);
    assert_eq!(primary.swap(Some(&Record::first(P)), &pair()).unwrap(), Swap::Won);
    assert_eq!(primary.swap(Some(&pair()), &pair().next_solo(P)).unwrap(), Swap::Won);
    assert_eq!(arbiter(&script, LONG).swap(Some(&pair()), &pair().next_solo(S)).unwrap(), Swap::Won);
    let expected = format!(
        "start web 2 start web 1 {p} none 30000 /\nalone web 2 alone web 3 {p} {s} \
            30000 /\ntakeover web 2 takeover web 3 {s} {p} 30000 /\n"
    );
    assert_eq!(fs::read_to_string(seen).unwrap(), expected);
}

#[test]
fn the_script_gets_named_variables_only() {
    let scripts = ScriptDirectory::new();
    let seen = scripts.path("seen");
    let script = scripts.script(&format!("env > {}", seen.display()));
    // The test's own environment has more: what cargo and the shell left in it.
    assert!(std::env::var_os("CARGO_MANIFEST_DIR").is_some());
    assert_eq!(arbiter(&script, LONG).swap(None, &Record::first(P)).unwrap(), Swap::Won);
    let text = fs::read_to_string(seen).unwrap();
    let names: Vec<_> = text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
    // The shell that runs the script adds some of its own.
    let known =
        |name: &&&str| name.starts_with("MCD_") || ["PATH", "HOME", "TZ", "PWD", "OLDPWD", "SHLVL", "_"].contains(name);
    let other: Vec<_> = names.iter().filter(|name| !known(name)).collect();
    assert!(other.is_empty(), "{other:?}");
    assert!(names.contains(&"PATH") && names.contains(&"MCD_PEER"), "{names:?}");
}

#[test]
fn a_script_that_cannot_be_run_is_reported_at_the_start() {
    let scripts = ScriptDirectory::new();
    let missing = scripts.path("missing");
    let plain = scripts.path("plain");
    fs::write(&plain, "#!/bin/sh\nexit 0\n").unwrap();
    let no_format = scripts.script("");
    let bare = scripts.path("bare");
    fs::copy(&no_format, &bare).unwrap();
    let no_interpreter = ScriptDirectory::new();
    let odd = no_interpreter.script("");
    assert!(Command::new("sed").args(["-i", "1s/.*/#!.nowhere/"]).arg(&odd).status().unwrap().success());
    for (path, visible) in
        [(&missing, true), (&plain, true), (&scripts.directory.path().to_owned(), true), (&odd, false)]
    {
        let mut arbiter = arbiter(path, LONG);
        let text = unreachable(arbiter.swap(Some(&pair()), &pair().next_solo(S)));
        assert!(text.contains("cannot be run") && text.contains("executable"), "{text}");
        assert_eq!(arbiter.read().is_err(), visible, "{}", path.display());
    }
    // Nor does a pair form that could not be parted again: that is what the primary reads for.
    let mut arbiter = arbiter(&missing, LONG).with_dead_peer();
    assert_eq!(arbiter.swap(None, &Record::first(P)).unwrap(), Swap::Won);
    let solo = Record::first(P);
    unreachable(arbiter.read());
    unreachable(arbiter.swap(Some(&solo), &solo));
    unreachable(arbiter.swap(Some(&solo), &pair()));
    scripts.script("exit 0");
    fs::rename(scripts.path("fence"), &missing).unwrap();
    assert_eq!(arbiter.read().unwrap(), Some(solo));
    assert_eq!(arbiter.swap(Some(&solo), &solo).unwrap(), Swap::Won);
    assert_eq!(arbiter.swap(Some(&solo), &pair()).unwrap(), Swap::Won);
}

/// True once there is no such process.
fn is_gone(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // A zombie is gone too: whoever inherited it has not looked yet.
    kill(Pid::from_raw(pid.parse().unwrap()), None) == Err(Errno::ESRCH) || stat.contains(") Z ")
}

#[test]
fn a_script_that_times_out_is_killed_with_its_children() {
    let scripts = ScriptDirectory::new();
    let pids = scripts.path("pids");
    let script = scripts.script(&format!(
        "trap '' TERM HUP INT\nsleep 1000 & echo $! >> {0}\n(sleep 1000) & echo $! >> {0}\necho $$ >> {0}\nwait",
        pids.display()
    ));
    let mut arbiter = arbiter(script, Duration::from_secs(2));
    let text = unreachable(arbiter.swap(Some(&pair()), &pair().next_solo(S)));
    assert!(text.contains("within 2000 ms") && text.contains("--arbiter-timeout-ms"), "{text}");
    let pids = fs::read_to_string(pids).unwrap();
    assert_eq!(pids.lines().count(), 3);
    // Killed is killed; only that the kernel has tidied up may take a moment.
    for pid in pids.lines() {
        while !is_gone(pid) {
            std::thread::yield_now();
        }
    }
    assert_eq!(arbiter.read().unwrap(), None);
}

#[test]
fn background_children_of_a_script_are_killed_and_not_waited_for() {
    let scripts = ScriptDirectory::new();
    let left = scripts.path("left");
    // The child keeps the output open, as a careless script's does.
    let script = scripts.script(&format!("sleep 1000 & echo $! > {}; exit 0", left.display()));
    let mut arbiter = arbiter(script, LONG);
    assert_eq!(arbiter.swap(Some(&pair()), &pair().next_solo(S)).unwrap(), Swap::Won);
    let pid = fs::read_to_string(left).unwrap();
    while !is_gone(pid.trim()) {
        std::thread::yield_now();
    }
}

#[test]
fn a_flood_of_output_of_a_script_is_bounded() {
    let scripts = ScriptDirectory::new();
    // 64 MiB: far more than a pipe holds.
    let script = scripts.script("head -c 67108864 /dev/zero; echo; echo the last word; exit 7");
    let text = unreachable(arbiter(script, LONG).swap(Some(&pair()), &pair().next_solo(S)));
    assert!(text.contains("status 7 (the last word)") && text.len() < 500, "{text}");
    // One that never stops is ended all the same.
    let script = scripts.script("exec yes");
    let text = unreachable(arbiter(script, SHORT).swap(Some(&pair()), &pair().next_solo(S)));
    assert!(text.contains("within 100 ms"), "{text}");
    // One that closes its output is not taken for one that ended.
    let script = scripts.script("exec >&- 2>&-; read nothing; exit 0");
    assert_eq!(arbiter(script, LONG).swap(Some(&pair()), &pair().next_solo(S)).unwrap(), Swap::Won);
}

#[test]
fn a_question_is_cancelled_when_the_node_ends() {
    let scripts = ScriptDirectory::new();
    let fifo = scripts.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let script = scripts.script(&format!("echo started > {}\nsleep 1000", fifo.display()));
    let mut arbiter = arbiter(script, Duration::from_secs(600));
    let cancel = arbiter.canceller().unwrap();
    let asking = std::thread::spawn(move || {
        let first = unreachable(arbiter.swap(Some(&pair()), &pair().next_solo(S)));
        // Whatever else is asked then is called off too.
        (first, unreachable(arbiter.swap(Some(&pair()), &pair().next_solo(S))))
    });
    assert_eq!(fs::read_to_string(fifo).unwrap(), "started\n");
    cancel();
    let (first, second) = asking.join().unwrap();
    assert!(first.contains("this node is ending") && second.contains("this node is ending"));
}
