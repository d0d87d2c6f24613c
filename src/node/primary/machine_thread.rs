//! The thread that does what takes long with a running machine: captures, dirty tracking, stopping
//! and starting the guest. The engine orders and goes on; a report comes when it is done.
//!
//! A capture waits here for whatever the guest, a device or storage holds up, within a limit; and
//! only here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, Sender, unbounded};

use crate::checkpoint::capture_pool::CapturePool;
use crate::checkpoint::epoch_buffers::{Cut, CutError, Decision, EpochBuffers, RoomAgain};
use crate::checkpoint::sender::SenderQueue;
use crate::machine::{Machine, MachineError, PauseAbort};
use crate::node::events::{Captured, NodeEvent};
use crate::node::inbox::InboxSender;
use crate::node::{clock, priority};
use crate::protocol::pages::PageSet;
use crate::protocol::types::ConnId;

/// What to do with the machine, in order.
enum Order {
    /// Track dirty pages for the newcomer on this connection.
    Track { conn: ConnId, decision: Decision },
    /// Stop tracking.
    Untrack { decision: Decision },
    /// Capture an epoch and hand it to the sender.
    Capture(CaptureOrder),
    /// Let the guest run, or stop it.
    Run(bool),
    /// Disks pass their writes again: this node goes on alone.
    PassDisks { decision: Decision },
    /// Close the disks and stop the guest for good.
    Stop,
    /// Devices that found no room may find some now.
    Kick(RoomAgain),
    /// Stop the guest and save its state.
    Save,
    /// Output waits: drive the engine, which may want an epoch to be cut.
    Drive,
}

/// An epoch to capture.
pub(super) struct CaptureOrder {
    pub cut: Cut,
    pub completes_resync: bool,
    /// The resync ledger wants to know what travels.
    pub for_ledger: bool,
    pub sender: SenderQueue,
}

/// The engine's handle. The machine comes back with [`MachineThread::finish`].
pub(super) struct MachineThread {
    orders: Sender<Order>,
    events: InboxSender,
    abort: PauseAbort,
    ends: Arc<AtomicBool>,
    thread: JoinHandle<Machine>,
}

impl MachineThread {
    /// Starts the thread with a machine that runs, or will.
    ///
    /// # Errors
    /// If the host gives no thread.
    pub(super) fn start(
        machine: Machine,
        buffers: Arc<EpochBuffers>,
        pool: CapturePool,
        pause_max: Duration,
        events: InboxSender,
    ) -> std::io::Result<MachineThread> {
        let (orders, queue) = unbounded();
        let abort = machine.pause_abort();
        let (waiting, inbox) = (orders.clone(), events.clone());
        events.wake_cutter_on_output(move || waiting.send(Order::Drive).is_ok());
        let ends = Arc::new(AtomicBool::new(false));
        let worker = Worker { machine, buffers, pool, pause_max, events, ends: Arc::clone(&ends) };
        let thread = std::thread::Builder::new().name("mcd-machine".into()).spawn(move || {
            clock::sharpen_timers();
            priority::raise();
            worker.run(&queue)
        })?;
        Ok(MachineThread { orders, events: inbox, abort, ends, thread })
    }

    /// Hands over an order. The protocol bounds how many there are.
    fn order(&self, order: Order) {
        // The thread ends only with this handle.
        let _ = self.orders.send(order);
    }

    pub(super) fn track(&self, conn: ConnId, decision: Decision) {
        self.order(Order::Track { conn, decision });
    }

    /// Stops tracking. A capture that is under way is of no use any more.
    pub(super) fn untrack(&self, decision: Decision) {
        self.order(Order::Untrack { decision });
        self.abort.abort();
    }

    pub(super) fn capture(&self, order: CaptureOrder) {
        self.order(Order::Capture(order));
    }

    pub(super) fn run(&self, run: bool) {
        self.order(Order::Run(run));
    }

    /// Lets the disks pass their writes again.
    pub(super) fn pass_disks(&self, decision: Decision) {
        self.order(Order::PassDisks { decision });
    }

    /// Closes the disks and stops the guest for good.
    pub(super) fn stop(&self) {
        self.order(Order::Stop);
        self.abort.abort();
    }

    pub(super) fn kick(&self, room: RoomAgain) {
        if room != RoomAgain::default() {
            self.order(Order::Kick(room));
        }
    }

    pub(super) fn save(&self) {
        self.order(Order::Save);
    }

    /// Ends the thread once what was ordered is done; the machine.
    ///
    /// # Errors
    /// If the thread failed: the machine is gone.
    pub(super) fn finish(self) -> Result<Machine, ()> {
        self.events.no_cutter();
        drop(self.orders);
        self.ends.store(true, Ordering::Release);
        self.abort.abort();
        self.thread.join().map_err(drop)
    }
}

