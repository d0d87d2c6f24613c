//! The connections that others open to this node: who is let in, and the threads that read.
//!
//! Who may stay without having said hello, for how long, and what is reported of those who may not,
//! is decided by [`Admission`]; here it is carried out.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::{clock, priority};
use crate::protocol::admission::{
    Admission, AdmissionConfig, Arrival, Overdue, Refusal, Source, TurnedAway, first_hello,
};
use crate::protocol::messages::{Channel, Hello, Message, RefuseReason};
use crate::protocol::types::ConnId;
use crate::wire::block_hashes::decode_hashes;
use crate::wire::link::{Link, LinkError, LinkReader, Listener};
use crate::wire::{FrameKind, LinkCloser, LinkWriter, WireError};
use crate::wire::{HeartbeatError, HeartbeatPeer, heartbeat_message};

/// A pair needs two connections, and for a moment four when it forms anew.
const ADMISSION: AdmissionConfig = AdmissionConfig {
    silent_max: 32,
    silent_per_address_max: 8,
    greeted_max: 32,
    greeted_per_address_max: 8,
    hello_timeout: Duration::from_secs(5),
    report_interval: Duration::from_secs(3),
};
/// Accepted connections are numbered from here; a secondary numbers its own from 1.
const ACCEPTED_FROM: ConnId = 1 << 32;
/// Why a connection ends when the node does.
pub(super) const ENDING: &str = "this node is ending";

/// Listens on both ports, in threads of their own, as long as the process lives.
///
/// # Errors
/// [`LinkError`] if a port cannot be had.
pub(super) fn listen(data: SocketAddr, heartbeat: SocketAddr, events: InboxSender) -> Result<(), LinkError> {
    let admissions = Admissions { admission: Admission::new(ADMISSION, ACCEPTED_FROM), silent: BTreeMap::new() };
    let acceptor = Arc::new(Acceptor { admissions: Mutex::new(admissions), changed: Condvar::new(), events });
    for (at, channel) in [(data, Channel::Data), (heartbeat, Channel::Heartbeat)] {
        let listener = Listener::bind(&at.to_string())?;
        let acceptor = acceptor.clone();
        spawn("mcd-listen", move || acceptor.accept_from(&listener, channel))
            .map_err(|source| LinkError::Listen { at: at.to_string(), source })?;
    }
    spawn("mcd-admission", move || acceptor.carry_out_what_is_overdue())
        .map_err(|source| LinkError::Listen { at: data.to_string(), source })
}

/// A connection that has not said hello.
struct Silent {
    peer: SocketAddr,
    writer: LinkWriter,
    closer: LinkCloser,
}

struct Admissions {
    admission: Admission<Source>,
    /// The connections that may still say hello.
    silent: BTreeMap<ConnId, Silent>,
}

struct Acceptor {
    admissions: Mutex<Admissions>,
    /// There may be something new for the thread that waits for what is overdue.
    changed: Condvar,
    events: InboxSender,
}

