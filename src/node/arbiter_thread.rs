//! The thread that talks to the arbiter, so that nobody else ever waits for it. Without a question
//! for a while the thread reads the record itself, so that an arbiter out of reach is reported
//! before it is needed.

use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::priority;
use crate::arbiter::{Arbiter, ArbiterError, Canceller, Swap};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};

/// Time without a question after which the thread reads the record itself.
const WATCH: Duration = Duration::from_secs(5);

/// Whether the arbiter answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reachability {
    /// It does.
    Reachable,
    /// It does not.
    Unreachable {
        /// Why, and what to do.
        why: String,
    },
}

impl Reachability {
    /// Why it does not answer, if so.
    pub(super) fn why_not(&self) -> Option<&str> {
        match self {
            Reachability::Reachable => None,
            Reachability::Unreachable { why } => Some(why),
        }
    }
}

/// What a read or a swap showed of the arbiter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contact {
    /// Whether it answered.
    pub(super) reachability: Reachability,
    /// Who wanted to know.
    pub(super) by: ContactBy,
}

/// Who turned to the arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ContactBy {
    /// The protocol, which hears of the outcome itself.
    Protocol,
    /// This thread, because nobody else had for a while: nobody else hears of the outcome.
    Watch,
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
    loop {
        let call = match questions.recv_timeout(watch) {
            Ok(call) => call,
            Err(RecvTimeoutError::Timeout) => {
                let reachability = match arbiter.read() {
                    Ok(_) => Reachability::Reachable,
                    Err(error) => Reachability::Unreachable { why: error.to_string() },
                };
                noticed(Contact { reachability, by: ContactBy::Watch });
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        let answer = answer(arbiter.as_mut(), call.request);
        tracing::debug!(?call, ?answer, "the arbiter was asked");
        let reachability = match &answer {
            ArbiterAnswer::Unreachable(why) => Reachability::Unreachable { why: why.clone() },
            ArbiterAnswer::Won | ArbiterAnswer::Record(_) => Reachability::Reachable,
        };
        noticed(Contact { reachability, by: ContactBy::Protocol });
        if events.report(NodeEvent::Answer { ticket: call.ticket, answer }).is_err() {
            break;
        }
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
