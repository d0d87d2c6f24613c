//! What goes wrong, and the way to the arbiter, which goes wrong too.

use mcd::protocol::arbitration::{ArbiterAnswer, ArbiterCall};
use mcd::protocol::command::Command;
use mcd::protocol::guest_event::GuestEvent;
use mcd::protocol::messages::Channel;
use mcd::protocol::primary;

use crate::losses::Loss;
use crate::net::ProcId;
use crate::node::{AnyPhase, In, Role};
use crate::plan::FaultKind;
use crate::world::{Event, World};

impl World {
    /// The random schedule: one fault, now and then a burst.
    pub fn fault(&mut self) {
        if self.faults_over_since.is_some() || self.plan.kinds.is_empty() {
            return;
        }
        let kind = *self.rng.pick(&self.plan.kinds.clone());
        let slot = self.rng.below(self.slots.len() as u64) as usize;
        self.inject(kind, slot);
        let gap = if self.rng.chance(300) { self.plan.timeout_us / 2 } else { self.plan.fault_gap_us * 2 };
        let us = self.rng.below(gap);
        self.after(us, Event::Fault);
    }

    /// Faults that wait for this phase are let loose.
    pub fn pull_triggers(&mut self, proc: ProcId, phase: AnyPhase) {
        let (primary, name) = match phase {
            AnyPhase::Primary(phase) => (true, format!("{phase:?}")),
            AnyPhase::Secondary(phase) => (false, format!("{phase:?}")),
            AnyPhase::None => return,
        };
        let slot = self.procs[proc].slot;
        let mut fired = Vec::new();
        self.plan.triggers.retain_mut(|trigger| {
            if trigger.primary != primary || trigger.phase != name {
                return true;
            }
            if trigger.skip > 0 {
                trigger.skip -= 1;
                return true;
            }
            fired.push((trigger.after_us, trigger.kind));
            false
        });
        for (us, kind) in fired {
            // Half of them hit the other side.
            let other = self.rng.below(self.slots.len() as u64) as usize;
            let slot = if self.rng.chance(600) { slot } else { other };
            self.after(us, Event::FaultAt(kind, slot));
        }
    }

