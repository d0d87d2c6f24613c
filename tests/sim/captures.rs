//! What the machine thread of a simulated primary does: it tracks dirty pages, cuts epochs, and
//! lets the guest run or stops it. Any of it may take long, hang or fail.

use mcd::protocol::event::Event as Told;
use mcd::protocol::mutant;
use mcd::protocol::pages::PageSet;
use mcd::protocol::primary::{self, OutputCut};
use mcd::protocol::types::{ConnId, EpochId};

use crate::net::ProcId;
use crate::node::{AnyPhase, Capture, In, Job, Role, Sender};
use crate::world::{Event, World};

impl World {
    /// Begins to track dirty pages, or fails to.
    pub fn start_tracking(&mut self, proc: ProcId, conn: ConnId) {
        let us = self.takes(self.plan.capture_us);
        let fails = std::mem::take(&mut self.procs[proc].tracking_fails);
        self.after(us, Event::Tracking { proc, conn, fails });
        if fails || self.procs[proc].conn(conn).is_none() {
            return;
        }
        self.tokens += 1;
        let token = self.tokens;
        let node = &mut self.procs[proc];
        node.sender = Some(Sender { conn, token, jobs: Default::default() });
        node.tracking_token = token;
        node.frozen = None;
        if let Some(guest) = &mut node.guest {
            guest.take_dirty();
            guest.tracking = true;
        }
        self.hold_writes(proc, conn);
    }

    /// Dirty pages are tracked, or cannot be.
    pub fn tracking(&mut self, proc: ProcId, conn: ConnId, fails: bool) {
        let node = &self.procs[proc];
        if !node.alive || !node.is_primary() {
            return;
        }
        let hangs_until = node.tracking_hangs_until.max(node.frozen_until);
        if self.now < hangs_until {
            return self.at(self.now + (hangs_until - self.now).min(1_000), Event::Tracking { proc, conn, fails });
        }
        let result = if fails { Err("no dirty log".into()) } else { Ok(()) };
        self.note(proc, || format!("tracking: {result:?}"));
        self.arrive(proc, In::Primary(primary::Input::Tracking { conn, result }));
        self.drive(proc);
    }

    /// Begins a capture: the cut comes after a while, and everything else goes on meanwhile.
    pub fn capture(&mut self, proc: ProcId, id: EpochId, completes: bool, output: OutputCut) {
        if let Some(earlier) = self.procs[proc].capturing.replace(id) {
            let slot = self.procs[proc].slot;
            return self.violate(format!("n{slot} begins to capture {id} while {earlier} is being captured"));
        }
        let us = self.takes(self.plan.capture_us);
        let (token, stalled_us) = (self.procs[proc].tracking_token, self.procs[proc].stalled_us);
        let begun_at = self.now;
        self.after(us, Event::Cut(Capture { proc, id, completes, output, token, begun_at, stalled_us }));
    }

    /// The cut of a capture that was begun before. One that was begun for a newcomer who is given
    /// up since changes nothing; it may hang on after that, for nothing aborts it.
    pub fn cut(&mut self, capture: Capture) {
        let Capture { proc, id, token, begun_at, stalled_us, .. } = capture;
        if !self.procs[proc].alive || !self.procs[proc].is_primary() {
            return;
        }
        if self.now < self.procs[proc].frozen_until {
            return self.at(self.procs[proc].frozen_until, Event::Cut(capture));
        }
        let node = &self.procs[proc];
        if self.now < node.capture_hangs_until && (node.tracking_token == token || node.hangs_late) {
            let awake_us = self.now - begun_at - (node.stalled_us - stalled_us).min(self.now - begun_at);
            let vouches = node.phase_now() == AnyPhase::Primary(primary::Phase::Protected);
            if vouches && node.tracking_token == token && awake_us > self.plan.stall_max_us + self.plan.timeout_us * 2 {
                let ms = awake_us / 1000;
                return self.violate(format!("n{} vouches for a guest it cannot capture for {ms} ms", node.slot));
            }
            // As the machine's pause does: it is asked again and again.
            return self.after(1_000, Event::Cut(capture));
        }
        self.procs[proc].capturing = None;
        if self.procs[proc].tracking_token != token && !mutant::is("late-cut-carried-out") {
            let why = "the newcomer was given up meanwhile".into();
            self.procs[proc].inbox.push_back(In::Primary(primary::Input::CaptureFailed { id, why }));
            return self.drive(proc);
        }
        // That it succeeded wakes nobody: the engine hears it with whatever comes next, and
        // timers come first.
        if !self.cut_now(capture) {
            self.drive(proc);
        }
    }

