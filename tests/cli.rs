//! What `mcd` says to what it cannot do: one clear line on stderr, the right exit code, nothing
//! started, no panic.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

const OK: i32 = 0;
const FAILURE: i32 = 1;
const USAGE: i32 = 2;
const HOST: i32 = 3;

fn mcd(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_mcd"))
        .args(arguments)
        .env("XDG_RUNTIME_DIR", "/nonexistent")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap()
}

/// Runs `mcd`, which must fail with `code` and one line that holds all of `parts`.
#[track_caller]
fn refused(arguments: &[&str], code: i32, parts: &[&str]) {
    let output = mcd(arguments);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{arguments:?}");
    let line = said.strip_suffix('\n').unwrap();
    assert!(line.starts_with("mcd: ") && !line.contains('\n'), "{arguments:?}: not one line: {said}");
    assert!(!line.contains("panicked"), "{arguments:?}: {said}");
    for part in parts {
        assert!(line.contains(part), "{arguments:?}: `{part}` is missing in: {line}");
    }
}

/// `good` without the flags that are in `more`, and `more`.
fn with<'a>(good: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    let name = |flag: &str| flag.split('=').next().map(str::to_owned);
    let kept = good.iter().filter(|flag| !more.iter().any(|other| name(other) == name(flag)));
    kept.chain(more).copied().collect()
}

/// A primary with nothing wrong, but for what `more` adds or changes.
#[track_caller]
fn bad_primary(more: &[&str], parts: &[&str]) {
    let good = ["primary", "--guest=web", "--tap=no-such-tap", "--guest-ip=10.0.0.2/24", "--arbiter=file:/nonexistent"];
    refused(&with(&[&good[..], &["--control=/nonexistent/s"]].concat(), more), USAGE, parts);
}

/// A secondary with nothing wrong, but for what `more` adds or changes.
#[track_caller]
fn bad_secondary(more: &[&str], parts: &[&str]) {
    let good =
        ["secondary", "--guest=web", "--tap=no-such-tap", "--arbiter=file:/nonexistent", "--peer=192.0.2.1:7401"];
    refused(&with(&[&good[..], &["--control=/nonexistent/s"]].concat(), more), USAGE, parts);
}

/// A primary whose configuration file holds `text`.
#[track_caller]
fn bad_file(command: &str, text: &[u8], parts: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcd.toml");
    fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    refused(&[command, "--config", path], USAGE, &[&["config file", path], parts].concat());
}

