//! The other side of the socket: a blocking client with deadlines.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use super::framer::{Frame, Framer};
use super::message::{ErrorClass, QmpError};
use super::status::NodeStatus;

/// Longest answer that is taken, in bytes.
const REPLY_BYTES_MAX: usize = 16 << 20;

/// Events kept until someone asks for them; then the oldest go.
const EVENTS_KEPT_MAX: usize = 1024;

/// What went wrong with a control socket, seen from the client.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody can be reached there.
    #[error("no node answers at {path}: {source}; is `mcd primary` or `mcd secondary` running with this --control?")]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The node did not answer in time.
    #[error("the node did not answer {command} within {} ms", .timeout.as_millis())]
    TimedOut {
        /// What was asked.
        command: String,
        /// How long it was waited for.
        timeout: Duration,
    },
    /// The node closed the connection: it has ended, or it cut us off.
    #[error("the node closed the control connection")]
    Closed,
    /// The node refuses the command.
    #[error("{command}: {source}")]
    Refused {
        /// What was asked.
        command: String,
        /// The node's error.
        source: QmpError,
    },
    /// The answer is not a node's.
    #[error("what answers does not speak as a node does: {detail}")]
    Protocol {
        /// What was wrong.
        detail: String,
    },
    /// Reading or writing failed.
    #[error("the control connection failed: {source}")]
    Io {
        /// The system's error.
        #[from]
        source: io::Error,
    },
}

/// Something that happened on the node.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `MC_TAKEOVER`.
    pub name: String,
    /// Its data; `Null` if it has none.
    pub data: Value,
    /// The node's time of day when it happened, in microseconds since 1970.
    pub timestamp_us: u64,
}

/// A connection to a node's control socket, negotiated.
///
/// After an error other than [`ClientError::Refused`] the connection is of no more use.
pub struct Client {
    stream: UnixStream,
    framer: Framer,
    received: Vec<u8>,
    events: VecDeque<Event>,
    next_id: u64,
}

