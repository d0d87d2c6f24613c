//! The server with real sockets: what a good client gets, and what a bad one cannot do.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use serde_json::{Map, Value, json};

use super::outbox::EVENTS_MAX;
use super::*;

/// Long enough never to be reached; no test's result depends on it.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// Commands: `echo` its arguments, `fail`, `wait` for the test, `panic`.
struct TestNode {
    entered: Sender<()>,
    go_on: Receiver<()>,
}

impl Handler for TestNode {
    fn commands(&self) -> &[&str] {
        &["echo", "fail", "wait", "panic", "mc-query"]
    }

    fn execute(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
        match command {
            "echo" => Ok(Value::Object(arguments.clone())),
            "wait" => {
                self.entered.send(()).unwrap();
                self.go_on.recv().unwrap();
                Ok(Value::Null)
            }
            "panic" => panic!("this handler panics on purpose"),
            _ => Err(QmpError { class: ErrorClass::DeviceNotActive, desc: "not today".to_owned() }),
        }
    }

    fn allows_out_of_band(&self, command: &str) -> bool {
        command == "echo"
    }
}

struct Bench {
    server: Server,
    path: PathBuf,
    entered: Receiver<()>,
    go_on: Sender<()>,
    _dir: tempfile::TempDir,
}

fn bench() -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mcd.sock");
    let (entered_tx, entered) = bounded(100);
    let (go_on, go_on_rx) = bounded(100);
    let server = Server::bind(&path, Arc::new(TestNode { entered: entered_tx, go_on: go_on_rx })).unwrap();
    Bench { server, path, entered, go_on, _dir: dir }
}

impl Bench {
    fn client(&self) -> Client {
        Client::connect(&self.path, WAIT_MAX).unwrap()
    }
}

/// A client that can misbehave.
struct Raw {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Raw {
    fn connect(path: &Path) -> Raw {
        let stream = UnixStream::connect(path).unwrap();
        let mut raw = Raw { lines: BufReader::new(stream.try_clone().unwrap()), stream };
        assert!(raw.read()["QMP"].is_object());
        raw
    }

    fn negotiated(path: &Path) -> Raw {
        let mut raw = Raw::connect(path);
        assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}"#), json!({"return": {}}));
        raw
    }

