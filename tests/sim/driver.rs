//! What a node's driver does: inputs into the machine, actions out of it, one at a time, in order.

use mcd::protocol::claim::ClaimInput;
use mcd::protocol::command::Command;
use mcd::protocol::event::RejoinReason;
use mcd::protocol::messages::Message;
use mcd::protocol::mutant;
use mcd::protocol::peer_loss::PeerLoss;
use mcd::protocol::primary;
use mcd::protocol::secondary;
use mcd::protocol::types::ConnId;
use mcd::protocol::types::Instant;

use crate::disks::{Frozen, Question};
use crate::guest::Output;
use crate::losses::Loss;
use crate::net::{Item, ProcId};
use crate::node::{Act, AnyPhase, In, Job, Role};
use crate::plan::FaultKind;
use crate::world::{Event, World};

/// Turns without time passing after which a machine is taken to spin.
const TURNS_MAX: u32 = 5_000;

impl World {
    /// Lets a process work until it has to wait.
    pub fn drive(&mut self, proc: ProcId) {
        for _ in 0..TURNS_MAX {
            if self.violation.is_some() || !self.procs[proc].alive {
                return;
            }
            if self.now < self.procs[proc].idle_until {
                let at = self.procs[proc].idle_until;
                self.wake(proc, at);
                return;
            }
            if let Some(input) = self.procs[proc].urgent.pop_front() {
                self.feed(proc, input);
            } else if let Some(act) = self.procs[proc].poll_action() {
                if self.passes_boundary(proc) {
                    self.execute(proc, act);
                } else if self.procs[proc].alive {
                    self.procs[proc].pending = Some(act);
                }
            } else if let Some(input) = self.procs[proc].take_heartbeat() {
                // Before any timer: nobody is suspected for what was not read yet.
                self.feed(proc, input);
            } else if let Some(input) = self.look_at_links(proc) {
                self.feed(proc, input);
            } else if !self.procs[proc].ticked && self.tick(proc) {
                // A timer that is due comes before what waits in the inbox, and then one of that.
                self.procs[proc].ticked = true;
            } else if let Some(input) = self.procs[proc].inbox.pop_front() {
                self.procs[proc].ticked = false;
                self.feed(proc, input);
            } else if !std::mem::take(&mut self.procs[proc].ticked) {
                return;
            }
        }
        self.violate(format!("n{} spins", self.procs[proc].slot));
    }

    fn wake(&mut self, proc: ProcId, at: u64) {
        if at < self.procs[proc].wake_at {
            self.procs[proc].wake_at = at;
            self.at(at, Event::Wake(proc));
        }
    }

    /// Ticks a machine whose time has come; false if it has to wait.
    fn tick(&mut self, proc: ProcId) -> bool {
        let node = &self.procs[proc];
        let Some(at) = node.poll_timeout() else { return false };
        if node.clock.local(self.now) < at {
            let at = node.clock.true_us(at);
            self.wake(proc, at);
            return false;
        }
        let input = match node.role {
            Role::Claiming(_) => In::Claim(ClaimInput::Tick),
            Role::Primary(_) => In::Primary(primary::Input::Tick),
            _ => In::Secondary(secondary::Input::Tick),
        };
        self.feed(proc, input);
        true
    }

    /// The place between two actions, where a node may crash or stall.
    fn passes_boundary(&mut self, proc: ProcId) -> bool {
        match &mut self.procs[proc].crash_in {
            Some((0, host)) => {
                let host = *host;
                self.crash(proc, host);
                return false;
            }
            Some((left, _)) => *left -= 1,
            None => {}
        }
        match &mut self.procs[proc].stall_in {
            Some((0, us, freeze)) => {
                let (us, freeze) = (*us, *freeze);
                self.procs[proc].stall_in = None;
                self.stall(proc, us, freeze);
                return false;
            }
            Some((left, _, _)) => *left -= 1,
            None => {}
        }
        true
    }

    pub fn stall(&mut self, proc: ProcId, us: u64, freeze: bool) {
        self.stats.faults += 1;
        let until = self.now + us;
        let node = &mut self.procs[proc];
        node.stalled_us += until.saturating_sub(node.idle_until.max(self.now));
        node.idle_until = node.idle_until.max(until);
        if freeze {
            node.paused_until = node.paused_until.max(until);
            node.frozen_until = node.frozen_until.max(until);
        }
        self.note(proc, || format!("STALLS for {} ms{}", us / 1000, if freeze { ", guest too" } else { "" }));
    }

