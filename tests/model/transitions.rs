//! Everything that may happen next in a world.

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use mcd::protocol::command::Command;
use mcd::protocol::primary;

use crate::driver::Event;
use crate::oracle::Oracle;
use crate::world::{TIMEOUT_UNITS, UNIT, World};

/// One thing that happens. `split`: the actions that follow are not carried out at once, but one by
/// one, as `Step`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Transition {
    /// The first thing in an inbox arrives.
    Deliver { conn: usize, end: usize, split: bool },
    /// A node's clock reaches its next deadline.
    Timeout { node: usize, split: bool },
    /// A node carries out its next action.
    Step { node: usize },
    /// A node's driver is frozen for longer than the heartbeat timeout.
    Stall { node: usize },
    /// The guest writes a page and sends a packet.
    Guest { node: usize },
    /// The sender reads the pages to push.
    Push { node: usize },
    /// The arbiter carries out what a node asks.
    Serve { node: usize },
    /// The arbiter's answer arrives.
    Answer { node: usize, split: bool },
    /// A node gives a question up; it may be carried out later, or was.
    GiveUp { node: usize },
    /// A question that was given up reaches the arbiter.
    Late { at: usize },
    /// A process dies; `silent`: its host too, and nobody hears of it.
    Crash { node: usize, silent: bool },
    /// One side of a connection sees it break.
    Lose { conn: usize, end: usize },
    /// The next capture fails.
    FailCapture { node: usize },
    /// A newcomer starts where no process is, or where one was fenced.
    Newcomer { node: usize },
    /// An operator asks for an epoch.
    Checkpoint { node: usize },
    /// An operator ends the primary.
    Quit { node: usize },
}

/// Carries out a question.
fn serve(oracle: &mut Oracle, request: ArbiterRequest) -> (ArbiterAnswer, crate::oracle::Check) {
    match request {
        ArbiterRequest::Swap { expected, new } if Some(oracle.record) == expected => {
            (ArbiterAnswer::Won, oracle.swapped(new))
        }
        _ => (ArbiterAnswer::Record(Some(oracle.record)), Ok(())),
    }
}

impl World {
    /// All that may happen next.
    pub fn transitions(&self, transitions: &mut Vec<Transition>) {
        if self.broken.is_some() {
            return;
        }
        let splits: &[bool] = if self.bounds.may(self.bounds.splits) { &[false, true] } else { &[false] };
        for (at, conn) in self.conns.iter().enumerate() {
            for (end, side) in conn.ends.iter().enumerate().filter(|(_, side)| side.open) {
                if !self.nodes[side.node].stepping {
                    if !side.inbox.is_empty() {
                        transitions.extend(splits.iter().map(|split| Transition::Deliver {
                            conn: at,
                            end,
                            split: *split,
                        }));
                    }
                    if self.bounds.may(self.bounds.losses) {
                        transitions.push(Transition::Lose { conn: at, end });
                    }
                }
            }
        }
        (0..self.late.len()).for_each(|at| transitions.push(Transition::Late { at }));
        for node in 0..2 {
            self.transitions_of(node, splits, transitions);
        }
    }

    fn transitions_of(&self, n: usize, splits: &[bool], transitions: &mut Vec<Transition>) {
        let node = &self.nodes[n];
        let bounds = &self.bounds;
        if (node.is_absent() || node.fenced) && bounds.newcomers > 0 && self.listens(1 - n) && bounds.connects > 1 {
            transitions.push(Transition::Newcomer { node: n });
        }
        if node.is_absent() {
            return;
        }
        if node.stepping {
            transitions.push(Transition::Step { node: n });
        } else {
            if self.may_time_out(n) {
                transitions.extend(splits.iter().map(|split| Transition::Timeout { node: n, split: *split }));
            }
            if node.calls.front().is_some_and(|call| call.answer.is_some()) {
                transitions.extend(splits.iter().map(|split| Transition::Answer { node: n, split: *split }));
            }
            if node.push.is_some() {
                transitions.push(Transition::Push { node: n });
            }
            if !node.calls.is_empty() && bounds.may(bounds.silences) {
                transitions.push(Transition::GiveUp { node: n });
            }
        }
        if node.calls.front().is_some_and(|call| call.answer.is_none()) {
            transitions.push(Transition::Serve { node: n });
        }
        if node.guest.as_ref().is_some_and(|guest| guest.runs) && bounds.packets > 0 {
            transitions.push(Transition::Guest { node: n });
        }
        if bounds.may(bounds.crashes) && !node.fenced {
            transitions.extend([false, true].map(|silent| Transition::Crash { node: n, silent }));
        }
        if bounds.may(bounds.stalls) && !node.fenced {
            transitions.push(Transition::Stall { node: n });
        }
        if let Some(machine) = node.primary().filter(|_| !node.fenced && !node.stepping) {
            if bounds.checkpoints > 0 && matches!(machine.phase(), primary::Phase::Resync | primary::Phase::Protected) {
                transitions.push(Transition::Checkpoint { node: n });
            }
            if bounds.may(bounds.quits) {
                transitions.push(Transition::Quit { node: n });
            }
            if bounds.may(bounds.failed_captures) && !node.capture_fails && node.sender.is_some() {
                transitions.push(Transition::FailCapture { node: n });
            }
        }
    }

    /// True if a newcomer that tries node `n` finds a primary.
    pub fn listens(&self, n: usize) -> bool {
        self.nodes[n].primary().is_some() && !self.nodes[n].fenced
    }

