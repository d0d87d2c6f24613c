//! Which thread drives, and that nothing is lost between two.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::AtomicBool;
use std::thread::{self, ThreadId};

use super::*;
use crate::node::clock;
use crate::node::events::NodeEvent;
use crate::node::inbox::{Flag, InboxSender, Next, inbox};
use crate::protocol::messages::Message;

/// What the engine of a test does about each event.
type OnEvent = Box<dyn FnMut(&NodeEvent) -> Result<(), NodeError> + Send>;

/// Takes what comes until it has had so many events, and keeps who drove.
struct TestEngine {
    wanted: usize,
    drivers: Vec<ThreadId>,
    until: Option<Instant>,
    on_event: OnEvent,
    ticks: usize,
}

impl TestEngine {
    fn wanting(wanted: usize) -> TestEngine {
        TestEngine { wanted, drivers: Vec::new(), until: None, on_event: Box::new(|_| Ok(())), ticks: 0 }
    }
}

impl Engine for TestEngine {
    fn step(&mut self, queues: &Queues) -> Result<Step, NodeError> {
        if self.drivers.len() >= self.wanted {
            return Ok(Step::Ended);
        }
        match queues.next(self.until) {
            Some(Next::Event(event)) => {
                self.drivers.push(thread::current().id());
                (self.on_event)(&event)?;
                if matches!(event, NodeEvent::OutputWaiting) {
                    // A timer that is nearer than any before.
                    self.until = Some(clock::now());
                }
            }
            Some(Next::Due) => {
                self.until = None;
                self.ticks += 1;
                self.drivers.push(thread::current().id());
            }
            Some(Next::Gone) => return Err(NodeError::Gone),
            None => return Ok(Step::Idle(self.until)),
        }
        Ok(Step::Busy)
    }
}

fn message(conn: u64) -> NodeEvent {
    NodeEvent::Message { conn, message: Message::HashBlocks { first: 0, count: 1 } }
}

/// Runs an engine in a thread of its own, with `others` beside it.
fn run_beside(engine: TestEngine, others: impl FnOnce(&InboxSender)) -> Result<TestEngine, NodeError> {
    let (sender, inbox) = inbox();
    let started = Arc::new(AtomicBool::new(false));
    thread::scope(|scope| {
        let flag = Arc::clone(&started);
        let own = scope.spawn(move || {
            flag.store(true, Ordering::Release);
            run(engine, &inbox)
        });
        while !started.load(Ordering::Acquire) {
            thread::yield_now();
        }
        others(&sender);
        own.join().expect("the engine's own thread")
    })
}

#[test]
fn the_thread_that_has_an_event_drives_the_engine_with_it() {
    let (sender, inbox) = inbox();
    let engine = Arc::new(Mutex::new(State {
        engine: Some(TestEngine::wanting(2)),
        stepping: false,
        ended: false,
        failed: None,
    }));
    struct Here(Arc<Mutex<State<TestEngine>>>, Queues);
    impl Driver for Here {
        fn try_drive(&self) -> bool {
            let Some(mut state) = self.0.try_lock() else { return false };
            !matches!(state.drive(&self.1, Some(STEPS_MAX)), Step::Ended)
        }
    }
    let here: Arc<dyn Driver> = Arc::new(Here(Arc::clone(&engine), inbox.queues().clone()));
    inbox.set_driver(Some(Arc::downgrade(&here)));
    sender.link_event(message(1)).expect("there is an engine");
    assert_eq!(engine.lock().engine.as_ref().expect("it is there").drivers, [thread::current().id()]);

    // Held by another thread: its own thread is woken, and nothing is lost.
    let held = engine.lock();
    sender.link_event(message(1)).expect("there is an engine");
    drop(held);
    inbox.wait(None);
    assert!(matches!(engine.lock().drive(inbox.queues(), None), Step::Ended));
}

#[test]
fn events_of_many_threads_all_arrive() {
    const THREADS: u64 = 8;
    const EVENTS: usize = 5_000;
    let engine = TestEngine::wanting(THREADS as usize * EVENTS);
    let engine = run_beside(engine, |sender| {
        thread::scope(|scope| {
            for conn in 0..THREADS {
                scope.spawn(move || {
                    (0..EVENTS).for_each(|_| sender.link_event(message(conn)).expect("there is an engine"))
                });
            }
        });
    })
    .expect("it ends by itself");
    assert_eq!(engine.drivers.len(), THREADS as usize * EVENTS);
}

#[test]
fn a_nearer_timer_set_by_another_thread_is_kept() {
    let engine = run_beside(TestEngine::wanting(2), |sender| {
        // The cutter's thread is this one here: it drives, and then waits for nothing more.
        sender.wake_cutter_on_output(|| true);
        sender.raise(Flag::OutputWaiting);
        sender.drive();
    })
    .expect("it ends by itself");
    assert_eq!(engine.ticks, 1, "the timer came");
}

#[test]
fn an_end_or_failure_in_another_thread_is_the_engines() {
    let ended = run_beside(TestEngine::wanting(1), |sender| sender.link_event(message(1)).expect("there is an engine"));
    assert_eq!(ended.expect("it ended").drivers.len(), 1);
    let mut failing = TestEngine::wanting(usize::MAX);
    failing.on_event = Box::new(|_| Err(NodeError::GuestFailed("as the test wants".into())));
    let failed = run_beside(failing, |sender| sender.link_event(message(1)).expect("there is an engine"));
    assert!(matches!(failed, Err(NodeError::GuestFailed(_))));
}

#[test]
fn a_step_that_panics_in_another_thread_ends_the_engine() {
    let mut engine = TestEngine::wanting(usize::MAX);
    let own = Arc::new(Mutex::new(None));
    let seen = Arc::clone(&own);
    engine.on_event = Box::new(move |_| {
        *seen.lock() = Some(thread::current().id());
        panic!("as the test wants");
    });
    let (sender, inbox) = inbox();
    let state = State { engine: Some(engine), stepping: false, ended: false, failed: None };
    let state = Mutex::new(state);
    sender.link_event(message(1)).expect("there is an engine");
    let panicked = catch_unwind(AssertUnwindSafe(|| state.lock().drive(inbox.queues(), None)));
    assert!(panicked.is_err() && own.lock().is_some());
    let mut state = state.lock();
    assert!(matches!(state.drive(inbox.queues(), None), Step::Ended));
    assert!(matches!(state.failed, Some(NodeError::Gone)), "half a step may have been done");
}

#[test]
fn another_thread_drives_for_so_many_steps_only() {
    let (sender, inbox) = inbox();
    let engine = TestEngine::wanting(usize::MAX);
    let mut state = State { engine: Some(engine), stepping: false, ended: false, failed: None };
    for _ in 0..STEPS_MAX + 5 {
        sender.link_event(message(1)).expect("there is an engine");
    }
    assert!(matches!(state.drive(inbox.queues(), Some(STEPS_MAX)), Step::Busy));
    assert_eq!(state.engine.as_ref().expect("it is there").drivers.len(), STEPS_MAX as usize);
    assert!(matches!(state.drive(inbox.queues(), None), Step::Idle(None)));
}