    fn feed(&mut self, proc: ProcId, input: In) {
        let now = self.procs[proc].clock.local(self.now);
        match input {
            In::Background { conn, pages, staged_bytes } => {
                self.procs[proc].background = Some((pages, staged_bytes));
                self.feed_secondary(proc, now, secondary::Input::Pages { conn });
            }
            In::Epoch { conn, mut staged, began } => {
                if mutant::is("ack-before-whole") {
                    staged.pages.truncate(staged.pages.len() / 2);
                }
                let (id, completes_resync) = (staged.id, staged.completes);
                self.procs[proc].staged = Some(staged);
                let staged = secondary::Input::Staged { conn, id, completes_resync, staged_bytes: 0, began };
                self.feed_secondary(proc, now, staged);
            }
            In::Primary(primary::Input::OutputWaiting { .. }) => {
                // Counted when the driver has time for it: the epoch may have been cut since.
                let open_packets = u64::from(self.procs[proc].output.as_ref().is_some_and(Output::has_open));
                self.feed_primary(proc, now, primary::Input::OutputWaiting { open_packets });
            }
            In::Claim(input) => self.feed_claim(proc, input),
            In::Primary(input) => self.feed_primary(proc, now, input),
            In::Secondary(input) => self.feed_secondary(proc, now, input),
            In::ImageFailed { instance } => {
                if instance == self.procs[proc].me {
                    self.procs[proc].applier.told = true;
                    let why = "no room on the disk".into();
                    self.feed_secondary(proc, now, secondary::Input::ImageFailed { why });
                }
            }
            In::BlocksHashed { instance, first, hashes } => {
                if instance == self.procs[proc].me {
                    self.feed_secondary(proc, now, secondary::Input::BlocksHashed { first, hashes });
                }
            }
            In::Answer { ticket, answer } => {
                if let Role::Claiming(_) = self.procs[proc].role {
                    self.feed_claim(proc, ClaimInput::Answer { ticket, answer });
                } else if self.procs[proc].is_primary() {
                    self.feed_primary(proc, now, primary::Input::Answer { ticket, answer });
                } else {
                    self.feed_secondary(proc, now, secondary::Input::Answer { ticket, answer });
                }
            }
        }
        self.watch_phase(proc);
    }

    fn feed_primary(&mut self, proc: ProcId, now: Instant, input: primary::Input) {
        let node = &mut self.procs[proc];
        node.fed_at = self.now;
        if let Role::Primary(machine) = &mut node.role {
            let quit = matches!(input, primary::Input::Command { command: Command::Quit, .. });
            node.may_exit |= quit && (node.quits >= 2 || machine.phase() == primary::Phase::Protected);
            machine.handle(now, input);
        }
    }

    fn feed_secondary(&mut self, proc: ProcId, now: Instant, input: secondary::Input) {
        let quits = self.procs[proc].quits;
        let Role::Secondary(machine) = &self.procs[proc].role else { return };
        let quit = matches!(input, secondary::Input::Command { command: Command::Quit, .. });
        let asks = matches!(machine.phase(), secondary::Phase::Deciding | secondary::Phase::Locking);
        if quit && (quits >= 2 || !asks) {
            self.accept_loss(Loss::Operator);
        }
        let Role::Secondary(machine) = &mut self.procs[proc].role else { return };
        let (heartbeat, epoch) = (is_heartbeat(&input), matches!(input, secondary::Input::Staged { .. }));
        let began = matches!(machine.phase(), secondary::Phase::Joining);
        machine.handle(now, input);
        self.mind_silence(proc, heartbeat || began, epoch);
    }

    /// Epochs that arrive outweigh late heartbeats for a while only: when they are lost, a
    /// secondary must notice in time.
    fn mind_silence(&mut self, proc: ProcId, heartbeat: bool, epoch: bool) {
        let (now, timeout, heartbeat_us) = (self.now, self.plan.timeout_us, self.plan.heartbeat_us);
        let node = &mut self.procs[proc];
        let slept = (now - node.fed_at).saturating_sub(heartbeat_us * 9 / 10);
        node.fed_at = now;
        if heartbeat || slept > timeout / 2 {
            (node.heard_at, node.epochs_unheard) = (now, 0);
            return;
        }
        node.heard_at += slept;
        node.epochs_unheard += u32::from(epoch);
        let Role::Secondary(machine) = &node.role else { return };
        let silence = now - node.heard_at;
        if machine.phase() == secondary::Phase::Paired && node.epochs_unheard > 16 && silence > timeout * 22 / 10 {
            let (epochs, ms) = (node.epochs_unheard, silence / 1000);
            self.violate(format!(
                "no heartbeat for {ms} ms and {epochs} whole epochs, and the secondary does not mind"
            ));
        }
    }

