//! What a node's driver does: inputs into the machine, actions out of it.

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterRequest};
use mcd::protocol::messages::Message;
use mcd::protocol::primary::{self, OutputCut, Primary};
use mcd::protocol::record::{Record, RecordState};
use mcd::protocol::secondary::{self, Secondary};
use mcd::protocol::types::ConnId;
use mcd::protocol::types::{EpochId, Instant};

use crate::guest::{Guest, Output};
use crate::net::{Conn, Item};
use crate::oracle::{Broken, FENCED, Holding, I6, STALLED};
use crate::world::{Call, Role, Staged, TIMEOUT_UNITS, UNIT, World, primary_config};

/// What happens to a node, whatever its role.
#[derive(Clone, Debug)]
pub enum Event {
    Tick,
    Connected(ConnId),
    Closed(ConnId),
    Message(ConnId, Message),
    Staged(ConnId, EpochId, bool),
    Answer(u64, ArbiterAnswer),
    /// For a primary only.
    Primary(primary::Input),
}

fn primary_input(event: Event) -> Option<primary::Input> {
    use primary::Input;
    Some(match event {
        Event::Tick => Input::Tick,
        Event::Closed(conn) => Input::Closed { conn, why: String::new() },
        Event::Message(conn, Message::Hello(hello)) => Input::Hello { conn, hello },
        Event::Message(conn, message) => Input::Message { conn, message },
        Event::Answer(ticket, answer) => Input::Answer { ticket, answer },
        Event::Primary(input) => input,
        Event::Connected(_) | Event::Staged(..) => return None,
    })
}

fn secondary_input(event: Event) -> Option<secondary::Input> {
    use secondary::Input;
    Some(match event {
        Event::Tick => Input::Tick,
        Event::Connected(conn) => Input::Connected { conn },
        Event::Closed(conn) => Input::Closed { conn, why: String::new() },
        Event::Message(conn, message) => Input::Message { conn, message },
        Event::Staged(conn, id, completes_resync) => {
            Input::Staged { conn, id, completes_resync, staged_bytes: 0, began: Instant::from_us(0) }
        }
        Event::Answer(ticket, answer) => Input::Answer { ticket, answer },
        Event::Primary(_) => return None,
    })
}

impl World {
    /// Gives an event to a node's machine; its actions wait.
    pub fn feed(&mut self, n: usize, event: Event) {
        let node = self.node(n);
        let now = node.now;
        node.unproven |= now.since(node.looked) >= UNIT * TIMEOUT_UNITS;
        node.looked = now;
        match &mut node.role {
            Role::Primary(machine) => {
                if let Some(input) = primary_input(event) {
                    machine.handle(now, input);
                }
            }
            Role::Secondary(machine) => {
                if let Some(input) = secondary_input(event) {
                    machine.handle(now, input);
                }
            }
            Role::Absent => {}
        }
    }

    /// Gives an event to a node, which does all that follows at once.
    pub fn happen(&mut self, n: usize, event: Event) {
        self.feed(n, event);
        while self.step(n) {}
    }

    /// Carries out the next action that anybody notices; false if there is none.
    pub fn step(&mut self, n: usize) -> bool {
        loop {
            match &mut self.node(n).role {
                Role::Primary(machine) => match machine.poll_action() {
                    None => break,
                    Some(primary::Action::Tell(_)) => {}
                    Some(action) => {
                        self.do_primary(n, action);
                        return true;
                    }
                },
                Role::Secondary(machine) => match machine.poll_action() {
                    None => break,
                    Some(secondary::Action::Tell(_)) => {}
                    Some(action) => {
                        self.do_secondary(n, action);
                        return true;
                    }
                },
                Role::Absent => break,
            }
        }
        // The gate's word waited until the driver had time.
        if std::mem::take(&mut self.node(n).output.tell) {
            self.node(n).output.told = true;
            self.feed(n, Event::Primary(primary::Input::OutputWaiting { open_packets: 1 }));
            return self.step(n);
        }
        false
    }