    /// Cuts; false if that failed.
    fn cut_now(&mut self, capture: Capture) -> bool {
        let Capture { proc, id, completes, output, .. } = capture;
        let node = &mut self.procs[proc];
        let fails = std::mem::take(&mut node.capture_fails);
        let Some(guest) = &mut node.guest else { return false };
        let dirty = guest.take_dirty();
        if let Some(frozen) = &mut node.frozen {
            frozen.cut(id, &guest.pages);
        }
        if let Some(gate) = &node.output {
            gate.cut(output, id.epoch);
        }
        if fails {
            guest.dirty.union_with(&dirty);
            node.disk.put_back();
            node.inbox.push_back(In::Primary(primary::Input::CaptureFailed { id, why: "no memory".into() }));
            self.note(proc, || format!("capture {id} FAILS"));
            return false;
        }
        let snapshot = guest.snapshot();
        let (counter, life) = (snapshot.counter, snapshot.life);
        // A page that the capture overlooks is clean from now on.
        let overlooked = if mutant::is("dirty-forgotten") && dirty.count() > 3 { dirty.iter().next() } else { None };
        let mut pages: Vec<(u64, u64)> = dirty
            .iter()
            .filter(|page| Some(*page) != overlooked)
            .map(|page| (page, snapshot.pages[page as usize]))
            .collect();
        pages.extend(node.disk.cut(id).into_iter().map(|(block, version)| (self.plan.pages + block, version)));
        if let Role::Primary(machine) = &mut node.role {
            let mut memory = PageSet::empty(self.plan.memory);
            dirty.iter().for_each(|page| memory.insert(page));
            machine.note_dirty_pages(&memory);
            machine.note_blocks(dirty.iter().filter(|page| *page >= self.plan.memory));
        }
        node.inbox.push_back(In::Primary(primary::Input::Captured { id }));
        self.stats.epochs += 1;
        let check = self.model.captured(id, snapshot);
        self.check(check);
        self.note(proc, || format!("capture {id}: {} pages, packets below {counter}", pages.len()));
        self.submit(proc, Job::Epoch { id, completes, pages, counter, life });
        true
    }

    /// Lets the guest run, or stops it; now and then a vCPU does not stop.
    pub fn run_guest(&mut self, proc: ProcId, run: bool) {
        let fails = !run && std::mem::take(&mut self.procs[proc].stop_fails);
        self.note(proc, || format!("run {run}{}", if fails { " FAILS" } else { "" }));
        let node = &mut self.procs[proc];
        if run && node.saving {
            self.violate(format!("n{} lets a guest run whose snapshot is written", self.procs[proc].slot));
            return;
        }
        if let Some(guest) = node.guest.as_mut().filter(|_| !fails) {
            guest.runs = run;
        }
        node.stop_failed |= fails;
        let result = if fails { Err("a vCPU does not stop".into()) } else { Ok(()) };
        node.urgent.push_back(In::Primary(primary::Input::RunDone { run, result }));
    }

    /// A guest that was handed over because it cannot be captured has to run at the secondary, if
    /// nothing else goes wrong.
    pub fn mind_handover(&mut self, proc: ProcId, event: &Told) {
        match event {
            Told::HandedOver { .. } => {
                self.stats.handovers += 1;
                self.procs[proc].handed_over = true;
            }
            Told::Unprotected { .. } if self.procs[proc].handed_over && self.plan.only_hangs => {
                let slot = self.procs[proc].slot;
                self.violate(format!("n{slot} takes the guest back that it handed over, though the secondary is well"));
            }
            Told::Unprotected { .. } => self.procs[proc].handed_over = false,
            _ => {}
        }
    }
}
