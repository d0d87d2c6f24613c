//! The questions on their way to the arbiter: which is put to it next, which not any more, when the
//! record is read although nobody asks, and when people hear that the arbiter is lost or back.
//!
//! An arbiter may take seconds for one answer. What was asked meanwhile has one place: a newer
//! question takes it, because its asker ignores answers to what it asked before
//! ([`Arbitration`](super::arbitration::Arbitration)). A question that was not put to the arbiter
//! changes nothing there, so a swap that nobody wants any more is not carried out either.

use std::time::Duration;

use super::arbitration::{ArbiterAnswer, ArbiterCall, ArbiterRequest};
use super::event::Event;
use super::types::Instant;

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextQuestion {
    /// Put this question to the arbiter.
    Ask(ArbiterCall),
    /// Read the record, so that an arbiter out of reach is noticed before it is needed.
    Look,
    /// Wait for a question, until then at most.
    Wait(Instant),
}

/// The queue. There is one for the process, whatever the role of its node.
#[derive(Clone, Debug)]
pub struct ArbiterQueue {
    /// Time without a question after which the record is read.
    watch: Duration,
    waiting: Option<ArbiterCall>,
    /// When the arbiter answered last, or did not.
    heard_at: Instant,
    /// Why the arbiter is out of reach, while it is.
    lost: Option<String>,
}

impl ArbiterQueue {
    /// Nothing is asked yet; the record is read after each `watch` without a question.
    pub fn new(watch: Duration, now: Instant) -> ArbiterQueue {
        ArbiterQueue { watch, waiting: None, heard_at: now, lost: None }
    }

    /// Takes a question; the one it supersedes, which is not to be put to the arbiter any more.
    pub fn ask(&mut self, call: ArbiterCall) -> Option<ArbiterCall> {
        self.waiting.replace(call)
    }

    /// What to do now.
    pub fn next(&mut self, now: Instant) -> NextQuestion {
        let look_at = self.heard_at + self.watch;
        match self.waiting.take() {
            Some(call) => NextQuestion::Ask(call),
            None if now >= look_at => NextQuestion::Look,
            None => NextQuestion::Wait(look_at),
        }
    }

    /// The arbiter answered, or did not; what people are to be told. That it is lost, and that it
    /// is back, is told once each, whoever asked.
    pub fn answered(&mut self, now: Instant, request: &ArbiterRequest, answer: &ArbiterAnswer) -> Option<Event> {
        self.heard_at = now;
        match answer.why_none(request) {
            Some(why) => {
                let was_lost = self.lost.replace(why.to_owned()).is_some();
                (!was_lost).then(|| Event::ArbiterLost { why: why.to_owned() })
            }
            None => self.lost.take().map(|_| Event::ArbiterBack),
        }
    }

    /// Why the arbiter is out of reach, if it was when it was last asked.
    pub fn lost(&self) -> Option<&str> {
        self.lost.as_deref()
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Record;
    use super::super::types::InstanceId;
    use super::*;

    const WATCH: Duration = Duration::from_secs(5);

    fn at(s: u64) -> Instant {
        Instant::from_us(s * 1_000_000)
    }

    fn queue() -> ArbiterQueue {
        ArbiterQueue::new(WATCH, at(0))
    }

    fn swap() -> ArbiterRequest {
        let expected = Record::first(InstanceId(1));
        ArbiterRequest::Swap { expected: Some(expected), new: expected.next_solo(InstanceId(2)) }
    }

    fn unreachable() -> ArbiterAnswer {
        ArbiterAnswer::Unreachable("the cable is out".into())
    }

    #[test]
    fn a_newer_question_supersedes_one_that_was_not_asked_yet() {
        let read = ArbiterCall { ticket: 1, request: ArbiterRequest::Read };
        let (first, second) = (ArbiterCall { ticket: 2, request: swap() }, ArbiterCall { ticket: 3, request: swap() });
        let mut queue = queue();
        assert_eq!(queue.ask(read), None);
        assert_eq!(queue.next(at(1)), NextQuestion::Ask(read));
        // The arbiter thinks about that one.
        assert_eq!(queue.ask(first), None);
        assert_eq!(queue.ask(second), Some(first));
        assert_eq!(queue.next(at(2)), NextQuestion::Ask(second));
        assert_eq!(queue.next(at(2)), NextQuestion::Wait(at(5)), "none is asked twice");
    }

    #[test]
    fn the_record_is_read_after_a_while_without_a_question() {
        let mut queue = queue();
        assert_eq!(queue.next(at(4)), NextQuestion::Wait(at(5)));
        assert_eq!(queue.next(at(5)), NextQuestion::Look);
        queue.answered(at(6), &ArbiterRequest::Read, &ArbiterAnswer::Record(None));
        assert_eq!(queue.next(at(6)), NextQuestion::Wait(at(11)));
        let call = ArbiterCall { ticket: 1, request: swap() };
        queue.ask(call);
        assert_eq!(queue.next(at(12)), NextQuestion::Ask(call), "before any look");
        queue.answered(at(13), &call.request, &ArbiterAnswer::Won);
        assert_eq!(queue.next(at(13)), NextQuestion::Wait(at(18)), "an answer is as good as a look");
    }

    #[test]
    fn an_arbiter_is_lost_once_and_back_once_whoever_asked() {
        let (read, swap) = (ArbiterRequest::Read, swap());
        let mut queue = queue();
        assert_eq!(queue.answered(at(1), &read, &ArbiterAnswer::Record(None)), None, "it never was lost");
        let lost = Event::ArbiterLost { why: "the cable is out".into() };
        assert_eq!(queue.answered(at(2), &read, &unreachable()), Some(lost));
        assert_eq!(queue.answered(at(3), &swap, &unreachable()), None);
        assert_eq!(queue.lost(), Some("the cable is out"));
        assert_eq!(queue.answered(at(4), &swap, &ArbiterAnswer::Won), Some(Event::ArbiterBack));
        assert_eq!(queue.answered(at(5), &read, &ArbiterAnswer::Record(None)), None);
        assert_eq!(queue.lost(), None);
        let ArbiterRequest::Swap { expected, .. } = swap else { return };
        let contradiction = ArbiterAnswer::Record(expected);
        assert!(matches!(queue.answered(at(6), &swap, &contradiction), Some(Event::ArbiterLost { .. })));
        assert_eq!(queue.answered(at(7), &read, &contradiction), Some(Event::ArbiterBack), "a read may show it");
    }
}
