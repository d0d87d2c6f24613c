//! The thread that talks to the arbiter, so that nobody else ever waits for it. When nobody asks it
//! anything it looks whether the arbiter is there, so that people hear of an arbiter out of reach
//! before it is needed.

use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use super::events::NodeEvent;
use super::inbox::InboxSender;
use super::priority;
use crate::arbiter::{Arbiter, Canceller, Swap};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};

/// Time without a question after which the arbiter is looked at.
const WATCH: Duration = Duration::from_secs(5);

/// How the arbiter was found.
pub struct Reach {
    /// Why it did not answer; `None` if it did.
    pub lost: Option<String>,
    /// True if nobody had asked it anything: then nobody else hears of it.
    pub watched: bool,
}

/// A handle to the arbiter's thread. Dropping it ends the thread once the question in hand is
/// answered or called off.
pub struct ArbiterThread {
    calls: Option<Sender<ArbiterCall>>,
    cancel: Option<Canceller>,
    thread: Option<JoinHandle<()>>,
}

impl ArbiterThread {
    /// Starts the thread; answers go to `events`, and `noticed` hears each time whether the arbiter
    /// answered.
    pub fn start(
        arbiter: Box<dyn Arbiter>,
        events: InboxSender,
        noticed: impl FnMut(Reach) + Send + 'static,
    ) -> std::io::Result<ArbiterThread> {
        ArbiterThread::start_watching(arbiter, events, WATCH, noticed)
    }

    /// The same, with the time without a question after which the arbiter is looked at.
    pub fn start_watching(
        arbiter: Box<dyn Arbiter>,
        events: InboxSender,
        watch: Duration,
        noticed: impl FnMut(Reach) + Send + 'static,
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
    pub fn ask(&self, call: ArbiterCall) {
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
    mut noticed: impl FnMut(Reach),
) {
    loop {
        let call = match questions.recv_timeout(watch) {
            Ok(call) => call,
            Err(RecvTimeoutError::Timeout) => {
                let lost = arbiter.read().err().map(|error| error.to_string());
                noticed(Reach { lost, watched: true });
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => break,
        };
        let answer = answer(arbiter.as_mut(), call.request);
        tracing::debug!(?call, ?answer, "arbiter");
        let lost = match &answer {
            ArbiterAnswer::Unreachable(why) => Some(why.clone()),
            ArbiterAnswer::Won | ArbiterAnswer::Record(_) => None,
        };
        noticed(Reach { lost, watched: false });
        if events.report(NodeEvent::Answer { ticket: call.ticket, answer }).is_err() {
            break;
        }
    }
}

fn answer(arbiter: &mut dyn Arbiter, request: ArbiterRequest) -> ArbiterAnswer {
    let outcome = match request {
        ArbiterRequest::Read => arbiter.read().map(ArbiterAnswer::Record),
        ArbiterRequest::Swap { expected, new } => arbiter.swap(Some(&expected), &new).map(|swap| match swap {
            Swap::Won => ArbiterAnswer::Won,
            Swap::Lost(record) => ArbiterAnswer::Record(record),
        }),
    };
    outcome.unwrap_or_else(|error| ArbiterAnswer::Unreachable(error.to_string()))
}