    /// How many actions a node has in hand.
    pub fn in_hand(&self, n: usize) -> usize {
        match &self.nodes[n].role {
            Role::Primary(machine) => {
                let mut machine = machine.clone();
                std::iter::from_fn(|| machine.poll_action())
                    .filter(|action| !matches!(action, primary::Action::Tell(_)))
                    .count()
            }
            Role::Secondary(machine) => {
                let mut machine = machine.clone();
                std::iter::from_fn(|| machine.poll_action())
                    .filter(|action| !matches!(action, secondary::Action::Tell(_)))
                    .count()
            }
            Role::Absent => 0,
        }
    }

    // ---- both roles ----

    fn send(&mut self, n: usize, local: ConnId, item: Item) {
        if let Some((conn, end)) = self.conn_of(n, local) {
            self.conns()[conn].send(end, item);
        }
    }

    fn close(&mut self, n: usize, local: ConnId) {
        if let Some((conn, end)) = self.conn_of(n, local) {
            self.conns()[conn].close(end);
        }
        self.sweep();
    }

    fn close_all(&mut self, n: usize) {
        for conn in self.conns() {
            for end in 0..2 {
                if conn.ends[end].node == n {
                    conn.close(end);
                }
            }
        }
        self.sweep();
    }

    pub fn fall_silent(&mut self, n: usize) {
        for conn in self.conns() {
            for end in (0..2).filter(|end| conn.ends[*end].node == n).collect::<Vec<_>>() {
                conn.fall_silent(end);
            }
        }
    }

    pub fn sweep(&mut self) {
        if self.conns.iter().any(Conn::is_over) {
            self.conns().retain(|conn| !conn.is_over());
        }
    }

    fn ask(&mut self, n: usize, call: mcd::protocol::arbitration::ArbiterCall) {
        self.node(n).calls.push_back(Call { call, answer: None, stale: false });
    }

    /// The process is over; what it asked may still be carried out.
    pub fn end(&mut self, n: usize) {
        self.close_all(n);
        let node = self.node(n);
        node.role = Role::Absent;
        node.guest = None;
        node.output = Output::default();
        (node.sender, node.push, node.staged) = (None, None, None);
        (node.stepping, node.fenced, node.unproven, node.capture_fails) = (false, false, false, false);
        let asked = node.calls.front().filter(|call| call.answer.is_none()).map(|call| call.call.request);
        node.calls.clear();
        self.late.extend(asked.filter(|request| matches!(request, ArbiterRequest::Swap { .. })));
    }

    // ---- the primary ----

    fn do_primary(&mut self, n: usize, action: primary::Action) {
        use primary::Action;
        if self.nodes[n].fenced && !matches!(action, Action::Close { .. } | Action::Exit(_) | Action::Answer { .. }) {
            let how = format!("node {n} was fenced, and does {action:?}");
            self.check(Err(Broken { property: FENCED, how }));
        }
        match action {
            Action::Send { conn, message } => self.send(n, conn, Item::Message(message)),
            Action::Close { conn } => self.close(n, conn),
            Action::StartTracking { conn } => {
                let node = self.node(n);
                node.sender = Some(conn);
                if let Some(guest) = &mut node.guest {
                    guest.take_dirty();
                    guest.tracking = true;
                }
                self.feed(n, Event::Primary(primary::Input::Tracking { conn, result: Ok(()) }));
            }
            Action::StopTracking => {
                let node = self.node(n);
                (node.sender, node.push) = (None, None);
                if let Some(guest) = &mut node.guest {
                    guest.take_dirty();
                    guest.tracking = false;
                }
            }
            Action::Capture { id, completes_resync, output } => self.capture(n, id, completes_resync, output),
            Action::Push { pages } => self.node(n).push = Some(pages),
            // Its disks have no hashes: no node here offers them.
            Action::Preserve { .. } | Action::HashBlocks { .. } | Action::FindHoles { .. } => {
                unreachable!("no node offers hashes")
            }
            // No disk here is on shared storage.
            Action::Committed { .. } | Action::WriteThrough { .. } => {}
            Action::Tell(_) | Action::Announce(_) | Action::Snapshot | Action::NoSnapshot { .. } => {}
            Action::Release { through, before } => self.release(n, through, before),
            Action::ReleaseAll => {
                let packets = self.node(n).output.take_all();
                self.let_go(n, &packets);
            }
            Action::Run(run) => {
                if let Some(guest) = &mut self.node(n).guest {
                    guest.runs = run;
                }
                self.feed(n, Event::Primary(primary::Input::RunDone { run, result: Ok(()) }));
            }
            Action::Ask(call) => self.ask(n, call),
            Action::Fence => {
                let node = self.node(n);
                node.guest = None;
                node.output = Output::default();
                (node.sender, node.push) = (None, None);
                node.fenced = true;
                self.close_all(n);
            }
            Action::Exit(_) => self.exit(n),
            Action::Heartbeat { conn, beat, until: _ } => self.send(n, conn, Item::Message(Message::Heartbeat(beat))),
            Action::Answer { .. } => {}
        }
    }