    /// Where nothing ever goes wrong but that the wire carries little, nobody may be suspected.
    pub fn mind_suspicion(&mut self, proc: ProcId, event: &mcd::protocol::event::Event) {
        use mcd::protocol::event::Event as Told;
        let loss = match event {
            Told::Suspected { why } | Told::NewcomerLost { why } => Some(why),
            Told::Rejoining { why: RejoinReason::Lost(why) } => Some(why),
            _ => None,
        };
        if let Some(PeerLoss::Fault(fault)) = loss {
            self.violate(format!("n{}: {fault}; but every node keeps to the protocol", self.procs[proc].slot));
        }
        let gone = loss.is_some() || matches!(event, Told::Rejoining { .. });
        self.mind_handover(proc, event);
        // Before the first heartbeat there is nobody to send one for an engine that sleeps.
        if matches!(event, Told::Suspected { .. }) && self.plan.only_naps {
            let slot = self.procs[proc].slot;
            self.violate(format!("n{slot}: {event}; but engines slept for less than the timeout, and that is all"));
        }
        if matches!(event, Told::Suspected { .. }) && self.plan.only_freezes {
            let slot = self.procs[proc].slot;
            self.violate(format!("n{slot}: {event}; but processes froze for less than the timeout, and that is all"));
        }
        if gone && self.plan.only_narrow {
            self.violate(format!("n{}: {event}; but the wire carries little, and that is all", self.procs[proc].slot));
        }
        if gone && self.plan.only_blocked {
            let slot = self.procs[proc].slot;
            self.violate(format!("n{slot}: {event}; but what is sent waits for room, and that is all"));
        }
    }

    fn watch_phase(&mut self, proc: ProcId) {
        let phase = self.procs[proc].phase_now();
        if phase == self.procs[proc].phase {
            return;
        }
        self.procs[proc].phase = phase;
        self.note(proc, || match phase {
            AnyPhase::Primary(phase) => format!("● {phase:?}"),
            AnyPhase::Secondary(phase) => format!("○ {phase:?}"),
            AnyPhase::None => "· waits".into(),
        });
        self.pull_triggers(proc, phase);
    }

    fn execute(&mut self, proc: ProcId, act: Act) {
        match act {
            Act::Claim(action) => self.execute_claim(proc, action),
            Act::Primary(action) => self.execute_primary(proc, action),
            Act::Secondary(action) => self.execute_secondary(proc, action),
        }
    }

    // ---- the primary's effects ----

    fn execute_primary(&mut self, proc: ProcId, action: primary::Action) {
        use primary::Action;
        match action {
            Action::Send { conn, message } => self.send_or_submit(proc, conn, message),
            Action::Close { conn } => {
                if self.sender_is(proc, conn) {
                    self.give_up_sender(proc);
                } else {
                    self.close(proc, conn);
                }
            }
            Action::StartTracking { conn } => self.start_tracking(proc, conn),
            Action::StopTracking => {
                self.procs[proc].tracking_token = 0;
                self.give_up_sender(proc);
                self.pass_writes(proc);
                self.procs[proc].frozen = None;
                if let Some(guest) = &mut self.procs[proc].guest {
                    guest.take_dirty();
                    guest.tracking = false;
                }
            }
            Action::Capture { id, completes_resync, output } => self.capture(proc, id, completes_resync, output),
            Action::Push { pages } => self.submit(proc, Job::Push(pages)),
            Action::Preserve { run } => self.procs[proc].frozen = Some(Frozen::at_the_next_cut(run)),
            Action::HashBlocks { ticket, run, as_of } => self.ask_own_hashes(proc, Question { ticket, run, as_of }),
            Action::FindHoles { ticket, run } => self.find_holes(proc, ticket, run),
            // The model keeps every epoch's dirty pages until the primary forgets the peer.
            Action::Committed { id } => self.procs[proc].disk.committed(id),
            Action::WriteThrough { through } => self.write_through(proc, through),
            Action::Release { through, before } => self.release(proc, through, before),
            Action::ReleaseAll => {
                self.pass_writes(proc);
                if let Some(output) = &self.procs[proc].output {
                    output.pass();
                }
                self.look_at_output(proc);
            }
            Action::Run(run) => self.run_guest(proc, run),
            Action::Heartbeat { conn, beat, until } => self.feed_heartbeats(proc, conn, beat, until),
            Action::Answer { ticket, result } => self.answered(proc, ticket, result),
            Action::Snapshot => self.write_snapshot(proc),
            Action::NoSnapshot { why } => self.no_snapshot(proc, why),
            // A frame like the guest's own.
            Action::Announce(_) => {}
            Action::Ask(call) => self.ask_arbiter(proc, call),
            Action::Fence => self.fence(proc),
            Action::Exit(end) => {
                let protected = self.procs[proc].phase == AnyPhase::Primary(primary::Phase::Protected);
                if protected || self.procs[proc].may_exit {
                    self.accept_loss(Loss::Operator);
                }
                self.note(proc, || format!("exits: {end:?}"));
                let us = self.rng.range(1_000, 100_000);
                self.start_later(self.procs[proc].slot, us);
                self.end(proc);
            }
            Action::Tell(event) => {
                self.mind_suspicion(proc, &event);
                self.mind_disks(proc, &event);
                self.note(proc, || format!("* {event}"));
            }
        }
    }