    pub fn inject(&mut self, kind: FaultKind, slot: usize) {
        if self.faults_over_since.is_some() {
            return;
        }
        self.stats.faults += 1;
        let until = self.now + self.rng.below(self.plan.fault_len_us);
        match kind {
            FaultKind::Break => return self.break_connection(slot),
            FaultKind::Partition => return self.partition(slot, until),
            FaultKind::ArbiterCut => return self.cut_arbiter(slot, until),
            FaultKind::Slow => {
                let channel = self.rng.below(2) as usize;
                let extra = self.rng.below(self.plan.timeout_us);
                self.weather.slow[channel] = (until, extra);
                self.trace.across(self.now, &format!("channel {channel} is slow by {extra} us"));
                return;
            }
            FaultKind::Narrow => return self.narrow(slot, until),
            FaultKind::Deaf => return self.deafen(slot, until),
            FaultKind::UnknownPeers => return self.unknown_peers_come(slot),
            _ => {}
        }
        if kind == FaultKind::Claim {
            return self.claim_beside(slot);
        }
        let Some(proc) = self.slots[slot].filter(|proc| self.procs[*proc].alive) else { return };
        match kind {
            FaultKind::ProcessCrash | FaultKind::HostCrash => {
                let host = kind == FaultKind::HostCrash;
                let steps = self.rng.below(6);
                if steps == 0 {
                    self.crash(proc, host);
                } else {
                    self.procs[proc].crash_in = Some((steps - 1, host));
                }
            }
            FaultKind::Stall if self.plan.only_freezes => self.freeze_for_a_moment(proc),
            FaultKind::Stall if self.plan.only_naps => {
                // Not before it woke: together such sleeps may be longer than anybody vouches for.
                let us = self.rng.below(self.plan.timeout_us * 19 / 20);
                if self.now > self.procs[proc].idle_until + 1_000 {
                    self.stall(proc, us, false);
                }
            }
            FaultKind::Stall => {
                let us = if self.rng.chance(300) {
                    self.plan.timeout_us * self.rng.range(5, 20)
                } else {
                    self.rng.below(self.plan.timeout_us * 3)
                };
                let freeze = self.rng.chance(700);
                let steps = self.rng.below(5);
                if steps == 0 {
                    self.stall(proc, us, freeze);
                } else {
                    self.procs[proc].stall_in = Some((steps - 1, us, freeze));
                }
            }
            FaultKind::CaptureFails => self.procs[proc].capture_fails = true,
            FaultKind::CaptureHangs => {
                let us = self.rng.below(self.plan.stall_max_us * 3);
                // Some never end, and some end with a failure.
                let until = if self.rng.chance(150) { u64::MAX } else { self.now + us };
                let (late, fails) = (self.rng.chance(500), self.rng.chance(250));
                let began = self.now;
                let node = &mut self.procs[proc];
                (node.capture_hangs_until, node.hangs_late) = (until, late);
                node.capture_fails |= fails;
                self.note(proc, || format!("captures HANG for {} ms", until.saturating_sub(began) / 1000));
            }
            FaultKind::TrackingFails => {
                let us = self.rng.below(self.plan.stall_max_us * 3);
                let (hangs, fails) = (self.rng.chance(600), self.rng.chance(600));
                let node = &mut self.procs[proc];
                node.tracking_hangs_until = if hangs { self.now + us } else { 0 };
                node.tracking_fails |= fails;
            }
            FaultKind::StopFails => self.procs[proc].stop_fails = true,
            FaultKind::ZeroWindow => self.close_window(proc, until),
            FaultKind::SenderBlocked => {
                self.procs[proc].sender_blocked_until = until;
                let us = until - self.now;
                self.note(proc, || format!("what is sent over the data connection WAITS for {} ms", us / 1000));
            }
            FaultKind::ApplySlow => {
                self.procs[proc].applier.slow_until = until;
                let us = until - self.now;
                self.note(proc, || format!("nothing is APPLIED for {} ms", us / 1000));
            }
            FaultKind::ApplyFails => self.procs[proc].applier.fails = true,
            FaultKind::RestoreFails => self.procs[proc].restore_fails = true,
            FaultKind::Command => self.operate(proc),
            FaultKind::Shutdown => self.shut_guest_down(proc),
            FaultKind::Break | FaultKind::Partition | FaultKind::ArbiterCut => {}
            FaultKind::Slow | FaultKind::Narrow | FaultKind::Deaf | FaultKind::Claim | FaultKind::UnknownPeers => {}
        }
    }

    /// Freezes a process for less than the timeout, and now and then the next one just before it
    /// goes on: that one has heard nothing for long, and then sleeps itself.
    fn freeze_for_a_moment(&mut self, proc: ProcId) {
        // Not at once again: the other one has to hear of it in between.
        if self.now <= self.procs[proc].frozen_until + 1_000 {
            return;
        }
        let us_max = self.plan.freeze_us_max();
        let us = self.rng.range(us_max / 2, us_max);
        self.stall(proc, us, true);
        if self.rng.chance(500) {
            let (early_us, other) = (self.rng.below(2_000), self.another(self.procs[proc].slot));
            self.after(us.saturating_sub(early_us), Event::FaultAt(FaultKind::Stall, other));
        }
    }

    /// An operator starts the guest on a host on which nothing runs, whoever has the guest.
    fn claim_beside(&mut self, slot: usize) {
        if self.slots[slot].is_none() && !self.plan.recordless {
            self.boot(slot, false);
        }
    }

    fn operate(&mut self, proc: ProcId) {
        if self.rng.chance(200) {
            return self.take_snapshot(proc);
        }
        let command = *self.rng.pick(&[Command::Stop, Command::Checkpoint, Command::Cont, Command::Quit]);
        self.command(proc, command);
        if command == Command::Stop {
            let us = self.rng.below(self.plan.fault_len_us);
            self.after(us, Event::Command(proc, Command::Cont));
        }
    }

