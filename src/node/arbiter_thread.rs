//! The thread that talks to the arbiter, so that nobody else ever waits for it. Which question
//! comes next, and what people are told of an arbiter out of reach, is decided by [`ArbiterQueue`].

use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::{clock, priority};
use crate::arbiter::{Arbiter, ArbiterError, Canceller, Swap};
use crate::protocol::arbiter_queue::{ArbiterQueue, NextQuestion};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};
use crate::protocol::event::Event;

/// Time without a question after which the thread reads the record itself.
const WATCH: Duration = Duration::from_secs(5);

/// What a read or a swap showed of the arbiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contact {
    /// Why it is out of reach, if it is.
    pub(super) lost: Option<String>,
    /// What people are to be told of it.
    pub(super) event: Option<Event>,
}

/// A handle to the arbiter's thread. Dropping it ends the thread once the question in hand is
/// answered or called off.
pub(crate) struct ArbiterThread {
    calls: Option<Sender<ArbiterCall>>,
    cancel: Option<Canceller>,
    thread: Option<JoinHandle<()>>,
}

impl ArbiterThread {
    /// Starts the thread; answers go to `events`, and `noticed` hears each time whether the arbiter
    /// answered.
    pub(crate) fn start(
        arbiter: Box<dyn Arbiter>,
        events: InboxSender,
        noticed: impl FnMut(Contact) + Send + 'static,
    ) -> std::io::Result<ArbiterThread> {
        ArbiterThread::start_watching(arbiter, events, WATCH, noticed)
    }

    /// The same, with another time than [`WATCH`].
    pub(crate) fn start_watching(
        arbiter: Box<dyn Arbiter>,
        events: InboxSender,
        watch: Duration,
        noticed: impl FnMut(Contact) + Send + 'static,
    ) -> std::io::Result<ArbiterThread> {
        let (calls, questions) = unbounded::<ArbiterCall>();
        let cancel = arbiter.canceller();
        let thread = std::thread::Builder::new().name("mcd-arbiter".into()).spawn(move || {
            // A takeover waits for it; between questions it sleeps.
            priority::raise();
            work(arbiter, &questions, &events, watch, noticed)
        })?;
        Ok(ArbiterThread { calls: Some(calls), cancel, thread: Some(thread) })
    }

    /// Asks; the answer comes as an event.
    pub(crate) fn ask(&self, call: ArbiterCall) {
        if let Some(calls) = &self.calls {
            // The thread ends only with this handle, so the question always arrives.
            let _ = calls.send(call);
        }
    }
}

impl Drop for ArbiterThread {
    fn drop(&mut self) {
        self.calls = None;
        if let Some(cancel) = &self.cancel {
            cancel();
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn work(
    mut arbiter: Box<dyn Arbiter>,
    questions: &Receiver<ArbiterCall>,
    events: &InboxSender,
    watch: Duration,
    mut noticed: impl FnMut(Contact),
) {
    let mut queue = ArbiterQueue::new(watch, clock::now());
    loop {
        let (ticket, request) = match queue.next(clock::now()) {
            NextQuestion::Ask(ArbiterCall { ticket, request }) => (Some(ticket), request),
            NextQuestion::Look => (None, ArbiterRequest::Read),
            NextQuestion::Wait(until) => match questions.recv_timeout(clock::until(until)) {
                Ok(call) => {
                    take_in(&mut queue, call);
                    continue;
                }
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break,
            },
        };
        let answer = answer(arbiter.as_mut(), request);
        tracing::debug!(?ticket, ?request, ?answer, "the arbiter was asked");
        let event = queue.answered(clock::now(), &request, &answer);
        noticed(Contact { lost: queue.lost().map(str::to_owned), event });
        if let Some(ticket) = ticket
            && events.report(NodeEvent::Answer { ticket, answer }).is_err()
        {
            break;
        }
        // What was asked meanwhile.
        questions.try_iter().for_each(|call| take_in(&mut queue, call));
    }
}

fn take_in(queue: &mut ArbiterQueue, call: ArbiterCall) {
    if let Some(superseded) = queue.ask(call) {
        tracing::debug!(?superseded, ?call, "a question to the arbiter was superseded before it was asked");
    }
}

fn answer(arbiter: &mut dyn Arbiter, request: ArbiterRequest) -> ArbiterAnswer {
    ask(arbiter, request).unwrap_or_else(|error| ArbiterAnswer::Unreachable(error.to_string()))
}

/// Asks the arbiter, and waits for its answer.
///
/// # Errors
/// [`ArbiterError`]: there is none.
pub(super) fn ask(arbiter: &mut dyn Arbiter, request: ArbiterRequest) -> Result<ArbiterAnswer, ArbiterError> {
    match request {
        ArbiterRequest::Read => arbiter.read().map(ArbiterAnswer::Record),
        ArbiterRequest::Swap { expected, new } => arbiter.swap(expected.as_ref(), &new).map(|swap| match swap {
            Swap::Won => ArbiterAnswer::Won,
            Swap::Lost(record) => ArbiterAnswer::Record(record),
        }),
    }
}