#[test]
fn help_is_no_error_and_names_every_exit_code() {
    for arguments in [&["--help"][..], &["help"], &["primary", "--help"], &["demo", "-h"], &["help", "secondary"]] {
        let output = mcd(arguments);
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(OK), "{arguments:?}");
        assert_eq!(output.stderr, b"", "{arguments:?}");
        assert!(text.contains("Exit codes:") && text.contains("fenced itself"), "{arguments:?}: {text}");
    }
    assert_eq!(mcd(&["--version"]).stdout, concat!("mcd ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
}

#[test]
fn disks_in_flags_and_in_files() {
    bad_primary(&["--disk=/a,rw"], &["--disk", "`rw` is not known", "serial=TEXT"]);
    bad_primary(&["--disk="], &["--disk"]);
    bad_primary(&["--disk=/a"; 7], &["--disk is given 7 times", "at most 6"]);
    refused(&["disk", "verify", "/nonexistent/a"], USAGE, &["2 values required", "[IMAGE]"]);
    refused(&["disk", "verify", "/a", "/b", "--guest=web"], USAGE, &["cannot be used with"]);
    refused(&["disk", "verify", "--control=/nonexistent/s"], USAGE, &["/nonexistent/s"]);
    refused(&["disk", "verify", "/nonexistent/a", "/nonexistent/b"], USAGE, &["there is no disk image /nonexistent/a"]);
    bad_file("primary", b"disk = 3.5\n", &["`disk`", "must be a string"]);
    bad_file("primary", b"disk = [\"/a\", \"/b,what\"]\n", &["`what` is not known"]);
    bad_file("primary", b"force-disk = true\n", &["`force-disk`", "only taken on the command line"]);
    bad_file("primary", b"tap = [\"a\"]\n", &["`tap`", "must be a string"]);
    // A list in a file is as many flags, and flags on the command line take its place.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcd.toml");
    fs::write(&path, format!("guest = \"web\"\ntap = \"no-such-tap\"\ndisk = {:?}\n", ["/a"; 7])).unwrap();
    let path = path.to_str().unwrap();
    refused(&["primary", "--config", path], USAGE, &["--disk is given 7 times"]);
    refused(&["primary", "--config", path, "--disk=/b"], USAGE, &["--arbiter"]);
    refused(&["primary", "--config", path, "--disk", "/b"], USAGE, &["--arbiter"]);
}

#[test]
fn commands_and_flags_that_do_not_exist() {
    refused(&[], USAGE, &["which command?", "primary", "--help"]);
    refused(&["frobnicate"], USAGE, &["unrecognized subcommand 'frobnicate'"]);
    refused(&["primray"], USAGE, &["'primray'", "'primary'"]);
    refused(&["primary", "--intervall-ms=3"], USAGE, &["'--intervall-ms'", "'--interval-ms'"]);
    refused(&["primary", "stray"], USAGE, &["unexpected argument 'stray'"]);
    refused(&["primary", "--guest"], USAGE, &["a value is required for '--guest <NAME>'"]);
    // What belongs to the other role.
    refused(&["secondary", "--memory=1G"], USAGE, &["unexpected argument '--memory'"]);
    refused(&["primary", "--peer=10.0.0.1:1"], USAGE, &["unexpected argument '--peer'"]);
}

/// The words that a flag of a command takes, as its help shows them; and whether it may be
/// repeated.
fn flags_of(command: &str) -> Vec<(String, bool)> {
    let help = String::from_utf8(mcd(&[command, "--help"]).stdout).unwrap();
    // The text about a flag is indented further, and may begin with another flag's name.
    let lines = help
        .lines()
        .take_while(|line| !line.starts_with("Example"))
        .filter_map(|line| line.strip_prefix("      "))
        .filter(|line| line.starts_with("--"));
    let flag = |line: &str| line.split([' ', '=']).next().map(|flag| (flag.to_owned(), line.contains('<')));
    lines.filter_map(flag).collect()
}

#[test]
fn every_flag_that_makes_sense_once_is_taken_once() {
    let value = |flag: &str| match flag {
        "--guest-ip" => "10.0.0.2/24",
        "--guest-gateway" => "10.0.0.1",
        "--mac" => "02:00:00:00:00:01",
        "--rng" | "--commit-on-output" => "true",
        "--cpu" => "host",
        "--guest-clock" => "correct",
        "--compress" => "auto",
        "--log" => "info",
        "--log-format" => "human",
        "--console" => "none",
        "--on-peer-loss" => "wait",
        "--arbiter" => "file:/x",
        "--dirty" => "1,100",
        "--cpus" | "--connections" => "2",
        flag if flag.contains("listen") || flag.starts_with("--peer") => "10.0.0.1:7401",
        "--memory" | "--staging-max" | "--output-max-bytes" => "64M",
        _ => "500",
    };
    for command in ["primary", "secondary", "cold-start", "demo", "status", "console"] {
        let flags = flags_of(command);
        assert!(flags.len() >= 2, "{command}: {flags:?}");
        for (flag, has_value) in flags.iter().filter(|(flag, _)| !matches!(flag.as_str(), "--disk" | "--help")) {
            let one = if *has_value { format!("{flag}={}", value(flag)) } else { flag.clone() };
            refused(&[command, &one, &one], USAGE, &[flag, "cannot be used multiple times"]);
        }
    }
    // A flag still wins over its key in a file, however it is written.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcd.toml");
    fs::write(&path, "guest = \"web\"\ntap = \"tap-of-file\"\ninterval-ms = 7\n").unwrap();
    let path = path.to_str().unwrap();
    let start = ["primary", "--config", path, "--tap", "t", "--interval-ms=1", "--interval-min-us=5000"];
    refused(&start, USAGE, &["--interval-min-us 5000 is more than --interval-ms 1:"]);
    bad_primary(&["--disk=/a", "--disk=/b", "--disk=/a,ro"], &["--disk /a is given twice"]);
    bad_primary(&["--disk=/a,serial=b,serial=c"], &["`serial` is given twice"]);
}

#[test]
fn what_is_missing_is_named() {
    refused(&["primary"], USAGE, &["--guest NAME is missing"]);
    refused(&["primary", "--guest=a"], USAGE, &["--tap NAME is missing"]);
    let start = ["primary", "--guest=a", "--tap=t", "--control=/nonexistent/s"];
    refused(&start, USAGE, &["--arbiter WHO is missing", "file:/DIRECTORY", "etcd:", "command:", "--on-peer-loss"]);
    refused(&[&start[..], &["--arbiter=file:/x"]].concat(), USAGE, &["--guest-ip IP/BITS is missing", "10.0.0.2/24"]);
    let start = ["secondary", "--guest=a", "--tap=t", "--control=/nonexistent/s", "--arbiter=file:/x"];
    refused(&start, USAGE, &["--peer IP:PORT is missing", "--listen"]);
    refused(&["cold-start", "--guest=a"], USAGE, &["--i-know-both-nodes-are-dead"]);
}

#[test]
fn bad_values() {
    bad_primary(&["--guest=a/b"], &["'a/b' for '--guest <NAME>'", "1 to 64 letters"]);
    bad_primary(&["--tap=sixteen-chars-xx"], &["--tap <NAME>", "1 to 15 characters"]);
    bad_primary(&["--guest-ip=10.0.0.2"], &["--guest-ip", "write ADDRESS/BITS"]);
    bad_primary(&["--guest-ip=10.0.0.0/24"], &["10.0.0.0 is not a host's address"]);
    bad_primary(&["--guest-ip=10.0.0.2/33"], &["1 to 32 bits"]);
    bad_primary(&["--guest-ip=10.0.0.2/31", "--guest-gateway=10.0.0.4"], &["not in the guest's network 10.0.0.2/31"]);
    bad_primary(&["--memory=lots"], &["--memory <SIZE>", "such as 512M"]);
    bad_primary(&["--memory=1.5G"], &["write a whole number"]);
    bad_primary(&["--memory=128MB"], &["K, M, G or T"]);
    bad_primary(&["--memory=99999999999T"], &["--memory <SIZE>"]);
    bad_primary(&["--memory=1M"], &["--memory 1M", "from 16M"]);
    bad_primary(&["--memory=134217729"], &["--memory 134217729", "multiple of 4K"]);
    bad_primary(&["--cpus=0"], &["--cpus <N>", "1..=32"]);
    bad_primary(&["--cpus=-1"], &["--cpus"]);
    bad_primary(&["--mac=ff:ff:ff:ff:ff:ff"], &["names a group"]);
    bad_primary(&["--listen=localhost:7401"], &["--listen <IP:PORT>", "names are not looked up"]);
    bad_primary(&["--listen=0.0.0.0:65535"], &["--listen 0.0.0.0:65535", "--heartbeat-listen"]);
    bad_primary(&["--interval-ms=0"], &["--interval-ms <MS>", "1..=1000"]);
    bad_primary(&["--interval-ms=1001"], &["1..=1000"]);
    bad_primary(&["--commit-on-output=maybe"], &["--commit-on-output <BOOL>", "true, false"]);
    bad_primary(&["--compress=zip"], &["--compress <HOW>", "auto, none, lz4"]);
    bad_primary(&["--arbiter=zookeeper:x"], &["--arbiter <WHO>", "file:/DIRECTORY", "etcd:", "command:", "none"]);
    bad_primary(&["--arbiter=file:"], &["name the directory from the root"]);
    bad_primary(&["--arbiter=command:fence"], &["name the script from the root"]);
    bad_primary(&["--arbiter=etcd:localhost"], &["arbiter endpoint \"localhost\"", "http://HOST:PORT"]);
    bad_primary(&["--arbiter=etcd:http://a:1,https://b:1"], &["either every endpoint has https://"]);
    bad_primary(&["--arbiter-timeout-ms=1"], &["--arbiter-timeout-ms <MS>", "10..=600000"]);
    bad_primary(&["--staging-max=4K"], &["--staging-max 4K", "at least 1M"]);
    bad_primary(&["--output-max-bytes=1"], &["--output-max-bytes 1", "at least 64K"]);
    bad_primary(&["--output-max-packets=1"], &["--output-max-packets"]);
    bad_primary(&["--log=loud"], &["--log <LEVEL>", "error, warn, info"]);
    bad_primary(&["--log-format=xml"], &["--log-format <HOW>", "human, json"]);
    bad_secondary(&["--peer=10.0.0.1"], &["--peer <IP:PORT>", "write IP:PORT"]);
    bad_secondary(&["--peer=0.0.0.0:7401"], &["--peer 0.0.0.0:7401", "nobody can be reached there"]);
    refused(&["demo", "--rounds=0"], USAGE, &["--rounds <N>"]);
    refused(&["demo", "--memory=17000000"], USAGE, &["--memory 17000000", "whole MiB"]);
    refused(&["demo", "--dirty=5"], USAGE, &["--dirty", "PAGES,PER-SECOND"]);
}

#[test]
fn networks_of_one_and_of_two_hosts_are_taken() {
    let start = ["primary", "--guest=a", "--tap=no-such-tap", "--arbiter=file:/x", "--control=/nonexistent/s"];
    for flags in [
        &["--guest-ip=10.0.0.2/31"][..],
        &["--guest-ip=10.0.0.2/31", "--guest-gateway=10.0.0.3"],
        &["--guest-ip=10.0.0.2/32"],
        &["--guest-ip=10.0.0.2/32", "--guest-gateway=169.254.1.1"],
    ] {
        // Nothing is wrong with the flags: what is missing is on this host.
        refused(&[&start[..], flags].concat(), HOST, &["tap"]);
    }
}

#[test]
fn options_that_contradict_each_other() {
    bad_primary(&["--on-peer-loss=wait"], &["--on-peer-loss is only for --arbiter none"]);
    bad_primary(&["--arbiter=none"], &["--arbiter none needs --on-peer-loss", "wait", "continue"]);
    bad_primary(&["--arbiter=none", "--on-peer-loss=wait", "--arbiter-timeout-ms=50"], &["--arbiter none is none"]);
    bad_primary(&["--arbiter-ca=/x"], &["--arbiter-ca is only for --arbiter etcd"]);
    bad_primary(&["--arbiter=command:/x", "--arbiter-user=a"], &["--arbiter-user is only for --arbiter etcd"]);
    bad_primary(&["--arbiter=etcd:https://a:1"], &["--arbiter-ca FILE is missing"]);
    bad_primary(&["--arbiter=etcd:http://a:1", "--arbiter-ca=/x"], &["go with https:// endpoints"]);
    let tls = ["--arbiter=etcd:https://a:1", "--arbiter-ca=/x"];
    bad_primary(&[&tls[..], &["--arbiter-key=/k"]].concat(), &["--arbiter-key is given without --arbiter-cert"]);
    bad_primary(&[&tls[..], &["--arbiter-user=a"]].concat(), &["--arbiter-user is given without --arbiter-password"]);
    bad_primary(&["--interval-ms=1", "--interval-min-us=2000"], &["--interval-min-us 2000", "--interval-ms 1"]);
    bad_primary(&["--stall-max-ms=150"], &["--stall-max-ms 150", "heartbeat timeout of 150 ms"]);
    bad_primary(&["--heartbeat-timeout-ms=99"], &["--heartbeat-timeout-ms 99", "twice --heartbeat-interval-ms 50"]);
    bad_primary(&["--heartbeat-listen=0.0.0.0:7401"], &["--heartbeat-listen", "a port each"]);
    bad_primary(&["--guest-gateway=10.0.1.1"], &["--guest-gateway 10.0.1.1", "10.0.0.2/24"]);
    bad_primary(&["--guest-gateway=10.0.0.2"], &["the guest's own address"]);
    bad_secondary(&["--peer=10.0.0.1:7401", "--listen=10.0.0.1:7401"], &["this node's own --listen"]);
    refused(&["status", "--guest=a", "--control=b"], USAGE, &["'--guest <NAME>'", "'--control <PATH>'"]);
    let cold = ["cold-start", "--i-know-both-nodes-are-dead", "--guest=a", "--tap=t", "--guest-ip=10.0.0.2/24"];
    refused(
        &[&cold[..], &["--control=/s", "--arbiter=none", "--on-peer-loss=wait"]].concat(),
        USAGE,
        &["no record", "mcd primary"],
    );
}

#[test]
fn configuration_files() {
    refused(&["primary", "--config=/nonexistent.toml"], USAGE, &["config file /nonexistent.toml", "No such file"]);
    refused(&["primary", "--config=/"], USAGE, &["config file /", "directory"]);
    refused(&["primary", "--config=/dev/zero"], USAGE, &["config file /dev/zero"]);
    bad_file("primary", b"guest = \"a\"\nguest = \"b\"\n", &["line 2", "duplicate key"]);
    bad_file("primary", b"guest = \"a\"\ntap = tap0\n", &["line 2"]);
    bad_file("primary", b"\xff\xfe", &["UTF-8"]);
    bad_file("primary", b"colour = \"red\"\n", &["unknown key `colour`", "mcd primary"]);
    bad_file("primary", b"interval_ms = 5\n", &["unknown key `interval_ms`", "write `interval-ms`"]);
    bad_file("primary", b"config = \"other\"\n", &["key `config` is only taken on the command line"]);
    bad_file("cold-start", b"i-know-both-nodes-are-dead = true\n", &["is only taken on the command line"]);
    bad_file("secondary", b"memory = \"1G\"\n", &["key `memory` is for `mcd primary`, not for `mcd secondary`"]);
    bad_file("primary", b"peer = \"1.2.3.4:5\"\n", &["key `peer` is for `mcd secondary`"]);
    bad_file("primary", b"interval-ms = [5]\n", &["key `interval-ms`", "must be a string"]);
    bad_file("primary", b"[interval-ms]\na = 1\n", &["key `interval-ms`", "must be a string"]);
    bad_file("primary", b"interval-ms = 5000\n", &["5000", "--interval-ms <MS>", "1..=1000"]);
    bad_file("primary", b"help = true\n", &["key `help`"]);
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcd.toml");
    fs::write(
        &path,
        "guest = \"a\"\ntap = \"t\"\nguest-ip = \"10.0.0.2/24\"\narbiter = \"none\"\ncontrol = \"/nonexistent/s\"\n",
    )
    .unwrap();
    let config = ["primary", "--config", path.to_str().unwrap()];
    // The file alone leaves one thing to be said, and the flags can change what it is.
    refused(&config, USAGE, &["--arbiter none needs --on-peer-loss"]);
    let flags = ["--arbiter=file:/x", "--guest-gateway=10.9.9.9"];
    refused(&[&config[..], &flags].concat(), USAGE, &["not in the guest's network 10.0.0.2/24"]);
    let flags = ["--arbiter=file:/x", "--guest-gateway=10.9.9.9", "--guest-ip=10.8.8.9/30"];
    refused(&[&config[..], &flags].concat(), USAGE, &["not in the guest's network 10.8.8.9/30"]);
}

#[test]
fn the_documented_example_is_right_in_every_line() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/mcd.toml.example")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (command, not_here) in [
        ("primary", ["peer", "peer-heartbeat", "guest-gateway"].as_slice()),
        ("secondary", &["memory", "cpus", "rng", "mac", "guest-gateway", "kernel", "initrd", "append"]),
    ] {
        // All that is commented out as well, but for the second answer to a question answered
        // before.
        let keys: String = text
            .lines()
            .map(|line| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line))
            .filter(|line| {
                !["none", "file:/srv/mcd", "command:/etc/mcd/fence"]
                    .iter()
                    .any(|who| *line == format!("arbiter = \"{who}\""))
            })
            .filter(|line| !line.starts_with("on-peer-loss"))
            .filter(|line| !not_here.iter().any(|key| line.starts_with(&format!("{key} ="))))
            .fold(String::new(), |all, line| all + line + "\n");
        let path = dir.path().join(command);
        fs::write(&path, &keys).unwrap();
        // Everything is taken: the one thing that is wrong is what the flag adds.
        let flags = [command, "--config", path.to_str().unwrap(), "--on-peer-loss=wait"];
        refused(&flags, USAGE, &["--on-peer-loss is only for --arbiter none"]);
        let flags: Vec<String> =
            mcd_flags(command).into_iter().filter(|flag| !text.contains(&format!("{flag} ="))).collect();
        let of_one_start = ["config", "force-disk", "help", "restore"];
        let of_one_start = &of_one_start[..if command == "primary" { 4 } else { 3 }];
        assert_eq!(flags, of_one_start, "flags of {command} that the example does not show");
    }
}

/// The flags that `--help` lists, sorted.
fn mcd_flags(command: &str) -> Vec<String> {
    let help = String::from_utf8(mcd(&[command, "--help"]).stdout).unwrap();
    let mut flags: Vec<String> = help
        .lines()
        .map(|line| line.trim_start().trim_start_matches("-h, "))
        .filter_map(|line| line.strip_prefix("--")?.split_whitespace().next().map(str::to_owned))
        .collect();
    flags.sort();
    flags
}

#[test]
fn a_node_that_does_not_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcd.sock");
    let control = path.to_str().unwrap();
    refused(&["status", "--control", control], FAILURE, &["no node answers at", control]);
    // A socket whose owner says nothing, and one nobody listens on.
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    refused(&["status", "--control", control, "--timeout-ms=50"], FAILURE, &["did not answer", "within 50 ms"]);
    let path = dir.path().join("stale.sock");
    let stale = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    stale.bind(&socket2::SockAddr::unix(&path).unwrap()).unwrap();
    refused(&["status", "--control", path.to_str().unwrap()], FAILURE, &["no node answers at", "refused"]);
}
