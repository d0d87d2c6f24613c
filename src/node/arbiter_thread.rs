//! The thread that talks to the arbiter, so that nobody else ever waits for it.

use std::thread::JoinHandle;

use crossbeam::channel::{Sender, unbounded};

use super::events::NodeEvent;
use crate::arbiter::{Arbiter, Swap};
use crate::protocol::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};

/// A handle to the arbiter's thread. Dropping it ends the thread once the question in hand is answered.
pub struct ArbiterThread {
    calls: Option<Sender<ArbiterCall>>,
    thread: Option<JoinHandle<()>>,
}

impl ArbiterThread {
    /// Starts the thread; answers go to `events`.
    pub fn start(mut arbiter: Box<dyn Arbiter>, events: Sender<NodeEvent>) -> std::io::Result<ArbiterThread> {
        let (calls, questions) = unbounded::<ArbiterCall>();
        let thread = std::thread::Builder::new().name("mcd-arbiter".into()).spawn(move || {
            for call in questions {
                let answer = answer(arbiter.as_mut(), call.request);
                tracing::debug!(?call, ?answer, "arbiter");
                if events.send(NodeEvent::Answer { ticket: call.ticket, answer }).is_err() {
                    break;
                }
            }
        })?;
        Ok(ArbiterThread { calls: Some(calls), thread: Some(thread) })
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
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
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
