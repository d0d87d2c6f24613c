//! The listening side: the clients, and the events that all of them get.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use parking_lot::{Condvar, Mutex};
use serde_json::{Map, Value};

use super::bind::BoundSocket;
use super::message::{self, QmpError};
use super::session::{self, Session};
use super::{CLIENTS_MAX, ControlError};

/// How long an unknown peer at the cap waits for the place of one that was cut off, and a stopping
/// server for its clients.
const CLIENT_DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

/// What a node offers on its control socket. Called from threads of the clients, several at a time.
pub trait Handler: Send + Sync + 'static {
    /// The names of all commands [`Handler::execute`] knows. `qmp_capabilities`, `query-version`
    /// and `query-commands` are the server's own.
    fn commands(&self) -> &[&str];

    /// Carries out a command. `Value::Null` means "done, nothing to tell".
    ///
    /// It may wait, but not for ever; only the client that asked waits with it. It must not drop
    /// the [`Server`].
    ///
    /// # Errors
    /// The error that the client gets.
    fn execute(&self, command: &str, arguments: &Map<String, Value>) -> Result<Value, QmpError>;

    /// Whether a command may be sent out of band (`exec-oob`), ahead of commands that still wait.
    /// Such a command must answer at once.
    fn allows_out_of_band(&self, command: &str) -> bool {
        let _ = command;
        false
    }
}

/// What all sessions of a server share.
pub(super) struct Core {
    pub(super) handler: Arc<dyn Handler>,
    registry: Arc<Registry>,
}

impl Core {
    pub(super) fn stopping(&self) -> bool {
        self.registry.stopping.load(Ordering::Acquire)
    }
}

/// The clients there are, by age.
struct Registry {
    sessions: Mutex<BTreeMap<u64, Arc<Session>>>,
    left: Condvar,
    stopping: AtomicBool,
}

/// A client's place in the registry; dropping it frees the place.
pub(super) struct Slot {
    pub(super) session: Arc<Session>,
    registry: Arc<Registry>,
    number: u64,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.registry.sessions.lock().remove(&self.number);
        self.registry.left.notify_all();
    }
}

impl Registry {
    /// Waits until at most `count` clients are left. False if that took longer than
    /// [`CLIENT_DRAIN_TIMEOUT`].
    fn wait_until_at_most(&self, count: usize) -> bool {
        let deadline = Instant::now() + CLIENT_DRAIN_TIMEOUT;
        let mut sessions = self.sessions.lock();
        while sessions.len() > count {
            if self.left.wait_until(&mut sessions, deadline).timed_out() {
                return sessions.len() <= count;
            }
        }
        true
    }

    /// At the cap, the oldest client that never negotiated makes room. False if there is none.
    fn make_room(&self) -> bool {
        let idle = {
            let sessions = self.sessions.lock();
            if sessions.len() < CLIENTS_MAX {
                return true;
            }
            sessions.values().find(|session| !session.keeps_place.load(Ordering::Acquire)).cloned()
        };
        idle.is_some_and(|session| {
            session.close();
            self.wait_until_at_most(CLIENTS_MAX - 1)
        })
    }
}

/// Sends events to all clients. Cheap to clone; outlives the server without harm.
#[derive(Clone)]
pub struct EventSink {
    registry: Arc<Registry>,
}

impl EventSink {
    /// Sends an event to every client that has negotiated. Never waits: a client that lets too many
    /// events pile up is cut off. `data` is an object, or `Value::Null` for none.
    pub fn emit(&self, name: &str, data: Value) {
        let bytes: Arc<[u8]> = message::event(name, data, SystemTime::now()).into();
        for session in self.registry.sessions.lock().values() {
            if session.negotiated.load(Ordering::Acquire) && !session.outbox.push_event(&bytes) {
                tracing::warn!(event = name, "a control client does not read its events; it is cut off");
                session.close();
            }
        }
    }
}

