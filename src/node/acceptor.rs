//! Connections: who connects to us, whom we connect to, and the threads that read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;

use super::events::NodeEvent;
use super::{clock, priority};
use crate::checkpoint::receiver::{EpochReceiver, ReceiveError, Received};
use crate::checkpoint::stage::StagingBudget;
use crate::protocol::messages::{Channel, Hello, Message, RefuseReason};
use crate::protocol::types::ConnId;
use crate::wire::block_hashes::decode_hashes;
use crate::wire::link::{Link, LinkError, LinkReader, Listener};
use crate::wire::{FrameKind, LinkCloser, LinkWriter, WireError};
use crate::wire::{HeartbeatError, HeartbeatPeer, heartbeat_message};

/// How long an unknown peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection to a primary may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections served at once; more are turned away at once.
const ACCEPTED_MAX: usize = 32;
/// Accepted connections are numbered from here; a secondary numbers its own from 1.
const ACCEPTED_FROM: ConnId = 1 << 32;
/// Why a connection ends when the node does.
const ENDING: &str = "this node is ending";

/// The two ears of a node.
pub struct Acceptor {
    next: AtomicU64,
    open: AtomicUsize,
    events: Sender<NodeEvent>,
}

impl Acceptor {
    /// Listens on both ports, in threads of their own, as long as the process lives.
    ///
    /// # Errors
    /// [`LinkError`] if a port cannot be had.
    pub fn open(data: SocketAddr, heartbeat: SocketAddr, events: Sender<NodeEvent>) -> Result<(), LinkError> {
        let acceptor = Arc::new(Acceptor { next: AtomicU64::new(ACCEPTED_FROM), open: AtomicUsize::new(0), events });
        for (at, channel) in [(data, Channel::Data), (heartbeat, Channel::Heartbeat)] {
            let listener = Listener::bind(&at.to_string())?;
            let acceptor = acceptor.clone();
            spawn("mcd-listen", move || acceptor.listen(&listener, channel))
                .map_err(|source| LinkError::Listen { at: at.to_string(), source })?;
        }
        Ok(())
    }

