//! One client: its three threads, and the rules of QMP's two modes.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, bounded};
use serde_json::{Map, Value, json};

use super::COMMAND_BYTES_MAX;
use super::framer::{Frame, Framer};
use super::message::{self, BadRequest, QmpError, Request, shorten};
use super::outbox::Outbox;
use super::server::{Core, Slot};

/// Commands that may wait for their turn; then the client has to wait. As many as in QEMU.
const REQUESTS_MAX: usize = 8;

/// A client that takes nothing for this long while something waits for it is cut off.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// Enough for a command nested to the limit; there may be three threads for each client.
const STACK_BYTES: usize = 512 << 10;

/// The commands every server knows by itself.
const BUILT_IN: [&str; 3] = ["qmp_capabilities", "query-commands", "query-version"];

/// What the server and the session's threads share.
pub(super) struct Session {
    stream: UnixStream,
    pub(super) outbox: Outbox,
    /// Before, only `qmp_capabilities` is understood and no events are sent.
    pub(super) negotiated: AtomicBool,
    /// It makes no room for others any more: so from before its negotiation is answered, or a
    /// client that has the answer could still be closed.
    pub(super) keeps_place: AtomicBool,
}

impl Session {
    pub(super) fn new(stream: UnixStream) -> io::Result<Session> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Session {
            stream,
            outbox: Outbox::new(),
            negotiated: AtomicBool::new(false),
            keeps_place: AtomicBool::new(false),
        })
    }

    /// No more commands are read; those under way are answered.
    pub(super) fn stop_reading(&self) {
        // Fails only if the client is gone already.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Cuts the client off at once.
    pub(super) fn close(&self) {
        self.outbox.close();
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Starts the threads of a session. The slot is free again when the last of them has ended.
pub(super) fn start(core: &Arc<Core>, slot: Slot) -> io::Result<()> {
    let slot = Arc::new(slot);
    let (requests, queue) = bounded(REQUESTS_MAX);
    slot.session.outbox.push_reply(message::greeting());
    let spawned = spawn("mcd-qmp-write", Arc::clone(&slot), write_all)
        .and_then(|()| {
            let core = Arc::clone(core);
            spawn("mcd-qmp-exec", Arc::clone(&slot), move |session| execute_all(&core, session, &queue))
        })
        .and_then(|()| {
            let core = Arc::clone(core);
            spawn("mcd-qmp-read", Arc::clone(&slot), move |session| {
                if let Err(error) = (Reader { core: &core, session, requests, oob: false }).run() {
                    tracing::debug!(%error, "a control client is gone");
                }
            })
        });
    if spawned.is_err() {
        slot.session.close();
    }
    spawned
}

fn spawn(name: &str, slot: Arc<Slot>, body: impl FnOnce(&Session) + Send + 'static) -> io::Result<()> {
    thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || body(&slot.session))
        .map(|_detached| ())
}

/// The writer thread.
fn write_all(session: &Session) {
    while session.outbox.take(|bytes| (&session.stream).write_all(bytes).is_ok()) {}
    session.close();
}

/// The executor thread: commands in order, one at a time.
fn execute_all(core: &Core, session: &Session, queue: &Receiver<Result<Request, BadRequest>>) {
    /// Also when a handler panics: the client must not wait for an answer that never comes.
    struct Finish<'a>(&'a Session);
    impl Drop for Finish<'_> {
        fn drop(&mut self) {
            self.0.outbox.finish();
            self.0.stop_reading();
        }
    }
    let _finish = Finish(session);
    for request in queue {
        let reply = match request {
            Err(bad) => message::reply(Err(bad.error), bad.id),
            Ok(request) if core.stopping() => {
                message::reply(Err(QmpError::generic("the node is shutting down")), request.id)
            }
            Ok(request) => message::reply(execute(core, &request.command, &request.arguments), request.id),
        };
        if !session.outbox.push_reply(reply) {
            break;
        }
    }
}