struct Worker {
    machine: Machine,
    buffers: Arc<EpochBuffers>,
    pool: CapturePool,
    pause_max: Duration,
    events: InboxSender,
    /// The node ends.
    ends: Arc<AtomicBool>,
}

impl Worker {
    fn run(mut self, orders: &Receiver<Order>) -> Machine {
        for order in orders {
            match order {
                Order::Track { conn, decision } => self.track(conn, decision),
                Order::Untrack { decision } => self.untrack(decision),
                Order::Capture(order) => self.capture(order),
                Order::Run(run) => self.run_guest(run),
                Order::PassDisks { decision } => {
                    let room = self.buffers.pass_disks(decision);
                    self.kick(room);
                }
                Order::Stop => self.stop_guest(),
                Order::Kick(room) => self.kick(room),
                Order::Save => self.save(),
                Order::Drive => self.events.drive(),
            }
        }
        self.machine
    }

    fn report(&self, event: NodeEvent) {
        // An engine that is ending needs no more events.
        let _ = self.events.report(event);
    }

    fn kick(&self, room: RoomAgain) {
        if room.net {
            self.machine.kick_net();
        }
        if room.disks {
            self.machine.kick_disks();
        }
    }

    fn track(&mut self, conn: ConnId, decision: Decision) {
        let result = self.machine.track_dirty(true).map_err(|error| error.to_string());
        if result.is_ok() {
            let room = self.buffers.track(decision, conn);
            self.kick(room);
        }
        self.report(NodeEvent::Tracking { conn, result });
    }

    fn untrack(&mut self, decision: Decision) {
        let room = self.buffers.untrack(decision);
        self.kick(room);
        if let Err(error) = self.machine.track_dirty(false) {
            // The guest only runs more slowly for it.
            tracing::warn!(%error, "KVM's dirty log could not be switched off");
        }
    }

    fn capture(&mut self, order: CaptureOrder) {
        let CaptureOrder { cut, completes_resync, for_ledger, sender } = order;
        let was_running = self.machine.is_running();
        let mut buffer = self.pool.get();
        if let Err(error) = self.buffers.prepare(clock::now(), &mut self.machine, &mut buffer) {
            // The cut meets it too, and then it counts.
            tracing::warn!(%error, "the dirty log could not be read ahead of a pause");
        }
        let started_us = clock::monotonic_us();
        let paused = self.machine.pause_within(self.pause_max).map_err(CutError::Source);
        let taken = paused.and_then(|()| self.buffers.cut(clock::now(), cut, &mut self.machine, &mut buffer));
        if was_running {
            self.resume();
        }
        let pause_us = clock::monotonic_us().saturating_sub(started_us);
        match taken {
            Ok(()) => {
                buffer.completes_resync = completes_resync;
                let travelled = for_ledger.then(|| {
                    let blocks = buffer.blocks.iter().flat_map(|blocks| blocks.indexes()).collect();
                    (self.buffers.with_dirty_pages(PageSet::clone), blocks)
                });
                let dirty_pages = buffer.pages_total();
                let captured = Captured { id: cut.id, started_us, pause_us, dirty_pages, travelled };
                // Nothing follows from it before the ack, whose reader drives the engine.
                let report = NodeEvent::Captured(Box::new(captured));
                let taken = || self.events.report_later(report);
                sender.epoch(buffer, || {
                    // An engine that is ending needs no more events.
                    let _ = taken();
                });
            }
            Err(error) => {
                self.buffers.put_back(cut.decision);
                self.pool.put(buffer);
                self.report(NodeEvent::CaptureFailed { id: cut.id, why: error.to_string() });
            }
        }
    }

    fn resume(&mut self) {
        if let Err(error) = self.machine.resume() {
            self.report(NodeEvent::MachineLost(error.to_string()));
        }
    }

    fn run_guest(&mut self, run: bool) {
        let done = if run { self.machine.resume() } else { self.machine.pause_within(self.pause_max) };
        self.report(NodeEvent::RunDone { run, result: done.map_err(|error| error.to_string()) });
    }

    /// Its output is closed already: how long the vCPUs run on makes no difference to anybody.
    fn stop_guest(&mut self) {
        self.buffers.close_disks();
        while let Err(error) = self.machine.pause_within(self.pause_max) {
            tracing::warn!(%error, "the fenced guest has not stopped yet; nothing of it leaves this host");
            if self.ends.load(Ordering::Acquire) {
                return;
            }
        }
    }

    fn save(&mut self) {
        let saved = self.machine.pause_within(self.pause_max).and_then(|()| {
            let mut state = Vec::new();
            self.machine.save(&mut state).map(|()| state)
        });
        self.report(NodeEvent::StateSaved(saved.map_err(|error: MachineError| Box::new(error))));
    }
}