    fn listen(self: Arc<Self>, listener: &Listener, channel: Channel) {
        loop {
            match listener.accept() {
                Ok(link) => self.clone().admit(link, channel),
                Err(LinkError::ListenerClosed) => return,
                Err(error) => {
                    tracing::warn!(%error, "listening");
                    // Most likely out of file descriptors: trying again at once would only burn
                    // time.
                    std::thread::park_timeout(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: Arc<Self>, link: Link, channel: Channel) {
        if self.open.fetch_add(1, Ordering::Relaxed) >= ACCEPTED_MAX {
            self.open.fetch_sub(1, Ordering::Relaxed);
            let why = format!("{ACCEPTED_MAX} connections are open; try again later");
            return turn_away(link.peer(), &link.closer(), &mut link.split().1, Some(RefuseReason::Busy), why);
        }
        let acceptor = self.clone();
        let served = spawn("mcd-accepted", move || {
            acceptor.serve(link, channel);
            acceptor.open.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = served {
            self.open.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!(%error, "a connection was turned away");
        }
    }

    fn serve(&self, link: Link, channel: Channel) {
        let (peer, closer) = (link.peer(), link.closer());
        let (mut reader, mut writer) = link.split();
        let hello = match read_hello(&mut reader, channel) {
            Ok(hello) => hello,
            Err((reason, why)) => return turn_away(peer, &closer, &mut writer, reason, why),
        };
        let conn = self.next.fetch_add(1, Ordering::Relaxed);
        if self.events.send(NodeEvent::Accepted { conn, hello, writer, closer: closer.clone() }).is_err() {
            return;
        }
        priority::raise();
        let why = match channel {
            Channel::Data => read_data(conn, &mut reader, &self.events),
            Channel::Heartbeat => read_heartbeats(conn, HeartbeatPeer::Secondary, &mut reader, &self.events)
                .map_or(ENDING.into(), |error| error.to_string()),
        };
        closer.shutdown();
        // The node is ending if nobody listens.
        let _ = self.events.send(NodeEvent::Closed { conn, why });
    }
}

/// Reads the hello that belongs on `channel`'s port; else why there is none, and the refusal for
/// those who would understand one.
fn read_hello(reader: &mut LinkReader, channel: Channel) -> Result<Hello, (Option<RefuseReason>, String)> {
    reader.set_read_deadline(Some(Instant::now() + HELLO_TIMEOUT));
    let message = reader.read().and_then(|frame| frame.message()).map_err(|error| {
        let reason = match &error {
            WireError::OtherVersion { .. } => Some(RefuseReason::Version),
            error if error.is_disconnect() || error.is_timeout() || matches!(error, WireError::NotMcd { .. }) => None,
            _ => Some(RefuseReason::Malformed),
        };
        let why = if error.is_timeout() { "it said no hello in time".into() } else { error.to_string() };
        (reason, why)
    })?;
    reader.set_read_deadline(None);
    match message {
        Message::Hello(hello) if hello.channel == channel => Ok(hello),
        Message::Hello(_) => Err((
            Some(RefuseReason::Malformed),
            match channel {
                Channel::Data => {
                    "this is the data port, and the hello is for heartbeats; check --peer-heartbeat".into()
                }
                Channel::Heartbeat => "this is the heartbeat port, and the hello is for data; check --peer".into(),
            },
        )),
        other => Err((Some(RefuseReason::Malformed), format!("a newcomer begins with a hello, not {}", other.name()))),
    }
}

/// Ends a connection that is of no use, and says why: in the log, and to an unknown peer who would
/// understand it.
fn turn_away(
    peer: SocketAddr,
    closer: &LinkCloser,
    writer: &mut LinkWriter,
    reason: Option<RefuseReason>,
    why: String,
) {
    tracing::warn!(%peer, "a unknown_peer was turned away: {why}");
    if let Some(reason) = reason {
        // A short message on a fresh connection: it fits the socket's buffer. Whether it is heard
        // is the unknown peer's business.
        let _ = writer.write_message(&Message::Refuse { reason, detail: why });
    }
    closer.shutdown();
}

/// Reads a secondary's messages until the data connection ends; why it did.
fn read_data(conn: ConnId, reader: &mut LinkReader, events: &Sender<NodeEvent>) -> String {
    loop {
        let event = match reader.read() {
            Ok(frame) if frame.kind == FrameKind::Probe => continue,
            Ok(frame) if frame.kind == FrameKind::Hashes => {
                decode_hashes(frame.payload).map(|(first, hashes)| NodeEvent::PeerHashes { conn, first, hashes })
            }
            Ok(frame) => frame.message().map(|message| NodeEvent::Message { conn, message }),
            Err(error) => Err(error),
        };
        let event = match event {
            Ok(event) => event,
            Err(error) => return error.to_string(),
        };
        if events.send(event).is_err() {
            return ENDING.into();
        }
    }
}

/// Reads `peer`'s heartbeats until the connection ends; `None` if this node does.
fn read_heartbeats(
    conn: ConnId,
    peer: HeartbeatPeer,
    reader: &mut LinkReader,
    events: &Sender<NodeEvent>,
) -> Option<HeartbeatError> {
    loop {
        let message = match reader.read().map_err(HeartbeatError::from) {
            Ok(frame) => heartbeat_message(peer, frame),
            Err(error) => Err(error),
        };
        match message {
            Ok(message) => events.send(NodeEvent::Message { conn, message }).ok()?,
            Err(error) => return Some(error),
        }
    }
}

/// Connects to a primary's `channel` in a thread of its own, which then reads.
///
/// # Errors
/// If the thread cannot be started.
pub fn connect(
    conn: ConnId,
    (to, channel): (SocketAddr, Channel),
    budget: Arc<StagingBudget>,
    events: Sender<NodeEvent>,
) -> std::io::Result<()> {
    spawn("mcd-receive", move || {
        let end = match Link::connect(&to.to_string(), CONNECT_TIMEOUT) {
            Ok(link) => {
                let closer = link.closer();
                let (mut reader, writer) = link.split();
                if events.send(NodeEvent::Connected { conn, writer, closer: closer.clone() }).is_err() {
                    return;
                }
                priority::raise();
                let end = match channel {
                    Channel::Data => receive(conn, EpochReceiver::new(budget), &mut reader, &events),
                    Channel::Heartbeat => {
                        let error = read_heartbeats(conn, HeartbeatPeer::Primary, &mut reader, &events);
                        ended(conn, error.map(|error| (error.is_foreign(), error.to_string())))
                    }
                };
                closer.shutdown();
                end
            }
            Err(error) => NodeEvent::Closed { conn, why: error.to_string() },
        };
        // The node is ending if nobody listens.
        let _ = events.send(end);
    })
}

/// Reads what a primary sends over the data connection until there is no more to read; the event
/// that says why.
fn receive(
    conn: ConnId,
    mut receiver: EpochReceiver,
    reader: &mut LinkReader,
    events: &Sender<NodeEvent>,
) -> NodeEvent {
    loop {
        let received = match reader.read().map_err(ReceiveError::from) {
            Ok(frame) => receiver.take(clock::now(), frame),
            Err(error) => Err(error),
        };
        let event = match received {
            Ok(Received::Nothing) => continue,
            Ok(Received::Message(message)) => NodeEvent::Message { conn, message },
            Ok(Received::Epoch { epoch, began }) => NodeEvent::Staged { conn, epoch, began },
            Ok(Received::Background(payload)) => NodeEvent::Background { conn, payload },
            Err(error) => return ended(conn, Some((error.is_foreign(), error.to_string()))),
        };
        if events.send(event).is_err() {
            return ended(conn, None);
        }
    }
}

/// The event of a connection that ended: because of a peer that may be foreign, with the reason in
/// words, or because this node ends.
fn ended(conn: ConnId, error: Option<(bool, String)>) -> NodeEvent {
    match error {
        Some((true, why)) => NodeEvent::Foreign { conn, why },
        Some((false, why)) => NodeEvent::Closed { conn, why },
        None => NodeEvent::Closed { conn, why: ENDING.into() },
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(|_| ())
}
