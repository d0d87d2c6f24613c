//! Every answer an arbiter may give to a start, or not give.

use super::*;

const ME: InstanceId = InstanceId(1);
const OTHER: InstanceId = InstanceId(2);
const RETRY: Duration = Duration::from_millis(100);

/// A claim and its clock.
struct Start {
    claim: Claim,
    now: Instant,
}

impl Start {
    fn new(both_nodes_are_dead: bool) -> Start {
        Start { claim: Claim::new(ME, both_nodes_are_dead, RETRY), now: Instant::from_us(0) }
    }

    fn action(&mut self) -> ClaimAction {
        self.claim.poll_action().expect("something to do")
    }

    /// The question it asks now.
    fn question(&mut self) -> ArbiterCall {
        match self.action() {
            ClaimAction::Ask(call) => call,
            other => panic!("{other:?}"),
        }
    }

    fn answer(&mut self, call: ArbiterCall, answer: ArbiterAnswer) {
        self.claim.handle(self.now, ClaimInput::Answer { ticket: call.ticket, answer });
    }

    /// The record is read, and the disks are right: the swap that follows.
    fn swaps(&mut self, stands: Option<Record>) -> ArbiterCall {
        let read = self.question();
        assert_eq!(read.request, ArbiterRequest::Read);
        self.answer(read, ArbiterAnswer::Record(stands));
        let newest = stands.map(|record| record.generation);
        assert_eq!(self.action(), ClaimAction::CheckDisks { newest });
        assert_eq!(self.claim.poll_action(), None, "nothing is claimed before the disks are checked");
        self.claim.handle(self.now, ClaimInput::DisksAllow);
        self.question()
    }

    /// Lets the time pass until it asks again.
    fn asks_again(&mut self) -> ArbiterCall {
        self.now = self.claim.poll_timeout().expect("it tries again");
        self.claim.handle(self.now, ClaimInput::Tick);
        self.question()
    }

    fn refuses(&mut self, refused: ClaimRefused) {
        assert_eq!(self.action(), ClaimAction::Refuse(refused));
        assert_eq!((self.claim.poll_action(), self.claim.poll_timeout()), (None, None));
    }
}

fn unreachable() -> ArbiterAnswer {
    ArbiterAnswer::Unreachable("cut".into())
}

#[test]
fn a_guest_that_runs_elsewhere_is_not_started() {
    let solo = Record::first(OTHER);
    let paired = solo.next_paired(OTHER, InstanceId(3));
    for stands in [solo, paired] {
        let mut start = Start::new(false);
        let read = start.question();
        start.answer(read, ArbiterAnswer::Record(Some(stands)));
        start.refuses(ClaimRefused::Elsewhere(stands));
        let mut cold = Start::new(true);
        let (expected, new) = (Some(stands), stands.next_solo(ME));
        assert_eq!(cold.swaps(Some(stands)).request, ArbiterRequest::Swap { expected, new });
    }
}

#[test]
fn a_guest_that_was_stopped_or_never_ran_is_started_once_the_swap_is_won() {
    let stopped = Record::first(OTHER).next_stopped();
    for (stands, new) in [(None, Record::first(ME)), (Some(stopped), stopped.next_solo(ME))] {
        let mut start = Start::new(false);
        let swap = start.swaps(stands);
        assert_eq!(swap.request, ArbiterRequest::Swap { expected: stands, new });
        start.answer(swap, ArbiterAnswer::Won);
        assert_eq!(start.action(), ClaimAction::Start(new));
    }
}

#[test]
fn a_swap_whose_answer_was_lost_is_asked_again_and_its_own_record_is_its_win() {
    let mut start = Start::new(false);
    let first = start.swaps(None);
    start.answer(first, unreachable());
    let again = start.asks_again();
    assert_eq!(again.request, first.request, "never another swap");
    start.answer(first, ArbiterAnswer::Record(None));
    assert_eq!(start.claim.poll_action(), None, "the first question is forgotten");
    start.answer(again, ArbiterAnswer::Record(Some(Record::first(ME))));
    assert_eq!(start.action(), ClaimAction::Start(Record::first(ME)));
}

#[test]
fn of_two_starts_at_once_the_one_that_lost_does_not_start() {
    let mut start = Start::new(false);
    let swap = start.swaps(None);
    start.answer(swap, unreachable());
    let again = start.asks_again();
    start.answer(again, ArbiterAnswer::Record(Some(Record::first(OTHER))));
    start.refuses(ClaimRefused::Elsewhere(Record::first(OTHER)));
}

#[test]
fn without_any_answer_a_start_says_whether_it_may_have_been_given_the_guest() {
    let mut start = Start::new(false);
    let read = start.question();
    start.answer(read, unreachable());
    start.refuses(ClaimRefused::Unreachable("cut".into()));
    let mut start = Start::new(false);
    let mut swap = start.swaps(None);
    for _ in 1..CLAIMS_MAX {
        start.answer(swap, unreachable());
        swap = start.asks_again();
    }
    start.answer(swap, unreachable());
    start.refuses(ClaimRefused::Unanswered { wanted: Record::first(ME), why: "cut".into() });
}

#[test]
fn an_arbiter_without_a_record_that_refuses_is_believed() {
    let mut start = Start::new(false);
    let swap = start.swaps(None);
    start.answer(swap, ArbiterAnswer::Record(None));
    start.refuses(ClaimRefused::NoRecord);
}