    fn shut_guest_down(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        let Some(guest) = &mut node.guest else { return };
        if guest.shut_down || !guest.runs {
            return;
        }
        guest.shut_down = true;
        node.inbox.push_back(In::Primary(primary::Input::Guest(GuestEvent::Shutdown)));
        self.note(proc, || "the guest shuts down".into());
        self.drive(proc);
    }

    fn break_connection(&mut self, slot: usize) {
        let open: Vec<usize> = (0..self.conns.len())
            .filter(|conn| {
                let conn = &self.conns[*conn];
                conn.established
                    && conn.ends.iter().all(|end| !end.closed && !end.silent)
                    && conn.ends.iter().any(|end| end.slot == slot)
            })
            .collect();
        if open.is_empty() {
            return;
        }
        let conn = *self.rng.pick(&open);
        self.trace.across(self.now, &format!("a connection of n{slot} breaks"));
        for end in 0..2 {
            let us = self.rng.below(3_000);
            self.after(us, Event::Reset { conn, end, why: "broken" });
            if self.rng.chance(500) {
                self.conns[conn].ends[end].queue.clear();
                self.conns[conn].ends[end].broken = true;
            }
        }
    }

    pub fn another(&mut self, slot: usize) -> usize {
        (slot + 1 + self.rng.below(self.slots.len() as u64 - 1) as usize) % self.slots.len()
    }

    /// All pages that may be on their way together take longer than a timeout: a heartbeat is late
    /// behind them, but not for ever. One delivery and the heartbeat interval before it take less
    /// than a timeout, for its bytes arrive here all at once, and a kernel would have shown the
    /// first of them long before.
    fn narrow(&mut self, slot: usize, until: u64) {
        let other = self.another(slot);
        let page_us_max = self.plan.timeout_us / (2 * self.plan.pages.max(8));
        let page_us_min = if self.plan.only_narrow { page_us_max * 3 / 4 } else { 0 };
        let page_us = self.rng.range(page_us_min, page_us_max);
        self.weather.narrow[slot][other] = (until, page_us);
        self.trace.across(self.now, &format!("the wire from n{slot} to n{other} takes {page_us} us for a page"));
    }

    fn deafen(&mut self, slot: usize, until: u64) {
        let other = self.another(slot);
        self.weather.block(Channel::Heartbeat, slot, other, until);
        let ms = (until - self.now) / 1000;
        self.trace.across(self.now, &format!("heartbeats from n{slot} to n{other} are lost for {ms} ms"));
    }

    fn partition(&mut self, slot: usize, until: u64) {
        let other = self.another(slot);
        let channels: &[Channel] = match self.rng.below(4) {
            0 => &[Channel::Data],
            1 => &[Channel::Heartbeat],
            _ => &[Channel::Data, Channel::Heartbeat],
        };
        let (there, back) = *self.rng.pick(&[(true, true), (true, true), (true, false), (false, true)]);
        for channel in channels {
            if there {
                self.weather.block(*channel, slot, other, until);
            }
            if back {
                self.weather.block(*channel, other, slot, until);
            }
        }
        let ms = (until - self.now) / 1000;
        let arrow = match (there, back) {
            (true, true) => "◀╳▶",
            (true, false) => "╳▶",
            _ => "◀╳",
        };
        self.trace.across(self.now, &format!("PARTITION n{slot} {arrow} n{other} {channels:?} for {ms} ms"));
    }

    pub fn cut_arbiter(&mut self, slot: usize, until: u64) {
        let all = self.rng.chance(300);
        let (deaf, mute) = *self.rng.pick(&[(true, true), (true, false), (false, true), (false, true)]);
        for each in 0..self.slots.len() {
            if all || each == slot {
                let weather = &mut self.weather;
                if deaf {
                    weather.arbiter_deaf_until[each] = weather.arbiter_deaf_until[each].max(until);
                }
                if mute {
                    weather.arbiter_mute_until[each] = weather.arbiter_mute_until[each].max(until);
                }
            }
        }
        let who = if all { "all".into() } else { format!("n{slot}") };
        let ms = (until - self.now) / 1000;
        self.trace.across(self.now, &format!("ARBITER deaf {deaf}, mute {mute} to {who} for {ms} ms"));
    }

