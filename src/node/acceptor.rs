//! Connections: who connects to us, whom we connect to, and the threads that read.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::{clock, priority};
use crate::checkpoint::stage::{Stager, StagingBudget};
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::{Channel, Hello, Message, RefuseReason};
use crate::protocol::types;
use crate::protocol::types::ConnId;
use crate::wire::block_hashes::decode_hashes;
use crate::wire::link::{Link, LinkError, LinkReader, Listener};
use crate::wire::{FrameKind, LinkCloser, LinkWriter, WireError};

/// How long an unknown peer may take to say hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection to a primary may take to stand.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Connections served at once; more are turned away at once.
const ACCEPTED_MAX: usize = 32;
/// Accepted connections are numbered from here; a secondary numbers its own from 1.
const ACCEPTED_FROM: ConnId = 1 << 32;

/// The two ears of a node.
pub struct Acceptor {
    next: AtomicU64,
    open: AtomicUsize,
    events: InboxSender,
}

impl Acceptor {
    /// Listens on both ports, in threads of their own, as long as the process lives.
    ///
    /// # Errors
    /// [`LinkError`] if a port cannot be had.
    pub fn open(data: SocketAddr, heartbeat: SocketAddr, events: InboxSender) -> Result<(), LinkError> {
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
        if self.events.from_link(NodeEvent::Accepted { conn, hello, writer, closer: closer.clone() }).is_err() {
            return;
        }
        priority::raise();
        let why = read_messages(conn, &mut reader, &self.events);
        closer.shutdown();
        // The node is ending if nobody listens.
        let _ = self.events.from_link(NodeEvent::Closed { conn, why });
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

/// Reads messages until the connection ends; why it did.
fn read_messages(conn: ConnId, reader: &mut LinkReader, events: &InboxSender) -> String {
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
        if events.from_link(event).is_err() {
            return "this node is ending".into();
        }
    }
}

/// Connects to a primary in a thread of its own, which then reads.
///
/// # Errors
/// If the thread cannot be started.
pub fn connect(conn: ConnId, to: SocketAddr, budget: Arc<StagingBudget>, events: InboxSender) -> std::io::Result<()> {
    spawn("mcd-receive", move || {
        let end = match Link::connect(&to.to_string(), CONNECT_TIMEOUT) {
            Ok(link) => {
                let closer = link.closer();
                let (reader, writer) = link.split();
                if events.from_link(NodeEvent::Connected { conn, writer, closer: closer.clone() }).is_err() {
                    return;
                }
                priority::raise();
                let end = Receiver { conn, budget, stager: None, began: clock::now(), events: &events }.run(reader);
                closer.shutdown();
                end
            }
            Err(error) => NodeEvent::Closed { conn, why: error.to_string() },
        };
        // The node is ending if nobody listens.
        let _ = events.from_link(end);
    })
}

/// Reads what a primary sends: messages, epochs, background pages.
struct Receiver<'a> {
    conn: ConnId,
    budget: Arc<StagingBudget>,
    /// There is one once the primary's welcome told the guest's size.
    stager: Option<Stager>,
    /// When the epoch that is arriving, or the last one, began to.
    began: types::Instant,
    events: &'a InboxSender,
}

impl Receiver<'_> {
    /// Reads until there is no more to read; the event that says why.
    fn run(mut self, mut reader: LinkReader) -> NodeEvent {
        let conn = self.conn;
        loop {
            let event = match reader.read() {
                Ok(frame) if frame.kind == FrameKind::Probe => continue,
                Ok(frame) if frame.kind == FrameKind::Message => frame.message().map(|message| self.message(message)),
                Ok(frame) => Ok(self.bulk(frame.kind, frame.payload)),
                Err(error) => Err(error),
            };
            let event = match event {
                Ok(event) => event,
                Err(error) if error.is_foreign() => return NodeEvent::Foreign { conn, why: error.to_string() },
                Err(error) => return NodeEvent::Closed { conn, why: error.to_string() },
            };
            let sent = match event {
                Ok(Some(event)) => self.events.from_link(event).map_err(|_| "this node is ending".to_owned()),
                Ok(None) => Ok(()),
                Err(why) => Err(why),
            };
            if let Err(why) = sent {
                return NodeEvent::Closed { conn, why };
            }
        }
    }

    fn message(&mut self, message: Message) -> Result<Option<NodeEvent>, String> {
        let conn = self.conn;
        match message {
            Message::EpochBegin { id, completes_resync } => {
                self.began = clock::now();
                self.stager()?.begin(id, completes_resync).map_err(|error| error.to_string())?;
                Ok(None)
            }
            Message::EpochEnd { id, pages, state_bytes, digest } => {
                let epoch = self.stager()?.end(id, pages, state_bytes, digest).map_err(|error| error.to_string())?;
                Ok(Some(NodeEvent::Staged { conn, epoch: Box::new(epoch), began: self.began }))
            }
            message => {
                if let Message::Welcome(welcome) = &message {
                    let pages = ImageLayout::of(&welcome.shape).pages();
                    self.stager = Some(Stager::new(self.budget.clone(), pages));
                }
                Ok(Some(NodeEvent::Message { conn, message }))
            }
        }
    }

    fn bulk(&mut self, kind: FrameKind, payload: &[u8]) -> Result<Option<NodeEvent>, String> {
        let conn = self.conn;
        let stager = self.stager()?;
        let staged = match kind {
            FrameKind::Pages => stager.pages(payload).map(|()| None),
            FrameKind::State => stager.state(payload).map(|()| None),
            FrameKind::Background => {
                stager.background(payload).map(|payload| Some(NodeEvent::Background { conn, payload }))
            }
            FrameKind::Hashes => return Err("the primary sent hashes, which are a secondary's to send".into()),
            FrameKind::Message | FrameKind::Probe => Ok(None),
        };
        staged.map_err(|error| error.to_string())
    }

    fn stager(&mut self) -> Result<&mut Stager, String> {
        self.stager.as_mut().ok_or_else(|| "the primary sent an epoch before its welcome".into())
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(run).map(|_| ())
}
