//! The guest at work, and the sender thread that reads its memory.

use mcd::protocol::primary;
use mcd::protocol::types::ConnId;
use mcd::protocol::types::EpochId;

use crate::guest::TORN;
use crate::net::{Bulk, Item, ProcId};
use crate::node::{HOLE, In, Job};
use crate::plan::Plan;
use crate::world::{Event, World};

impl World {
    // ---- the sender thread ----

    pub fn submit(&mut self, proc: ProcId, job: Job) {
        let Some(sender) = &mut self.procs[proc].sender else { return };
        sender.jobs.push_back(job);
        if sender.jobs.len() == 1 {
            let token = sender.token;
            let us = self.takes(self.plan.sender_us);
            self.after(us, Event::SenderStep { proc, token });
        }
    }

    pub fn sender_step(&mut self, proc: ProcId, token: u64) {
        let Some(sender) = &mut self.procs[proc].sender else { return };
        if sender.token != token {
            return;
        }
        if let Some(us) = self.sender_waits_us(proc) {
            return self.after(us, Event::SenderStep { proc, token });
        }
        let Some(sender) = &mut self.procs[proc].sender else { return };
        let conn = sender.conn;
        let Some(job) = sender.jobs.pop_front() else { return };
        let more = !sender.jobs.is_empty();
        let pushed = self.perform(proc, conn, job);
        if more {
            let us = self.takes(self.plan.sender_us);
            self.after(us, Event::SenderStep { proc, token });
        }
        if pushed {
            self.arrive(proc, In::Primary(primary::Input::Pushed));
            self.drive(proc);
        }
    }

    /// Does one job; true if a push was read.
    fn perform(&mut self, proc: ProcId, conn: ConnId, job: Job) -> bool {
        match job {
            Job::Message(message) => self.send(proc, conn, Item::Message(message)),
            Job::Epoch { id, completes, pages, counter, life } => {
                let bytes = self.encoder.epoch(id, completes, &pages, (counter, life));
                self.send_epoch(proc, conn, id, pages.len(), bytes);
            }
            Job::Push(pages) => {
                let read: Vec<_> = pages.iter().map(|page| (*page, self.read_page(proc, *page))).collect();
                let bytes = self.encoder.push(&read);
                self.send(proc, conn, Item::Bulk { bytes, pages: read.len(), what: Bulk::Background });
                return true;
            }
        }
        false
    }

    /// An epoch travels in three pieces, cut anywhere.
    fn send_epoch(&mut self, proc: ProcId, conn: ConnId, id: EpochId, pages: usize, mut bytes: Vec<u8>) {
        let end = bytes.len() as u64;
        let cut = self.rng.range(1, end - 1);
        let mut rest = bytes.split_off(cut as usize);
        let last = rest.split_off(self.rng.below(end - cut) as usize);
        let half = pages / 2;
        for (bytes, pages, part) in [(bytes, half, "its beginning"), (rest, pages - half, "more"), (last, 0, "its end")]
        {
            self.send(proc, conn, Item::Bulk { bytes, pages, what: Bulk::Epoch(id, part) });
        }
    }

    /// Reads a page while the guest runs: it may write the page that very moment.
    pub fn read_page(&mut self, proc: ProcId, page: u64) -> u64 {
        let torn = self.rng.chance(200) && self.guest_runs(proc);
        let Some(guest) = &self.procs[proc].guest else { return HOLE };
        if torn && guest.tracking {
            self.versions += 1;
            let version = self.versions;
            self.guest_writes(proc, page, version);
            return version | TORN;
        }
        guest.pages[page as usize]
    }

    /// The sender thread ends: what was handed over leaves, then the connection closes.
    pub fn drop_sender(&mut self, proc: ProcId) {
        let Some(sender) = self.procs[proc].sender.take() else { return };
        for job in sender.jobs {
            self.perform(proc, sender.conn, job);
        }
        self.close(proc, sender.conn);
    }

    // ---- the guest ----

    pub fn guest_runs(&self, proc: ProcId) -> bool {
        let node = &self.procs[proc];
        node.alive
            && self.now >= node.paused_until
            && node.guest.as_ref().is_some_and(|guest| guest.runs && !guest.shut_down)
    }

    pub fn guest_step(&mut self, proc: ProcId) {
        if !self.procs[proc].alive || self.procs[proc].guest.is_none() {
            return;
        }
        if self.guest_runs(proc) {
            let writes = self.rng.range(1, self.plan.writes_max);
            let packets = if self.rng.chance(self.plan.emit_per_mille) { self.rng.range(1, 3) } else { 0 };
            for _ in 0..writes {
                let page = self.page_to_write();
                let version = self.version_to_write(page);
                self.guest_writes(proc, page, version);
            }
            self.use_disk(proc);
            for _ in 0..packets {
                self.emit(proc);
            }
            self.drive(proc);
        }
        let us = self.rng.range(self.plan.guest_step_us / 4, self.plan.guest_step_us * 2);
        self.after(us, Event::GuestStep(proc));
    }

    /// Some pages of memory are hot; a block of a disk is written now and then, or hardly ever.
    fn page_to_write(&mut self) -> u64 {
        let Plan { memory, pages, block_per_mille, .. } = self.plan;
        if pages > memory && self.rng.chance(block_per_mille) {
            return self.rng.range(memory, pages - 1);
        }
        let memory = if self.rng.chance(500) { memory.min(4) } else { memory };
        self.rng.below(memory)
    }

    /// Something new; in a block of a disk now and then what it, or another one, had before.
    fn version_to_write(&mut self, page: u64) -> u64 {
        if page >= self.plan.memory && self.rng.chance(300) {
            return self.rng.below(3);
        }
        self.versions += 1;
        self.versions
    }

    /// The guest sends its next packet, or keeps it while the gate has no room.
    fn emit(&mut self, proc: ProcId) {
        let node = &mut self.procs[proc];
        if let (Some(guest), Some(output)) = (&mut node.guest, &node.output)
            && output.transmit(guest.counter)
        {
            guest.counter += 1;
        }
        self.look_at_output(proc);
    }
}