    /// A newcomer tries only where a primary is: trying in vain again and again shows nothing new.
    fn may_time_out(&self, n: usize) -> bool {
        self.nodes[n].poll_timeout().is_some()
            && (!self.is_connecting(n) || (self.listens(1 - n) && self.bounds.connects > 1))
    }

    /// The world after a move; `None` where it changes nothing.
    pub fn after(&self, step: Transition) -> Option<World> {
        let mut world = self.clone();
        match step {
            Transition::Deliver { conn, end, split } => {
                if let Some((n, event)) = world.arrive(conn, end) {
                    world.act(n, event, split)?;
                } else if split {
                    return None;
                }
            }
            Transition::Timeout { node, split } => {
                let at = self.nodes[node].poll_timeout()?;
                let clock = &mut world.node(node).now;
                *clock = (*clock).max(at);
                world.act(node, Event::Tick, split)?;
            }
            Transition::Step { node } => {
                world.step(node);
                world.settle_step(node);
            }
            Transition::Stall { node } => world.stall(node),
            Transition::Guest { node } => {
                world.bounds.packets -= 1;
                world.guest_step(node);
            }
            Transition::Push { node } => world.push(node),
            Transition::Serve { node } => world.serve_call(node),
            Transition::Answer { node, split } => {
                let event = world.answer(node)?;
                world.act(node, event, split)?;
            }
            Transition::GiveUp { node } => world.give_up(node),
            Transition::Late { at } => {
                let request = world.late.remove(at);
                let (_, check) = serve(world.oracle(), request);
                world.check(check);
            }
            Transition::Crash { node, silent } => {
                world.fault(|bounds| &mut bounds.crashes);
                world.accepted_loss |= self.is_only_holder(node);
                if silent {
                    world.fall_silent(node);
                }
                world.end(node);
            }
            Transition::Lose { conn, end } => world.lose(conn, end),
            Transition::FailCapture { node } => {
                world.fault(|bounds| &mut bounds.failed_captures);
                world.node(node).capture_fails = true;
            }
            Transition::Newcomer { node } => {
                world.bounds.newcomers -= 1;
                if !world.nodes[node].is_absent() {
                    world.end(node);
                }
                world.newcomer(node);
                world.happen(node, Event::Tick);
            }
            Transition::Checkpoint { node } => {
                world.bounds.checkpoints -= 1;
                world.happen(node, Event::Primary(primary::Input::Command { ticket: 0, command: Command::Checkpoint }));
            }
            Transition::Quit { node } => {
                world.fault(|bounds| &mut bounds.quits);
                world.accepted_loss = true;
                world.happen(node, Event::Primary(primary::Input::Command { ticket: 0, command: Command::Quit }));
            }
        }
        Some(world)
    }

    /// True if nobody but `n` could go on with the guest.
    fn is_only_holder(&self, n: usize) -> bool {
        self.oracle.record.owner == self.nodes[n].me && !self.is_new_primary(self.nodes[1 - n].me)
    }

    fn fault(&mut self, kind: impl Fn(&mut crate::bounds::Bounds) -> &mut u8) {
        self.bounds.faults -= 1;
        *kind(&mut self.bounds) -= 1;
    }

    /// Gives an event to a node; `None` if its actions were to be carried out one by one and there
    /// are none.
    fn act(&mut self, n: usize, event: Event, split: bool) -> Option<()> {
        if !split {
            self.happen(n, event);
            return Some(());
        }
        self.feed(n, event);
        self.fault(|bounds| &mut bounds.splits);
        self.node(n).stepping = true;
        (self.in_hand(n) > 0).then_some(())
    }

    /// Ends going one by one when nothing is left.
    fn settle_step(&mut self, n: usize) {
        if self.in_hand(n) == 0 {
            self.node(n).stepping = false;
            while self.step(n) {}
        }
    }

    /// The driver of a node does nothing for a while; its guest may go on.
    fn stall(&mut self, n: usize) {
        self.fault(|bounds| &mut bounds.stalls);
        let node = self.node(n);
        node.now = node.now + UNIT * TIMEOUT_UNITS;
        node.unproven = true;
        for call in &mut node.calls {
            call.stale |= call.answer.is_some();
        }
    }

    fn serve_call(&mut self, n: usize) {
        let Some(request) = self.nodes[n].calls.front().map(|call| call.call.request) else { return };
        let (answer, check) = serve(self.oracle(), request);
        self.check(check);
        if let Some(call) = self.node(n).calls.front_mut() {
            call.answer = Some(answer);
        }
    }

    fn answer(&mut self, n: usize) -> Option<Event> {
        let node = self.node(n);
        let call = node.calls.pop_front()?;
        node.unproven &= call.stale;
        Some(Event::Answer(call.call.ticket, call.answer?))
    }

    fn give_up(&mut self, n: usize) {
        self.fault(|bounds| &mut bounds.silences);
        let Some(call) = self.node(n).calls.pop_front() else { return };
        if call.answer.is_none() && matches!(call.call.request, ArbiterRequest::Swap { .. }) {
            self.late.push(call.call.request);
        }
        let silence = ArbiterAnswer::Unreachable(String::new());
        self.happen(n, Event::Answer(call.call.ticket, silence));
    }

    fn lose(&mut self, conn: usize, end: usize) {
        self.fault(|bounds| &mut bounds.losses);
        let (n, local) = (self.conns[conn].ends[end].node, self.conns[conn].ends[end].local);
        self.conns()[conn].close(end);
        self.sweep();
        self.happen(n, Event::Closed(local));
    }
}