/// A listening control socket. Dropping it lets commands under way finish, closes the connections
/// and removes the socket.
pub struct Server {
    core: Arc<Core>,
    wake: Arc<EventFd>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on a unix socket at `path` with mode 0600, making its directory if there is none. A
    /// socket left behind by a process that is gone is replaced.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn bind(path: &Path, handler: Arc<dyn Handler>) -> Result<Server, ControlError> {
        let socket = BoundSocket::new(path)?;
        let fail = |action| move |source| ControlError::Io { path: path.to_owned(), action, source };
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| fail("make an eventfd")(errno.into()))?;
        let wake = Arc::new(wake);
        let registry = Arc::new(Registry {
            sessions: Mutex::new(BTreeMap::new()),
            left: Condvar::new(),
            stopping: AtomicBool::new(false),
        });
        let core = Arc::new(Core { handler, registry });
        let accepting = {
            let acceptor = Acceptor { core: Arc::clone(&core), wake: Arc::clone(&wake), socket, next: 0 };
            thread::Builder::new().name("mcd-qmp-accept".to_owned()).spawn(move || acceptor.run())
        };
        let accepting = Some(accepting.map_err(fail("start a thread"))?);
        Ok(Server { core, wake, accepting })
    }

    /// Where to send events.
    pub fn events(&self) -> EventSink {
        EventSink { registry: Arc::clone(&self.core.registry) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let registry = &self.core.registry;
        registry.stopping.store(true, Ordering::Release);
        // The counter cannot overflow: this is the only write to it.
        let _ = self.wake.write(1);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        let all = || registry.sessions.lock().values().cloned().collect::<Vec<_>>();
        all().iter().for_each(|session| session.stop_reading());
        if !registry.wait_until_at_most(0) {
            all().iter().for_each(|session| session.close());
        }
    }
}

/// The accept thread.
struct Acceptor {
    core: Arc<Core>,
    wake: Arc<EventFd>,
    socket: BoundSocket,
    next: u64,
}

impl Acceptor {
    fn run(mut self) {
        let mut starved = false;
        while !self.core.stopping() {
            match self.wait(starved) {
                Ok(()) | Err(Errno::EINTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the control socket is out of order: nobody can connect any more");
                    return;
                }
            }
            starved = match self.socket.listener.accept() {
                Ok((stream, _)) => {
                    self.admit(stream);
                    false
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => false,
                Err(error) => {
                    tracing::warn!(%error, "a control client could not be accepted");
                    true
                }
            };
        }
    }

    /// Waits for a client or for the end. Out of file descriptors, the listener would be ready all
    /// the time: then only the end is waited for, and not for long.
    fn wait(&self, starved: bool) -> Result<(), Errno> {
        let wake = PollFd::new(self.wake.as_fd(), PollFlags::POLLIN);
        let listener = PollFd::new(self.socket.listener.as_fd(), PollFlags::POLLIN);
        if starved {
            poll(&mut [wake], PollTimeout::from(100u8))
        } else {
            poll(&mut [wake, listener], PollTimeout::NONE)
        }
        .map(|_ready| ())
    }

    fn admit(&mut self, stream: UnixStream) {
        if !self.core.registry.make_room() {
            tracing::warn!(clients_max = CLIENTS_MAX, "a control client was turned away: too many are connected");
            return turn_away(&stream);
        }
        let session = match Session::new(stream) {
            Ok(session) => Arc::new(session),
            Err(error) => return tracing::warn!(%error, "a control client could not be set up"),
        };
        let registry = Arc::clone(&self.core.registry);
        registry.sessions.lock().insert(self.next, Arc::clone(&session));
        let slot = Slot { session, registry, number: self.next };
        self.next += 1;
        if let Err(error) = session::start(&self.core, slot) {
            tracing::warn!(%error, "no thread for a control client");
        }
    }
}

/// Sends the reason, as far as that can be done without waiting.
fn turn_away(mut stream: &UnixStream) {
    let error = QmpError::generic(format!("{CLIENTS_MAX} clients are connected already; try again later"));
    if stream.set_nonblocking(true).is_ok() {
        let _ = stream.write(&message::reply(Err(error), None));
    }
}