/// Carries out a command in command mode.
fn execute(core: &Core, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError> {
    match command {
        "qmp_capabilities" => Err(QmpError::not_found("Capabilities negotiation is already complete, command ignored")),
        "query-version" => no_arguments(arguments).map(|()| message::version()),
        "query-commands" => no_arguments(arguments).map(|()| command_list(core.handler.commands())),
        _ if core.handler.commands().contains(&command) => core.handler.execute(command, arguments),
        _ => Err(QmpError::not_found(format!("The command {} has not been found", shorten(command)))),
    }
}

fn command_list(commands: &[&str]) -> Value {
    let mut names: Vec<&str> = commands.iter().chain(&BUILT_IN).copied().collect();
    names.sort_unstable();
    names.dedup();
    names.into_iter().map(|name| json!({"name": name})).collect()
}

fn no_arguments(arguments: &Map<String, Value>) -> Result<(), QmpError> {
    match arguments.keys().next() {
        Some(key) => Err(QmpError::generic(format!("Parameter '{}' is unexpected", shorten(key)))),
        None => Ok(()),
    }
}

/// The reader thread.
struct Reader<'a> {
    core: &'a Core,
    session: &'a Session,
    requests: Sender<Result<Request, BadRequest>>,
    oob: bool,
}

impl Reader<'_> {
    /// Reads until the client hangs up. When this ends, the executor sees the end of its queue,
    /// answers what is left, and the writer closes the connection.
    fn run(mut self) -> io::Result<()> {
        let mut framer = Framer::new(COMMAND_BYTES_MAX);
        let mut buffer = vec![0; 16 << 10];
        loop {
            let count = match (&self.session.stream).read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let mut rest = buffer.get(..count).unwrap_or_default();
            while !rest.is_empty() {
                let (taken, frame) = framer.feed(rest);
                rest = rest.get(taken..).unwrap_or_default();
                if frame.is_some_and(|frame| !self.take(frame)) {
                    return Ok(());
                }
            }
        }
    }

    /// Deals with one frame. False if there is nobody left to answer.
    fn take(&mut self, frame: Frame) -> bool {
        let request = match frame {
            Frame::Value(bytes) => message::parse_request(&bytes, self.oob),
            Frame::Bad(reason) => Err(BadRequest { error: QmpError::generic(reason.to_string()), id: None }),
        };
        match request {
            Ok(request) if !self.session.negotiated.load(Ordering::Acquire) => {
                let result = self.negotiate(&request);
                let done = result.is_ok();
                self.session.keeps_place.store(done, Ordering::Release);
                let heard = self.reply(result, request.id);
                // Only now, so that no event comes before the answer.
                self.session.negotiated.store(done, Ordering::Release);
                heard
            }
            Ok(request) if request.out_of_band => {
                let result = self.execute_out_of_band(&request);
                self.reply(result, request.id)
            }
            // Answered in its turn, so that replies come in the order of the commands.
            Err(bad) if !self.session.negotiated.load(Ordering::Acquire) => self.reply(Err(bad.error), bad.id),
            request => self.requests.send(request).is_ok(),
        }
    }

    fn reply(&self, result: Result<Value, QmpError>, id: Option<Value>) -> bool {
        self.session.outbox.push_reply(message::reply(result, id))
    }

    /// Negotiation mode: exactly one command is understood.
    fn negotiate(&mut self, request: &Request) -> Result<Value, QmpError> {
        if request.command != "qmp_capabilities" {
            return Err(QmpError::not_found("Expecting capabilities negotiation with 'qmp_capabilities'"));
        }
        if let Some(key) = request.arguments.keys().find(|key| *key != "enable") {
            return Err(QmpError::generic(format!("Parameter '{}' is unexpected", shorten(key))));
        }
        let mut oob = false;
        match request.arguments.get("enable") {
            None => {}
            Some(Value::Array(wanted)) => {
                for capability in wanted {
                    match capability.as_str() {
                        Some("oob") => oob = true,
                        _ => return Err(QmpError::generic("Parameter 'enable' accepts only 'oob'")),
                    }
                }
            }
            Some(_) => return Err(QmpError::generic("Invalid parameter type for 'enable', expected: array")),
        }
        self.oob = oob;
        Ok(Value::Null)
    }

    fn execute_out_of_band(&self, request: &Request) -> Result<Value, QmpError> {
        let handler = &self.core.handler;
        let command = request.command.as_str();
        let known = handler.commands().contains(&command) || BUILT_IN.contains(&command);
        if known && !handler.allows_out_of_band(command) {
            return Err(QmpError::generic(format!("The command {} does not support OOB", shorten(command))));
        }
        execute(self.core, command, &request.arguments)
    }
}