    /// A primary ends because it was told to. Where the guest was protected it goes on elsewhere;
    /// elsewhere it must be over.
    fn exit(&mut self, n: usize) {
        let node = &self.nodes[n];
        let protected = node.primary().is_some_and(|machine| machine.phase() == primary::Phase::Protected);
        let record = self.oracle.record;
        if node.has_guest() && !protected && record.owner == node.me && record.state != RecordState::Stopped {
            let how = format!("{:?} ends, and leaves a guest that is not over: {record:?}", node.me);
            self.check(Err(Broken { property: I6, how }));
        }
        self.end(n);
    }

    fn capture(&mut self, n: usize, id: EpochId, completes: bool, output: OutputCut) {
        let node = self.node(n);
        match output {
            OutputCut::Pass => {}
            OutputCut::Hold => node.output.holds = true,
            OutputCut::Seal => node.output.seal(id.epoch),
        }
        let Some(guest) = &mut node.guest else { return };
        let dirty = guest.take_dirty();
        if std::mem::take(&mut node.capture_fails) {
            guest.put_back(&dirty);
            let why = "no memory".into();
            return self.feed(n, Event::Primary(primary::Input::CaptureFailed { id, why }));
        }
        let (counter, oracle) = (guest.counter, guest.pages);
        let mut set = mcd::protocol::pages::PageSet::empty(guest.pages.len() as u64);
        dirty.iter().for_each(|(page, _)| set.insert(*page));
        if let Role::Primary(machine) = &mut node.role {
            machine.note_dirty_pages(&set);
        }
        if let Some(conn) = node.sender {
            self.send(n, conn, Item::Epoch { id, completes, dirty, counter, oracle });
        }
        self.feed(n, Event::Primary(primary::Input::Captured { id }));
    }

    /// The sender reads the pages of the push in hand.
    pub fn push(&mut self, n: usize) {
        let node = self.node(n);
        let (Some(pages), Some(guest), Some(conn)) = (node.push.take(), &node.guest, node.sender) else { return };
        let pages = pages.into_iter().map(|page| (page, guest.pages[page as usize])).collect();
        self.send(n, conn, Item::Background(pages));
        self.happen(n, Event::Primary(primary::Input::Pushed));
    }

    fn release(&mut self, n: usize, through: u64, before: Instant) {
        if self.nodes[n].now >= before {
            return self.feed(n, Event::Primary(primary::Input::ReleaseExpired));
        }
        let packets = self.node(n).output.take_through(through);
        self.let_go(n, &packets);
    }

    /// Packets leave the host.
    pub fn let_go(&mut self, n: usize, packets: &[u8]) {
        let node = &self.nodes[n];
        let Some(generation) = node.primary().map(Primary::generation) else { return };
        let (me, unproven) = (node.me, node.unproven || node.now.since(node.looked) >= UNIT * TIMEOUT_UNITS);
        if unproven && !packets.is_empty() && self.oracle.record.owner != me {
            let how = format!("{me:?} was frozen, and releases packets {packets:?} of a guest that runs elsewhere");
            self.check(Err(Broken { property: STALLED, how }));
        }
        for packet in packets {
            let check = self.oracle().released(n, me, generation, *packet);
            self.check(check);
        }
    }

    /// The guest writes a page and sends a packet.
    pub fn guest_step(&mut self, n: usize) {
        let node = self.node(n);
        let Some(guest) = &mut node.guest else { return };
        let packet = guest.step();
        if !node.output.holds {
            return self.let_go(n, &[packet]);
        }
        node.output.open.push(packet);
        node.output.tell |= !node.output.told;
        if !node.stepping {
            while self.step(n) {}
        }
    }