impl Acceptor {
    fn accept_from(self: Arc<Self>, listener: &Listener, channel: Channel) {
        loop {
            match listener.accept() {
                Ok(link) => self.clone().admit(link, channel),
                Err(LinkError::ListenerClosed) => return,
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Most likely out of file descriptors: trying again at once would only burn
                    // time.
                    std::thread::park_timeout(Duration::from_millis(100));
                }
            }
        }
    }

    fn admit(self: Arc<Self>, link: Link, channel: Channel) {
        let (peer, closer) = (link.peer(), link.closer());
        let (reader, writer) = link.split();
        let silent = Silent { peer, writer, closer };
        let mut admissions = self.admissions.lock();
        let (conn, close) = match admissions.admission.arrived(clock::now(), source_of(peer.ip())) {
            Arrival::Admit { conn, close } => (conn, close),
            Arrival::TurnAway(why) => {
                drop(admissions);
                return self.refuse(silent, &why);
            }
        };
        let closed = close.and_then(|conn| admissions.silent.remove(&conn));
        admissions.silent.insert(conn, silent);
        drop(admissions);
        self.changed.notify_all();
        if let Some(closed) = closed {
            self.refuse(closed, &TurnedAway::Displaced);
        }
        let acceptor = self.clone();
        if let Err(error) = spawn("mcd-accepted", move || acceptor.serve(conn, reader, channel)) {
            let mut admissions = self.admissions.lock();
            admissions.admission.gone(conn);
            let silent = admissions.silent.remove(&conn);
            drop(admissions);
            if let Some(silent) = silent {
                self.refuse(silent, &TurnedAway::NoThread(error.to_string()));
            }
        }
    }

    fn serve(&self, conn: ConnId, mut reader: LinkReader, channel: Channel) {
        let hello = read_hello(&mut reader, channel);
        let mut admissions = self.admissions.lock();
        // Closed meanwhile, and refused by whoever did it.
        let Some(silent) = admissions.silent.remove(&conn) else { return };
        let greeted = match hello {
            Ok(hello) => admissions.admission.said_hello(conn).map(|()| hello),
            Err(why) => {
                admissions.admission.gone(conn);
                Err(why)
            }
        };
        drop(admissions);
        match greeted {
            Ok(hello) => self.read(conn, hello, reader, silent),
            Err(why) => self.refuse(silent, &why),
        }
    }

    /// Reads what follows the hello, until the connection ends.
    fn read(&self, conn: ConnId, hello: Hello, mut reader: LinkReader, silent: Silent) {
        let Silent { writer, closer, .. } = silent;
        let channel = hello.channel;
        let accepted = NodeEvent::Accepted { conn, hello, writer, closer: closer.clone() };
        // Whoever has an event drives the engine with it.
        priority::raise();
        if self.events.link_event(accepted).is_ok() {
            let why = match channel {
                Channel::Data => read_data(conn, &mut reader, &self.events),
                Channel::Heartbeat => read_heartbeats(conn, HeartbeatPeer::Secondary, &mut reader, &self.events)
                    .map_or(ENDING.into(), |error| error.to_string()),
            };
            closer.shutdown();
            // A node that is ending needs no more events.
            let _ = self.events.link_event(NodeEvent::Closed { conn, why });
        }
        self.admissions.lock().admission.gone(conn);
    }

    /// Closes a connection with a line in the log, and with a refusal if the peer would understand
    /// one.
    fn refuse(&self, silent: Silent, why: &TurnedAway) {
        let Silent { peer, mut writer, closer } = silent;
        if self.admissions.lock().admission.refused(clock::now(), why.refusal()) {
            tracing::warn!(%peer, "an unknown peer was turned away: {why}");
        }
        self.changed.notify_all();
        if let Some(reason) = why.reason() {
            // A short message on a connection that carried nothing yet: it fits the socket's
            // buffer. Whether the peer reads it does not matter here.
            let _ = writer.write_message(&Message::Refuse { reason, detail: why.to_string() });
        }
        closer.shutdown();
    }

    fn carry_out_what_is_overdue(&self) {
        let mut admissions = self.admissions.lock();
        loop {
            match admissions.admission.poll(clock::now()) {
                Some(Overdue::Close(conn)) => {
                    let Some(silent) = admissions.silent.remove(&conn) else { continue };
                    drop(admissions);
                    self.refuse(silent, &TurnedAway::Late);
                    admissions = self.admissions.lock();
                }
                Some(Overdue::Report(refusal, count)) => match refusal {
                    Refusal::Crowded => tracing::warn!(count, "more unknown peers were turned away: too many are open"),
                    Refusal::NoHello => {
                        tracing::warn!(count, "more unknown peers were turned away: they said no hello")
                    }
                },
                None => match admissions.admission.poll_timeout() {
                    None => self.changed.wait(&mut admissions),
                    Some(at) => drop(self.changed.wait_for(&mut admissions, clock::until(at))),
                },
            }
        }
    }
}

fn source_of(address: IpAddr) -> Source {
    match address {
        IpAddr::V4(address) => Source::V4(address.octets()),
        IpAddr::V6(address) => Source::of_v6(address.octets()),
    }
}

/// Reads the hello that belongs on `channel`'s port; else why there is none.
fn read_hello(reader: &mut LinkReader, channel: Channel) -> Result<Hello, TurnedAway> {
    let message = reader.read().and_then(|frame| frame.message()).map_err(|error| {
        let reason = match &error {
            WireError::OtherVersion { .. } => Some(RefuseReason::Version),
            error if error.is_disconnect() || matches!(error, WireError::NotMcd { .. }) => None,
            _ => Some(RefuseReason::Malformed),
        };
        TurnedAway::Unreadable { reason, why: error.to_string() }
    })?;
    first_hello(channel, message)
}

/// Reads a secondary's messages until the data connection ends; why it did.
fn read_data(conn: ConnId, reader: &mut LinkReader, events: &InboxSender) -> String {
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
        if events.link_event(event).is_err() {
            return ENDING.into();
        }
    }
}

/// Reads `peer`'s heartbeats until the connection ends; `None` if this node does.
pub(super) fn read_heartbeats(
    conn: ConnId,
    peer: HeartbeatPeer,
    reader: &mut LinkReader,
    events: &InboxSender,
) -> Option<HeartbeatError> {
    loop {
        let message = match reader.read().map_err(HeartbeatError::from) {
            Ok(frame) => heartbeat_message(peer, frame),
            Err(error) => Err(error),
        };
        match message {
            Ok(message @ Message::Heartbeat(_)) => events.heartbeat(conn, message),
            Ok(message) => events.link_event(NodeEvent::Message { conn, message }).ok()?,
            Err(error) => return Some(error),
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(|_| ())
}
