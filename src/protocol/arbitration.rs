//! Talking to the arbiter: one question at a time, and what an answer means.
//!
//! A question whose answer never came may still have been carried out, so a lost swap whose record
//! is the very one we asked for was won (every record names its owner's instance id and a
//! generation nobody else can have asked for with it).

use std::hash::{Hash, Hasher};
use std::time::Duration;

use super::mutant;
use super::record::Record;
use super::types::Instant;

/// A question to the arbiter. `ticket` comes back with the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ArbiterCall {
    /// Names the question; answers to older tickets are ignored.
    pub ticket: u64,
    /// What to do.
    pub request: ArbiterRequest,
}

/// What is asked of the arbiter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ArbiterRequest {
    /// Read the record.
    Read,
    /// Put `new` in place of `expected`, if that is still the record.
    Swap {
        /// The record the swap starts from; `None` if there is none yet.
        expected: Option<Record>,
        /// The record wanted.
        new: Record,
    },
}

/// What the arbiter (or the way to it) answered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ArbiterAnswer {
    /// The swap was carried out.
    Won,
    /// The swap was not carried out, because this is the record; or: this is the record that was
    /// asked for.
    Record(Option<Record>),
    /// Nobody knows: the arbiter is out of reach.
    Unreachable(String),
}

/// What is said of an arbiter that refuses a swap and shows the very record the swap starts from.
const CONTRADICTION: &str = "it contradicts itself";

impl ArbiterAnswer {
    /// Why it is none to this question, if it is none.
    pub fn why_none(&self, request: &ArbiterRequest) -> Option<&str> {
        match (self, request) {
            (ArbiterAnswer::Unreachable(why), _) => Some(why),
            // Somebody's answer was stale.
            (ArbiterAnswer::Record(Some(stands)), ArbiterRequest::Swap { expected: Some(expected), .. })
                if stands == expected =>
            {
                Some(CONTRADICTION)
            }
            (ArbiterAnswer::Won | ArbiterAnswer::Record(_), _) => None,
        }
    }
}

/// How a question ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The wanted record stands.
    Won(Record),
    /// Another record stands (or none).
    Stands(Option<Record>),
    /// No answer; the question is asked again by itself.
    Unreachable(String),
}

/// Asks the arbiter, again and again while it is out of reach.
#[derive(Clone, Debug)]
pub struct Arbitration {
    retry: Duration,
    ticket: u64,
    request: Option<ArbiterRequest>,
    waiting: bool,
    again_at: Option<Instant>,
}

impl Arbitration {
    /// Asks nothing yet; asks again `retry` after an answer "out of reach".
    pub fn new(retry: Duration) -> Arbitration {
        Arbitration { retry, ticket: 0, request: None, waiting: false, again_at: None }
    }

    /// Starts a question and returns it. An earlier one is forgotten: its answer will be ignored.
    pub fn ask(&mut self, request: ArbiterRequest) -> ArbiterCall {
        self.request = Some(request);
        self.again_at = None;
        self.waiting = true;
        self.ticket += 1;
        ArbiterCall { ticket: self.ticket, request }
    }

    /// Asks after a while. An earlier question is forgotten.
    pub fn ask_later(&mut self, now: Instant, request: ArbiterRequest) {
        self.request = Some(request);
        self.waiting = false;
        self.again_at = Some(now + self.retry);
    }

    /// Forgets the question in hand.
    pub fn forget(&mut self) {
        self.request = None;
        self.again_at = None;
        self.waiting = false;
    }

    /// True while a question has no final answer.
    pub fn is_asking(&self) -> bool {
        self.request.is_some()
    }

    /// When the question is to be asked again.
    pub fn due(&self) -> Option<Instant> {
        self.again_at
    }

    /// The question to ask again, if it is time.
    pub fn poll(&mut self, now: Instant) -> Option<ArbiterCall> {
        let due = self.again_at?;
        let request = self.request?;
        (now >= due).then(|| self.ask(request))
    }

    /// Tells a checker the state (see [`Primary::digest`](super::primary::Primary::digest)).
    pub fn digest<H: Hasher>(&self, now: Instant, into: &mut H) {
        let Arbitration { retry, ticket, request, waiting, again_at } = self;
        (retry, ticket, request, waiting, again_at.map(|at| at.since(now))).hash(into);
    }

    /// Takes an answer; `None` if it answers a forgotten question.
    pub fn answer(&mut self, now: Instant, ticket: u64, answer: ArbiterAnswer) -> Option<Verdict> {
        if ticket != self.ticket || !self.waiting {
            return None;
        }
        let request = self.request?;
        self.waiting = false;
        if let Some(why) = answer.why_none(&request) {
            self.again_at = Some(now + self.retry);
            return Some(Verdict::Unreachable(why.to_owned()));
        }
        self.forget();
        let wanted = match request {
            ArbiterRequest::Swap { new, .. } => Some(new),
            ArbiterRequest::Read => None,
        };
        Some(match (answer, wanted) {
            (ArbiterAnswer::Won, Some(record)) => Verdict::Won(record),
            (ArbiterAnswer::Record(Some(stands)), Some(new))
                if stands == new && !mutant::is("own-win-not-recognised") =>
            {
                Verdict::Won(new)
            }
            (ArbiterAnswer::Record(record), _) => Verdict::Stands(record),
            (ArbiterAnswer::Won | ArbiterAnswer::Unreachable(_), _) => Verdict::Stands(None),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::types::InstanceId;
    use super::*;

    #[test]
    fn an_answer_that_was_lost_is_found_again() {
        let old = Record::first(InstanceId(1));
        let new = old.next_solo(InstanceId(2));
        let mut asking = Arbitration::new(Duration::from_millis(10));
        let now = Instant::from_us(0);
        let call = asking.ask(ArbiterRequest::Swap { expected: Some(old), new });
        let verdict = asking.answer(now, call.ticket, ArbiterAnswer::Unreachable("cut".into()));
        assert_eq!(verdict, Some(Verdict::Unreachable("cut".into())));
        assert_eq!(asking.poll(Instant::from_us(9_999)), None);
        let again = asking.poll(Instant::from_us(10_000)).unwrap();
        assert_eq!(asking.answer(now, call.ticket, ArbiterAnswer::Won), None, "a stale ticket");
        let verdict = asking.answer(now, again.ticket, ArbiterAnswer::Record(Some(new)));
        assert_eq!(verdict, Some(Verdict::Won(new)));
        assert!(!asking.is_asking());
    }
}