    // ---- the way to the arbiter ----

    /// A node's arbiter thread asks one question at a time.
    pub fn ask_arbiter(&mut self, proc: ProcId, call: ArbiterCall) {
        self.note(proc, || format!("asks the arbiter #{}: {:?}", call.ticket, call.request));
        if self.procs[proc].applier.told {
            self.violate(format!("I6: n{} asks for a guest that its image is no good for", self.procs[proc].slot));
        }
        self.procs[proc].calls.push_back(call);
        self.next_call(proc);
    }

    fn next_call(&mut self, proc: ProcId) {
        if self.procs[proc].calling.is_some() {
            return;
        }
        let Some(call) = self.procs[proc].calls.pop_front() else { return };
        self.procs[proc].calling = Some(call);
        self.after(self.plan.arbiter_timeout_us, Event::ArbiterSilent { proc, ticket: call.ticket });
        let (low, high) = self.plan.arbiter_us;
        let us = self.rng.range(low, high);
        let deaf_until = self.weather.arbiter_deaf_until[self.procs[proc].slot];
        if deaf_until <= self.now {
            self.after(us, Event::ArbiterHears { proc, call });
        } else if self.rng.chance(300) {
            // It arrives after all, long after the one who asked gave up, perhaps after it died.
            self.at(deaf_until + us, Event::ArbiterHears { proc, call });
        }
    }

    pub fn arbiter_hears(&mut self, proc: ProcId, call: ArbiterCall) {
        let before = self.arbiter.record;
        let (answer, changed) = if self.plan.recordless {
            // The script ends with the node that asked.
            if !self.procs[proc].alive {
                return;
            }
            let book = &mut self.procs[proc].local_record;
            let (answer, changed, fences) = self.arbiter.serve_recordless(book, call.request);
            if fences {
                self.switch_off_the_other(proc);
            }
            (answer, changed)
        } else {
            self.arbiter.serve(call.request)
        };
        if changed {
            // The arbiter may give the guest to a node that died after it asked.
            if !self.procs[proc].alive {
                self.accept_loss(Loss::LateSwap);
            }
            if self.procs[proc].applier.is_spoilt {
                // It asked before it knew.
                self.accept_loss(Loss::SpoiltImage);
            }
            let text = format!("arbiter: {:?}", self.arbiter.record);
            self.trace.across(self.now, &text);
            if let (Some(_), Some(new)) = (self.procs[proc].claims_cold, self.arbiter.record) {
                self.claimed(proc, before, new);
            } else if let (Some(old), Some(new)) = (before, self.arbiter.record) {
                let check = self.model.swapped(self.now, old, new);
                self.check(check);
            }
        }
        let (low, high) = self.plan.arbiter_us;
        let us = self.rng.range(low, high);
        let mute_until = self.weather.arbiter_mute_until[self.procs[proc].slot];
        if mute_until <= self.now {
            self.after(us, Event::ArbiterAnswers { proc, ticket: call.ticket, answer });
        }
    }

    /// What a fencing script does before it says yes.
    fn switch_off_the_other(&mut self, proc: ProcId) {
        for slot in 0..self.slots.len() {
            if let Some(other) = self.slots[slot].filter(|other| *other != proc) {
                self.crash(other, true);
            }
        }
    }

    pub fn arbiter_answers(&mut self, proc: ProcId, ticket: u64, answer: ArbiterAnswer) {
        let node = &mut self.procs[proc];
        if !node.alive || node.calling.is_none_or(|call| call.ticket != ticket) {
            return;
        }
        if self.now < node.frozen_until {
            let at = node.frozen_until + self.rng.range(20, 500);
            return self.at(at, Event::ArbiterAnswers { proc, ticket, answer });
        }
        node.calling = None;
        if matches!(node.role, Role::Claiming(_) | Role::Primary(_) | Role::Secondary(_)) {
            self.arrive(proc, In::Answer { ticket, answer: answer.clone() });
        }
        self.note(proc, || format!("◀══ arbiter #{ticket}: {answer:?}"));
        self.next_call(proc);
        self.drive(proc);
    }
}
