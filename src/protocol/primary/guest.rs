//! What follows from what the guest does: its end, its reset, the failure of a vCPU, and what is
//! only told.

use super::{Action, End, Phase, Primary};
use crate::protocol::event::Event;
use crate::protocol::guest_event::GuestEvent;
use crate::protocol::messages::Message;

impl Primary {
    /// What is wrong with the guest itself, if anything is: its own fault, on every host alike.
    pub fn guest_alarm(&self) -> Option<&GuestEvent> {
        self.guest_alarm.as_ref()
    }

    /// The guest's machine reports an event.
    pub(super) fn guest_event(&mut self, event: GuestEvent) {
        match event {
            GuestEvent::Booted => {}
            GuestEvent::Shutdown => self.shut_down(),
            GuestEvent::Reset => {
                // Its kernel is known to the node that started it, which may not be this one.
                self.restart = true;
                self.shut_down();
            }
            GuestEvent::VcpuFailed { cpu, reason } => self.fail_guest(format!("vCPU {cpu} failed: {reason}")),
            alarm @ (GuestEvent::Panicked | GuestEvent::DeviceBroken { .. }) => {
                self.guest_alarm = Some(alarm.clone());
                self.tell(Event::GuestAlarm { alarm });
            }
        }
    }

    /// The guest cannot go on here; a secondary that may take it over is asked to.
    fn fail_guest(&mut self, why: String) {
        if let Some(peer) = self.peer.as_ref().filter(|_| self.phase == Phase::Protected) {
            let message = Message::HandOver { reason: why.clone() };
            self.actions.push_back(Action::Send { conn: peer.data, message });
        }
        self.actions.push_back(Action::Exit(End::GuestFailed(why)));
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Input, Primary, PrimaryConfig};
    use super::*;
    use crate::protocol::arbitration::ArbiterRequest;
    use crate::protocol::record::{Record, RecordState};
    use crate::protocol::types::{InstanceId, Instant};

    fn after(event: GuestEvent) -> (Primary, Vec<Action>) {
        let me = InstanceId(1);
        let mut primary = Primary::new(PrimaryConfig::for_tests(), me, Record::first(me), Instant::from_us(0));
        primary.handle(Instant::from_us(1), Input::Guest(event));
        let actions = std::iter::from_fn(|| primary.poll_action()).collect();
        (primary, actions)
    }

    #[test]
    fn a_guest_that_ends_itself_is_stopped_on_record() {
        for (event, restart) in [(GuestEvent::Shutdown, false), (GuestEvent::Reset, true)] {
            let (primary, actions) = after(event);
            assert_eq!((primary.phase(), primary.restart), (Phase::Stopping, restart));
            let asks = |action: &Action| match action {
                Action::Ask(call) => matches!(call.request, ArbiterRequest::Swap { new, .. }
                    if new.state == RecordState::Stopped),
                _ => false,
            };
            assert!(actions.iter().any(asks), "{actions:?}");
        }
    }

    #[test]
    fn a_failed_vcpu_ends_the_node_with_a_sentence() {
        let event = GuestEvent::VcpuFailed { cpu: 3, reason: "KVM_RUN failed: EFAULT".into() };
        assert_eq!(event.to_string(), "cannot go on, because vCPU 3 failed: KVM_RUN failed: EFAULT");
        let (_, actions) = after(event);
        let why = "vCPU 3 failed: KVM_RUN failed: EFAULT".to_owned();
        assert_eq!(actions, [Action::Exit(End::GuestFailed(why))]);
    }

    #[test]
    fn an_alarm_about_a_guest_is_an_event_and_it_runs_on() {
        let broken = GuestEvent::DeviceBroken { device: "net", reason: "queue 1 is a loop".into(), count: 10 };
        let words =
            "broke the rules of device net, 10 times by now: queue 1 is a loop; it does nothing until it is reset";
        assert_eq!(broken.to_string(), words);
        for event in [GuestEvent::Panicked, broken] {
            let (primary, actions) = after(event.clone());
            assert_eq!(actions, [Action::Tell(Event::GuestAlarm { alarm: event.clone() })]);
            assert_eq!((primary.phase(), primary.guest_alarm()), (Phase::Solo, Some(&event)));
        }
        let (primary, actions) = after(GuestEvent::Booted);
        assert_eq!((primary.guest_alarm(), actions), (None, vec![]));
    }
}
