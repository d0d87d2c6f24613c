//! What a secondary does about pages, visitors, its own end, and a takeover.

use super::test_support::{BEATS, DATA, NEW, OLD, answer, commit, message, paired, syncing, take};
use super::{Action, Ending, Input, Phase, TakeoverStages};
use crate::protocol::arbitration::ArbiterAnswer;
use crate::protocol::command::{Command, CommandRefused};
use crate::protocol::event::Event;
use crate::protocol::messages::{Message, RefuseReason};
use crate::protocol::peer_loss::{PeerFault, PeerLoss};
use crate::protocol::primary::{self, PrimaryConfig};
use crate::protocol::types::{EpochId, Generation, Instant};

#[test]
fn pages_have_their_place_in_a_resync_and_on_its_data_connection() {
    let mut node = syncing([true, true]);
    assert_eq!(take(&mut node, Input::Pages { conn: DATA }), [Action::TakePages]);
    assert_eq!(take(&mut node, Input::Pages { conn: BEATS }), [], "no reader of that one delivers any");
    assert_eq!(take(&mut node, Input::Pages { conn: 99 }), [], "late ones of a connection given up");
    commit(&mut node, 1, true);
    let actions = take(&mut node, Input::Pages { conn: DATA });
    let why = PeerLoss::Fault(PeerFault::PagesOutOfTurn);
    assert!(actions.contains(&Action::Tell(Event::Suspected { why })), "{actions:?}");
    assert!(!actions.contains(&Action::TakePages));
    assert_eq!(take(&mut node, Input::Pages { conn: DATA }), [], "its connection was given up");
}

#[test]
fn who_takes_a_secondary_for_a_primary_is_told_so() {
    let refused = |actions: Vec<Action>| match actions.as_slice() {
        [Action::Send { conn: 77, message: Message::Refuse { reason, .. } }, Action::Close { conn: 77 }] => {
            *reason == RefuseReason::NotPrimary
        }
        _ => false,
    };
    let mut node = paired();
    assert!(refused(take(&mut node, Input::Hello { conn: 77 })));
    assert_eq!(node.phase(), Phase::Paired);
    let asked = take(&mut node, Input::Closed { conn: DATA, why: "cut".into() });
    answer(&mut node, &asked, ArbiterAnswer::Won);
    assert_eq!(node.phase(), Phase::Promoted);
    assert!(refused(take(&mut node, Input::Hello { conn: 77 })), "its guest is not restored yet");
}

#[test]
fn only_a_whole_image_is_stamped_so_at_the_end() {
    let quit = || Input::Command { ticket: 1, command: Command::Quit };
    let exits = |actions: Vec<Action>| match actions.last() {
        Some(Action::Exit { ending: Ending::Quit, stamp }) => *stamp,
        other => panic!("{other:?}"),
    };
    let mut node = syncing([true, true]);
    assert_eq!(exits(take(&mut node, quit())), None);
    let mut node = syncing([true, true]);
    commit(&mut node, 1, false);
    assert_eq!(exits(take(&mut node, quit())), None, "an epoch is there, and what it builds on is not");
    let newest = EpochId { generation: Generation(2), epoch: 0 };
    let mut node = paired();
    commit(&mut node, 2, false);
    assert_eq!(exits(take(&mut node, quit())), Some(newest));
    let mut node = paired();
    commit(&mut node, 2, false);
    take(&mut node, Input::Closed { conn: DATA, why: "cut".into() });
    take(&mut node, quit());
    assert_eq!(exits(take(&mut node, quit())), Some(newest), "the arbiter did not answer, and the image is whole");
}

#[test]
fn a_takeover_knows_when_its_stages_were_reached() {
    let (heard, suspected, decided) = (Instant::from_us(5), Instant::from_us(70), Instant::from_us(900));
    let mut node = paired();
    let beat = Message::Written { through: EpochId { generation: Generation(2), epoch: 0 } };
    node.handle(heard, Input::Message { conn: DATA, message: beat });
    node.handle(suspected, Input::Closed { conn: DATA, why: "cut".into() });
    // Closing its connections, and turning others away, is no suspicion.
    node.handle(Instant::from_us(80), Input::Hello { conn: 77 });
    let ticket = std::iter::from_fn(|| node.poll_action()).find_map(|action| match action {
        Action::Ask(call) => Some(call.ticket),
        _ => None,
    });
    node.handle(decided, Input::Answer { ticket: ticket.expect("a question"), answer: ArbiterAnswer::Won });
    let stages = std::iter::from_fn(|| node.poll_action()).find_map(|action| match action {
        Action::Promote { stages, .. } => Some(stages),
        _ => None,
    });
    assert_eq!(stages, Some(TakeoverStages { heard, suspected, decided }));
}

#[test]
fn a_quit_while_the_guest_is_restored_is_kept_for_the_primary_it_becomes() {
    let phase_as_primary = |quit: bool| {
        let mut node = paired();
        let asked = take(&mut node, Input::Closed { conn: DATA, why: "cut".into() });
        let (record, _) = answer(&mut node, &asked, ArbiterAnswer::Won);
        assert_eq!(node.phase(), Phase::Promoted);
        let stop = take(&mut node, Input::Command { ticket: 1, command: Command::Stop });
        assert_eq!(stop, [Action::Answer { ticket: 1, result: Err(CommandRefused::TakingOver) }]);
        if quit {
            let quit = take(&mut node, Input::Command { ticket: 2, command: Command::Quit });
            assert_eq!(quit, [Action::Answer { ticket: 2, result: Ok(()) }]);
        }
        let record = record.expect("a swap");
        assert_eq!(record.owner, NEW);
        let primary = node.lead(PrimaryConfig::for_tests(), record, Instant::from_us(0));
        assert_eq!((primary.me(), primary.record()), (NEW, record));
        (primary.phase(), primary.guest_runs())
    };
    assert_eq!(phase_as_primary(false), (primary::Phase::Solo, true));
    assert_eq!(phase_as_primary(true), (primary::Phase::Stopping, false));
}

#[test]
fn a_goodbye_ends_a_secondary_and_needs_no_arbiter() {
    let mut node = paired();
    let actions = message(&mut node, DATA, Message::Bye { reason: "the guest was shut down".into() });
    assert!(!actions.iter().any(|action| matches!(action, Action::Ask(_))), "{actions:?}");
    assert!(matches!(actions.last(), Some(Action::Exit { ending: Ending::GuestEnded(_), stamp: Some(_) })));
    assert_eq!(node.primary(), Some(OLD));
}
