//! What waits to be written to one client: replies in order, events between them, all of it
//! bounded.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// Replies that may wait; then the executor waits, and in the end so does the client.
const REPLIES_MAX: usize = 8;

/// Events that may wait; the node never waits for a client, so one that lets more pile up is cut
/// off.
pub(super) const EVENTS_MAX: usize = 1024;

/// Bytes of events that may wait.
const EVENT_BYTES_MAX: usize = 1 << 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Nothing more comes in; what is there is still written.
    Finishing,
    /// Nothing is written any more.
    Closed,
}

enum Item {
    Reply(Vec<u8>),
    Event(Arc<[u8]>),
}

struct Inner {
    state: State,
    items: VecDeque<Item>,
    replies: usize,
    events: usize,
    event_bytes: usize,
}

/// A bounded queue from many threads to one writer.
pub(super) struct Outbox {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Outbox {
    pub(super) fn new() -> Outbox {
        let inner = Inner { state: State::Open, items: VecDeque::new(), replies: 0, events: 0, event_bytes: 0 };
        Outbox { inner: Mutex::new(inner), changed: Condvar::new() }
    }

    /// Adds a reply, waiting for room. False if the client is gone.
    pub(super) fn push_reply(&self, bytes: Vec<u8>) -> bool {
        let mut inner = self.inner.lock();
        while inner.state == State::Open && inner.replies >= REPLIES_MAX {
            self.changed.wait(&mut inner);
        }
        if inner.state != State::Open {
            return false;
        }
        inner.replies += 1;
        inner.items.push_back(Item::Reply(bytes));
        self.changed.notify_all();
        true
    }

    /// Adds an event without waiting. False if the client has let too many pile up: cut it off.
    pub(super) fn push_event(&self, bytes: &Arc<[u8]>) -> bool {
        let mut inner = self.inner.lock();
        if inner.state != State::Open {
            return true;
        }
        if inner.events >= EVENTS_MAX || inner.event_bytes.saturating_add(bytes.len()) > EVENT_BYTES_MAX {
            return false;
        }
        inner.events += 1;
        inner.event_bytes += bytes.len();
        inner.items.push_back(Item::Event(Arc::clone(bytes)));
        self.changed.notify_all();
        true
    }

    /// Waits for the next message and gives it to `write`. False when there will be no more.
    pub(super) fn take(&self, write: impl FnOnce(&[u8]) -> bool) -> bool {
        let item = {
            let mut inner = self.inner.lock();
            loop {
                if inner.state == State::Closed {
                    return false;
                }
                if let Some(item) = inner.items.pop_front() {
                    match &item {
                        Item::Reply(_) => inner.replies -= 1,
                        Item::Event(bytes) => {
                            inner.events -= 1;
                            inner.event_bytes -= bytes.len();
                        }
                    }
                    self.changed.notify_all();
                    break item;
                }
                if inner.state == State::Finishing {
                    return false;
                }
                self.changed.wait(&mut inner);
            }
        };
        match item {
            Item::Reply(bytes) => write(&bytes),
            Item::Event(bytes) => write(&bytes),
        }
    }

    /// Takes nothing more; the writer ends once it has written what is there.
    pub(super) fn finish(&self) {
        let mut inner = self.inner.lock();
        if inner.state == State::Open {
            inner.state = State::Finishing;
            self.changed.notify_all();
        }
    }

    /// Throws away what is there and ends the writer.
    pub(super) fn close(&self) {
        let mut inner = self.inner.lock();
        inner.state = State::Closed;
        inner.items.clear();
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(outbox: &Outbox) -> Vec<Vec<u8>> {
        let mut seen = Vec::new();
        while outbox.take(|bytes| {
            seen.push(bytes.to_vec());
            true
        }) {}
        seen
    }

    #[test]
    fn what_was_put_in_before_the_end_comes_out_in_order() {
        let outbox = Outbox::new();
        assert!(outbox.push_reply(b"1".to_vec()));
        assert!(outbox.push_event(&Arc::from(&b"2"[..])));
        outbox.finish();
        assert!(!outbox.push_reply(b"3".to_vec()));
        assert_eq!(drain(&outbox), [b"1".to_vec(), b"2".to_vec()]);
    }

    #[test]
    fn events_are_bounded_by_number_and_bytes() {
        let outbox = Outbox::new();
        let small: Arc<[u8]> = Arc::from(&b"e"[..]);
        for _ in 0..EVENTS_MAX {
            assert!(outbox.push_event(&small));
        }
        assert!(!outbox.push_event(&small));
        let outbox = Outbox::new();
        assert!(!outbox.push_event(&Arc::from(vec![0; EVENT_BYTES_MAX + 1])));
    }

    #[test]
    fn a_waiting_reply_is_let_in_by_the_writer_and_let_go_by_the_end() {
        let outbox = Outbox::new();
        for _ in 0..REPLIES_MAX {
            assert!(outbox.push_reply(vec![]));
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| outbox.push_reply(vec![]));
            assert!(outbox.take(|_| true));
            assert!(waiting.join().unwrap());
            let waiting = scope.spawn(|| outbox.push_reply(vec![]));
            outbox.close();
            assert!(!waiting.join().unwrap());
        });
        assert!(!outbox.take(|_| true));
    }
}
