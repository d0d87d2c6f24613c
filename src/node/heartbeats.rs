//! The thread that sends heartbeats, so that nothing else this node does delays them.
//!
//! The protocol feeds it: each heartbeat it is given is sent at once and then repeated every
//! interval, up to a deadline. An engine that hangs feeds it no more, so it falls silent at the
//! deadline, and the peer does what it does about a dead node.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::{clock, priority};
use crate::protocol::messages::{Heartbeat, Message};
use crate::protocol::types::{ConnId, Instant};
use crate::wire::LinkWriter;

/// What is sent on the heartbeat connection.
struct Beats {
    conn: ConnId,
    /// Absent while the thread writes with it.
    writer: Option<LinkWriter>,
    interval: Duration,
    sequence: u64,
    beat: Heartbeat,
    /// When the next one leaves, and after which none does.
    next: Instant,
    until: Instant,
}

#[derive(Default)]
struct State {
    beats: Option<Beats>,
    ends: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// A handle to the thread, which ends with it.
pub(super) struct HeartbeatThread {
    shared: Arc<Shared>,
}

impl HeartbeatThread {
    /// Starts the thread. It sends nothing yet.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub(super) fn start(events: InboxSender) -> std::io::Result<HeartbeatThread> {
        let shared = Arc::new(Shared::default());
        let mine = Arc::clone(&shared);
        std::thread::Builder::new().name("mcd-heartbeat".into()).spawn(move || {
            clock::sharpen_timers();
            priority::raise();
            send_when_due(&mine, &events);
        })?;
        Ok(HeartbeatThread { shared })
    }

    /// The connection that heartbeats leave on, if there is one.
    pub(super) fn conn(&self) -> Option<ConnId> {
        self.shared.state.lock().beats.as_ref().map(|beats| beats.conn)
    }

    /// Heartbeats leave on this connection from now on, beginning with this one.
    pub(super) fn open(&self, conn: ConnId, writer: LinkWriter, interval: Duration, beat: Heartbeat, until: Instant) {
        let next = clock::now();
        let beats = Beats { conn, writer: Some(writer), interval, sequence: 0, beat, next, until };
        self.shared.state.lock().beats = Some(beats);
        self.shared.changed.notify_one();
    }

    /// The heartbeat to send from now on, up to `until`; the first at once.
    pub(super) fn feed(&self, beat: Heartbeat, until: Instant) {
        let mut state = self.shared.state.lock();
        if let Some(beats) = &mut state.beats {
            (beats.beat, beats.until, beats.next) = (beat, until, clock::now());
            self.shared.changed.notify_one();
        }
    }

    /// The connection is given up.
    pub(super) fn close(&self, conn: ConnId) {
        self.shared.state.lock().beats.take_if(|beats| beats.conn == conn);
    }
}

impl Drop for HeartbeatThread {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        (state.beats, state.ends) = (None, true);
        drop(state);
        // Nobody waits for it: it may be inside a write that a full socket holds up, until the
        // owner of the connection closes that.
        self.shared.changed.notify_one();
    }
}

fn send_when_due(shared: &Shared, events: &InboxSender) {
    let mut state = shared.state.lock();
    while !state.ends {
        let now = clock::now();
        let due = state.beats.as_mut().filter(|beats| now < beats.until).map(|beats| beats.next);
        match due {
            None => shared.changed.wait(&mut state),
            Some(at) if now < at => drop(shared.changed.wait_for(&mut state, at.since(now))),
            Some(_) => {
                let Some((conn, writer, message)) = state.beats.as_mut().and_then(|beats| beats.take(now)) else {
                    shared.changed.wait(&mut state);
                    continue;
                };
                drop(state);
                let (writer, written) = write(writer, &message);
                state = shared.state.lock();
                match written {
                    Ok(()) => give_back(&mut state, conn, writer),
                    Err(why) => {
                        state.beats.take_if(|beats| beats.conn == conn);
                        // A node that is ending needs no more events.
                        let _ = events.report(NodeEvent::Closed { conn, why });
                    }
                }
            }
        }
    }
}

impl Beats {
    /// What to write now, and with what; the next one is due an interval later.
    fn take(&mut self, now: Instant) -> Option<(ConnId, LinkWriter, Message)> {
        let writer = self.writer.take()?;
        self.sequence += 1;
        self.next = now + self.interval;
        Some((self.conn, writer, Message::Heartbeat(Heartbeat { sequence: self.sequence, ..self.beat })))
    }
}

fn write(mut writer: LinkWriter, message: &Message) -> (LinkWriter, Result<(), String>) {
    let written = writer.write_message(message).map_err(|error| error.to_string());
    (writer, written)
}

fn give_back(state: &mut State, conn: ConnId, writer: LinkWriter) {
    if let Some(beats) = state.beats.as_mut().filter(|beats| beats.conn == conn) {
        beats.writer = Some(writer);
    }
}
