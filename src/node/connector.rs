//! The connections this node opens: to its primary, each with a thread that reads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::{clock, priority};
use crate::checkpoint::stage::{Stager, StagingBudget};
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::Message;
use crate::protocol::types::{ConnId, Instant};
use crate::wire::FrameKind;
use crate::wire::link::{Link, LinkReader};

/// How long a connection to a primary may take to be established.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// Connects to a primary in a thread of its own, which then reads.
///
/// # Errors
/// If the thread cannot be started.
pub(crate) fn connect(
    conn: ConnId,
    to: SocketAddr,
    budget: Arc<StagingBudget>,
    events: InboxSender,
) -> std::io::Result<()> {
    std::thread::Builder::new().name("mcd-receive".into()).spawn(move || {
        let end = match Link::connect(&to.to_string(), CONNECT_TIMEOUT) {
            Ok(link) => {
                let closer = link.closer();
                let (reader, writer) = link.split();
                if events.link_event(NodeEvent::Connected { conn, writer, closer: closer.clone() }).is_err() {
                    return;
                }
                priority::raise();
                let end = Receiver { conn, budget, stager: None, began: clock::now(), events: &events }.run(reader);
                closer.shutdown();
                end
            }
            Err(error) => NodeEvent::Closed { conn, why: error.to_string() },
        };
        // A node that is ending needs no more events.
        let _ = events.link_event(end);
    })?;
    Ok(())
}

/// Reads what a primary sends: messages, epochs, background pages.
struct Receiver<'a> {
    conn: ConnId,
    budget: Arc<StagingBudget>,
    /// There is one once the primary's welcome has arrived, which has the guest's size.
    stager: Option<Stager>,
    /// When the epoch that is arriving, or the last one, began to.
    began: Instant,
    events: &'a InboxSender,
}

impl Receiver<'_> {
    /// Reads until the connection ends; the event of its end.
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
                Ok(Some(event)) => self.events.link_event(event).map_err(|_| "this node is ending".to_owned()),
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