    fn sender_is(&self, proc: ProcId, conn: ConnId) -> bool {
        self.procs[proc].sender.as_ref().is_some_and(|sender| sender.conn == conn)
    }

    fn send_or_submit(&mut self, proc: ProcId, conn: ConnId, message: Message) {
        if self.sender_is(proc, conn) {
            self.submit(proc, Job::Message(message));
        } else {
            self.send(proc, conn, Item::Message(message));
        }
    }

    fn release(&mut self, proc: ProcId, through: u64, before: Instant) {
        // Now and then the driver is frozen in the middle of a release.
        let stalls = self.plan.kinds.contains(&FaultKind::Stall) && !self.plan.is_quiet();
        let breaks = self.faults_over_since.is_none() && stalls && self.rng.chance(20);
        let mut left = if breaks { self.rng.below(3) } else { u64::MAX };
        let in_time = self.procs[proc].clock.local(self.now) < before;
        let Some(output) = &self.procs[proc].output else { return };
        let done = output.release(through, || {
            left = left.saturating_sub(1);
            in_time && left > 0
        });
        self.look_at_output(proc);
        if done {
            return;
        }
        if in_time {
            self.procs[proc].pending = Some(Act::Primary(primary::Action::Release { through, before }));
            let us = self.rng.below(self.plan.timeout_us * 8);
            self.stall(proc, us, true);
        } else {
            self.procs[proc].urgent.push_back(In::Primary(primary::Input::ReleaseExpired));
            self.note(proc, || "release expired".into());
        }
    }

    /// Checks what left the host, and passes on what the gate says.
    pub fn look_at_output(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        let (Some(output), Role::Primary(machine)) = (&node.output, &node.role) else { return };
        if output.take_waiting() {
            node.inbox.push_back(In::Primary(primary::Input::OutputWaiting { open_packets: 1 }));
        }
        if output.take_full() {
            node.inbox.push_back(In::Primary(primary::Input::OutputFull));
        }
        let packets = output.take_left();
        let (Some(first), Some(last)) = (packets.first(), packets.last()) else { return };
        let (me, generation) = (node.me, machine.generation());
        self.note(proc, || format!("≫ releases packets {first}..={last}"));
        for packet in &packets {
            let check = self.model.released(self.now, me, generation, *packet, &self.arbiter);
            self.check(check);
        }
    }

    fn fence(&mut self, proc: ProcId) {
        self.give_up_sender(proc);
        self.close_disk(proc);
        let node = &mut self.procs[proc];
        node.guest = None;
        if let Some(output) = &node.output {
            output.close();
        }
        for (conn, _) in node.conns.clone() {
            self.close(proc, conn);
        }
        self.note(proc, || "FENCED".into());
        let us = self.rng.range(1_000, 50_000);
        self.after(us, Event::Command(proc, Command::Quit));
    }
}

fn is_heartbeat(input: &secondary::Input) -> bool {
    matches!(input, secondary::Input::Message { message: Message::Heartbeat(_), .. })
}