    fn send(&mut self, text: &str) {
        self.stream.write_all(text.as_bytes()).unwrap();
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text);
        self.read()
    }

    fn error(&mut self, text: &str) -> String {
        self.ask(text)["error"]["desc"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_client_negotiates_first() {
    let bench = bench();
    let mut raw = Raw::connect(&bench.path);
    let refused = raw.ask(r#"{"execute":"query-version","id":1}"#);
    assert_eq!(refused["error"]["class"], "CommandNotFound");
    assert_eq!(refused["id"], 1);
    assert!(raw.error("[1]").contains("must be a JSON object"));
    assert!(raw.error(r#"{"execute":"qmp_capabilities","arguments":{"enable":["x"]}}"#).contains("only 'oob'"));
    assert!(raw.error(r#"{"execute":"qmp_capabilities","arguments":{"enable":1}}"#).contains("expected: array"));
    assert!(raw.error(r#"{"execute":"qmp_capabilities","arguments":{"y":1}}"#).contains("'y' is unexpected"));
    assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
    assert!(raw.error(r#"{"execute":"qmp_capabilities"}"#).contains("already complete"));
    assert!(raw.error(r#"{"exec-oob":"echo"}"#).contains("enable oob"));
}

#[test]
fn commands_and_errors_reach_the_client() {
    let bench = bench();
    let mut client = bench.client();
    assert_eq!(client.execute("echo", json!({"a": [1, null]}), WAIT_MAX).unwrap(), json!({"a": [1, null]}));
    assert_eq!(client.execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
    let refused = client.execute("fail", Value::Null, WAIT_MAX).unwrap_err();
    assert_eq!(refused.to_string(), "fail: not today");
    assert!(matches!(
        refused,
        ClientError::Refused { source: QmpError { class: ErrorClass::DeviceNotActive, .. }, .. }
    ));
    let unknown = client.execute("no-such", Value::Null, WAIT_MAX).unwrap_err();
    assert_eq!(unknown.to_string(), "no-such: The command no-such has not been found");
    assert!(client.execute("query-version", Value::Null, WAIT_MAX).unwrap()["qemu"]["minor"].is_u64());
    let names = client.execute("query-commands", Value::Null, WAIT_MAX).unwrap();
    assert!(names.as_array().unwrap().contains(&json!({"name": "echo"})));
    assert!(names.as_array().unwrap().contains(&json!({"name": "qmp_capabilities"})));
    assert!(matches!(client.status(WAIT_MAX), Err(ClientError::Refused { .. })));
}

#[test]
fn many_commands_in_one_write_are_answered_in_order() {
    let bench = bench();
    let mut raw = Raw::negotiated(&bench.path);
    let text: String = (0..500).map(|n| format!("{{\"execute\":\"echo\",\"id\":{n}}}{{]")).collect();
    let mut stream = raw.stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || stream.write_all(text.as_bytes()).unwrap());
    for n in 0..500 {
        assert_eq!(raw.read(), json!({"return": {}, "id": n}));
        assert!(raw.read()["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"));
    }
    writer.join().unwrap();
}

#[test]
fn answers_come_also_when_the_client_has_said_all() {
    let bench = bench();
    let mut stream = UnixStream::connect(&bench.path).unwrap();
    stream.write_all(br#"{"execute":"qmp_capabilities"} {"execute":"echo","id":"last"}"#).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.ends_with("{\"id\":\"last\",\"return\":{}}\r\n"), "{text}");
}

#[test]
fn rubbish_is_answered_and_the_connection_lives() {
    let bench = bench();
    let mut raw = Raw::negotiated(&bench.path);
    assert!(raw.error("rubbish\n").starts_with("JSON parse error"));
    assert!(raw.error(&format!("{}\n", "[".repeat(200_000))).starts_with("JSON nesting limit"));
    assert!(raw.error(&format!("{{\"{}\n", "x".repeat(3 << 20))).starts_with("JSON size limit"));
    assert!(raw.error("{\"a\": tru}").starts_with("JSON parse error"));
    raw.stream.write_all(b"{\"half\xFF").unwrap();
    assert!(raw.read()["error"]["desc"].as_str().unwrap().contains("0xFF"));
    raw.stream.write_all(b"{\"execute\":\"ec\xC0ho\"}").unwrap();
    assert!(raw.read()["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"));
    assert_eq!(raw.ask(r#"{"execute":"echo"}"#), json!({"return": {}}));
}

#[test]
fn a_command_that_waits_holds_up_neither_others_nor_what_is_out_of_band() {
    let bench = bench();
    let mut waiting = Raw::negotiated(&bench.path);
    waiting.send(r#"{"execute":"wait","id":1}{"execute":"echo","id":2}"#);
    bench.entered.recv_timeout(WAIT_MAX).unwrap();
    assert_eq!(bench.client().execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
    assert_eq!(waiting.ask(r#"{"exec-oob":"echo","id":3}"#)["id"], 3);
    assert!(waiting.error(r#"{"exec-oob":"wait"}"#).contains("does not support OOB"));
    assert_eq!(waiting.ask(r#"{"exec-oob":"nope"}"#)["error"]["class"], "CommandNotFound");
    bench.go_on.send(()).unwrap();
    assert_eq!(waiting.read()["id"], 1);
    assert_eq!(waiting.read()["id"], 2);
}

#[test]
fn a_client_gives_up_in_time() {
    let bench = bench();
    let mut client = bench.client();
    let error = client.execute("wait", Value::Null, Duration::from_millis(20)).unwrap_err();
    assert_eq!(error.to_string(), "the node did not answer wait within 20 ms");
    bench.go_on.send(()).unwrap();
    // The late answer is not taken for that to the next command.
    assert_eq!(client.execute("echo", json!({"a": 1}), WAIT_MAX).unwrap(), json!({"a": 1}));
}

#[test]
fn events_reach_all_that_have_negotiated() {
    let bench = bench();
    let (mut one, mut two, mut silent) = (bench.client(), bench.client(), Raw::connect(&bench.path));
    let sink = bench.server.events();
    sink.emit("STOP", Value::Null);
    sink.emit("MC_TAKEOVER", json!({"generation": 2}));
    for client in [&mut one, &mut two] {
        // An answer that comes behind events is found, and the events are not lost.
        assert_eq!(client.execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
        let stop = client.next_event(WAIT_MAX).unwrap().unwrap();
        assert_eq!((stop.name.as_str(), stop.data), ("STOP", Value::Null));
        assert!(stop.timestamp_us > 1_600_000_000_000_000);
        assert_eq!(client.next_event(WAIT_MAX).unwrap().unwrap().data, json!({"generation": 2}));
        assert_eq!(client.next_event(Duration::from_millis(1)).unwrap(), None);
    }
    assert_eq!(silent.ask(r#"{"execute":"qmp_capabilities"}"#), json!({"return": {}}));
}

#[test]
fn a_client_that_does_not_read_is_cut_off_and_nobody_waits_for_it() {
    let bench = bench();
    let mut deaf = Raw::negotiated(&bench.path);
    let sink = bench.server.events();
    let padding = "x".repeat(16 << 10);
    // More than the kernel's buffer and the outbox hold together.
    for _ in 0..EVENTS_MAX {
        sink.emit("NOISE", json!({"padding": padding}));
    }
    assert_eq!(bench.client().execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
    let mut rest = Vec::new();
    // It ends, instead of waiting for ever.
    let _ = deaf.lines.read_to_end(&mut rest);
    assert!(rest.len() < EVENTS_MAX * padding.len());
}

#[test]
fn commands_of_a_client_that_does_not_read_are_not_piled_up() {
    let bench = bench();
    let mut deaf = Raw::negotiated(&bench.path);
    deaf.stream.set_nonblocking(true).unwrap();
    let command = format!("{{\"execute\":\"echo\",\"arguments\":{{\"a\":\"{}\"}}}}", "x".repeat(100_000));
    let mut sent = 0;
    let mut idle = 0;
    while idle < 100 {
        match deaf.stream.write(&command.as_bytes()[sent % command.len()..]) {
            Ok(count) => (sent, idle) = (sent + count, 0),
            Err(_) => {
                idle += 1;
                assert_eq!(bench.client().execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
            }
        }
        assert!(sent < 64 << 20, "the server takes without end");
    }
}

#[test]
fn unknown_peers_make_room_and_guests_do_not() {
    let bench = bench();
    let mut held: Vec<Client> = (0..10).map(|_| bench.client()).collect();
    let silents: Vec<UnixStream> = (0..1000).map(|_| UnixStream::connect(&bench.path).unwrap()).collect();
    held.push(bench.client());
    drop(silents);
    for client in &mut held {
        assert_eq!(client.execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
    }
    while held.len() < CLIENTS_MAX {
        held.push(bench.client());
    }
    let refused = Client::connect(&bench.path, WAIT_MAX).err().unwrap();
    assert_eq!(refused.to_string(), "connect: 64 clients are connected already; try again later");
    held.pop();
    held.push(loop {
        // The place is free a moment after the client is gone.
        match Client::connect(&bench.path, WAIT_MAX) {
            Ok(client) => break client,
            Err(ClientError::Refused { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    });
}

#[test]
fn a_handler_that_panics_costs_its_client_only() {
    let bench = bench();
    assert!(matches!(bench.client().execute("panic", Value::Null, WAIT_MAX), Err(ClientError::Closed)));
    assert_eq!(bench.client().execute("echo", Value::Null, WAIT_MAX).unwrap(), json!({}));
}

#[test]
fn a_server_that_ends_answers_what_is_under_way() {
    let bench = bench();
    let mut quitting = Raw::negotiated(&bench.path);
    let mut idle = bench.client();
    quitting.send(r#"{"execute":"wait","id":1}{"execute":"echo","id":2}"#);
    bench.entered.recv_timeout(WAIT_MAX).unwrap();
    let sink = bench.server.events();
    let ending = std::thread::spawn(move || drop(bench.server));
    assert!(matches!(idle.next_event(WAIT_MAX), Err(ClientError::Closed)));
    bench.go_on.send(()).unwrap();
    assert_eq!(quitting.read(), json!({"return": {}, "id": 1}));
    let second = quitting.read();
    assert_eq!(second["error"]["desc"], "the node is shutting down");
    ending.join().unwrap();
    assert!(!bench.path.exists());
    let gone = Client::connect(&bench.path, WAIT_MAX).err().unwrap();
    assert!(gone.to_string().starts_with("no node answers at "), "{gone}");
    sink.emit("STOP", Value::Null);
}