    // ---- the secondary ----

    fn do_secondary(&mut self, n: usize, action: secondary::Action) {
        use secondary::Action;
        match action {
            Action::Connect { conn, .. } => self.connect(n, conn),
            Action::Send { conn, message } => self.send(n, conn, Item::Message(message)),
            Action::Close { conn } => self.close(n, conn),
            Action::Heartbeat { conn, beat, until: _ } => self.send(n, conn, Item::Message(Message::Heartbeat(beat))),
            Action::Answer { .. } => {}
            Action::BuildMachine(_) => self.built(n),
            Action::HashBlocks { .. } | Action::SendHashes { .. } => unreachable!("no node offers hashes"),
            Action::Commit { id } => self.commit(n, id),
            Action::Forget { .. } | Action::TakePages | Action::TakeStorage | Action::WriteKept => {}
            Action::Ask(call) => self.ask(n, call),
            Action::Promote { record, epoch, .. } => self.promote(n, record, epoch),
            Action::Rejoin { .. } => self.end(n),
            Action::Exit { .. } => self.end(n),
            Action::Tell(_) => {}
        }
    }

    fn built(&mut self, n: usize) {
        let node = self.node(n);
        node.image = crate::guest::HOLES;
        let now = node.now;
        if let Role::Secondary(machine) = &mut node.role {
            machine.handle(now, secondary::Input::MachineReady { made: Vec::new() });
        }
    }

    fn connect(&mut self, n: usize, local: ConnId) {
        let other = 1 - n;
        let listens = self.nodes[other].primary().is_some() && !self.nodes[other].fenced;
        if !listens || self.bounds.connects == 0 {
            return self.feed(n, Event::Closed(local));
        }
        self.bounds.connects -= 1;
        let there = self.node(other);
        there.made += 1;
        let conn = Conn::new((n, local), (other, there.made));
        self.conns().push(conn);
        self.feed(n, Event::Connected(local));
    }

    /// Something arrives.
    pub fn arrive(&mut self, conn: usize, end: usize) -> Option<(usize, Event)> {
        let end = &mut self.conns()[conn].ends[end];
        let (n, local) = (end.node, end.local);
        let event = match end.inbox.pop_front()? {
            Item::Message(message) => Event::Message(local, message),
            Item::Fin => {
                end.open = false;
                Event::Closed(local)
            }
            Item::Background(pages) => {
                self.apply(n, &pages);
                return None;
            }
            Item::Epoch { id, completes, dirty, counter, oracle } => {
                self.node(n).staged = Some(Staged { id, completes, dirty, counter, oracle });
                Event::Staged(local, id, completes)
            }
        };
        self.sweep();
        Some((n, event))
    }

    fn apply(&mut self, n: usize, pages: &[(u64, u16)]) {
        let image = &mut self.node(n).image;
        for (page, value) in pages {
            image[*page as usize] = *value;
        }
    }

    fn commit(&mut self, n: usize, id: EpochId) {
        let Some(Staged { id: staged, completes: whole, dirty, counter, oracle }) = self.node(n).staged.take() else {
            return;
        };
        debug_assert_eq!(staged, id);
        self.apply(n, &dirty);
        let node = self.node(n);
        node.image_counter = counter;
        let who = node.me;
        self.oracle().committed(n, Holding { who, epoch: id, counter, oracle, whole });
    }

    fn promote(&mut self, n: usize, record: Record, epoch: EpochId) {
        let node = self.node(n);
        let (me, image, counter, now) = (node.me, node.image, node.image_counter, node.now);
        node.role = Role::Primary(Box::new(Primary::new(primary_config(), me, record, now)));
        node.guest = Some(Guest::new(image, counter, record.generation.0 as u8));
        node.output = Output::default();
        (node.image, node.image_counter, node.staged) = (crate::guest::HOLES, 0, None);
        let check = self.oracle().activated(n, me, (record, epoch), (image, counter));
        self.check(check);
    }

    /// True for a secondary that is about to try a primary.
    pub fn is_connecting(&self, n: usize) -> bool {
        let connecting = |machine: &Secondary| machine.phase() == secondary::Phase::Connecting;
        matches!(&self.nodes[n].role, Role::Secondary(machine) if connecting(machine))
    }
}