impl Client {
    /// Connects and negotiates, all within `timeout`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn connect(path: &Path, timeout: Duration) -> Result<Client, ClientError> {
        let deadline = Deadline::new("the greeting", timeout);
        let stream =
            connect_socket(path, timeout).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
        let framer = Framer::new(REPLY_BYTES_MAX);
        let mut client = Client { stream, framer, received: Vec::new(), events: VecDeque::new(), next_id: 0 };
        let greeting = client.read_message(&deadline)?;
        if let Some(error) = greeting.get("error") {
            return Err(ClientError::Refused { command: "connect".to_owned(), source: read_error(error) });
        }
        if greeting.get("QMP").is_none() {
            return Err(ClientError::Protocol { detail: "the greeting is missing".to_owned() });
        }
        client.execute("qmp_capabilities", Value::Null, deadline.left()?)?;
        Ok(client)
    }

    /// Sends a command and waits for its answer, at most for `timeout`. `arguments` is an object,
    /// or `Null` for none.
    ///
    /// # Errors
    /// [`ClientError::Refused`] if the node refuses; the connection stays usable then.
    pub fn execute(&mut self, command: &str, arguments: Value, timeout: Duration) -> Result<Value, ClientError> {
        let deadline = Deadline::new(command, timeout);
        self.next_id += 1;
        let id = json!(self.next_id);
        let mut request = json!({"execute": command, "id": id});
        if let (Value::Object(members), false) = (&mut request, arguments.is_null()) {
            members.insert("arguments".to_owned(), arguments);
        }
        self.write(format!("{request}\n").as_bytes(), &deadline)?;
        loop {
            let mut message = self.read_message(&deadline)?;
            if self.keep_event(&message) {
                continue;
            }
            // An answer to a command that was given up, or one without an id because it could not
            // be read.
            if message.get("id") != Some(&id) && !(message.get("id").is_none() && message.contains_key("error")) {
                continue;
            }
            if let Some(error) = message.get("error") {
                return Err(ClientError::Refused { command: command.to_owned(), source: read_error(error) });
            }
            return message.remove("return").ok_or_else(|| ClientError::Protocol {
                detail: "neither 'return' nor 'error' in the answer".to_owned(),
            });
        }
    }

    /// Like [`Client::execute`], and reads the answer into `T`.
    ///
    /// # Errors
    /// [`ClientError::Protocol`] if the answer is no `T`.
    pub fn execute_as<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        timeout: Duration,
    ) -> Result<T, ClientError> {
        let answer = self.execute(command, arguments, timeout)?;
        serde_json::from_value(answer).map_err(|e| ClientError::Protocol { detail: format!("{command}: {e}") })
    }

    /// The node's status: `mc-query`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn status(&mut self, timeout: Duration) -> Result<NodeStatus, ClientError> {
        self.execute_as("mc-query", Value::Null, timeout)
    }

    /// The next event, in order; `None` if there was none within `timeout`.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn next_event(&mut self, timeout: Duration) -> Result<Option<Event>, ClientError> {
        let deadline = Deadline::new("an event", timeout);
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.read_message(&deadline) {
                Ok(message) => drop(self.keep_event(&message)),
                Err(ClientError::TimedOut { .. }) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn keep_event(&mut self, message: &Map<String, Value>) -> bool {
        let Some(name) = message.get("event").and_then(Value::as_str) else { return false };
        let part = |key| message.get("timestamp").and_then(|t| t.get(key)).and_then(Value::as_u64).unwrap_or(0);
        if self.events.len() >= EVENTS_KEPT_MAX {
            self.events.pop_front();
        }
        self.events.push_back(Event {
            name: name.to_owned(),
            data: message.get("data").cloned().unwrap_or_default(),
            timestamp_us: part("seconds").saturating_mul(1_000_000).saturating_add(part("microseconds")),
        });
        true
    }

    fn read_message(&mut self, deadline: &Deadline) -> Result<Map<String, Value>, ClientError> {
        loop {
            let (taken, frame) = self.framer.feed(&self.received);
            self.received.drain(..taken);
            match frame {
                Some(Frame::Value(bytes)) => {
                    return serde_json::from_slice(&bytes).map_err(|e| ClientError::Protocol { detail: e.to_string() });
                }
                Some(Frame::Bad(reason)) => return Err(ClientError::Protocol { detail: reason.to_string() }),
                None => {}
            }
            self.stream.set_read_timeout(Some(deadline.left()?))?;
            let mut buffer = [0; 16 << 10];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(ClientError::Closed),
                Ok(count) => self.received.extend_from_slice(buffer.get(..count).unwrap_or_default()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(deadline.error()),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Err(ClientError::Closed),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn write(&mut self, bytes: &[u8], deadline: &Deadline) -> Result<(), ClientError> {
        self.stream.set_write_timeout(Some(deadline.left()?))?;
        self.stream.write_all(bytes).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => deadline.error(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
            _ => e.into(),
        })
    }
}

/// Until when an answer must be there.
struct Deadline {
    what: String,
    timeout: Duration,
    end: Instant,
}

impl Deadline {
    fn new(what: &str, timeout: Duration) -> Deadline {
        Deadline { what: what.to_owned(), timeout, end: Instant::now() + timeout }
    }

    /// What is left of the time; never zero, which would mean "no limit" to a socket.
    fn left(&self) -> Result<Duration, ClientError> {
        match self.end.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(self.error()),
            left => Ok(left.max(Duration::from_millis(1))),
        }
    }

    fn error(&self) -> ClientError {
        ClientError::TimedOut { command: self.what.clone(), timeout: self.timeout }
    }
}

fn connect_socket(path: &Path, timeout: Duration) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // This is also what bounds a connect to a node whose accept queue is full.
    socket.set_write_timeout(Some(timeout.max(Duration::from_millis(1))))?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(UnixStream::from(OwnedFd::from(socket)))
}

/// False if the socket at `path` was left behind by a process that is gone. One whose process hangs
/// is listening.
pub fn is_listening(path: &Path) -> bool {
    let connected = || -> io::Result<()> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
        socket.connect(&SockAddr::unix(path)?)
    };
    connected().map_or_else(|error| error.kind() != io::ErrorKind::ConnectionRefused, |()| true)
}

fn read_error(error: &Value) -> QmpError {
    let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let class = match text("class").as_str() {
        "CommandNotFound" => ErrorClass::CommandNotFound,
        "DeviceNotActive" => ErrorClass::DeviceNotActive,
        "DeviceNotFound" => ErrorClass::DeviceNotFound,
        _ => ErrorClass::GenericError,
    };
    QmpError { class, desc: text("desc") }
}
