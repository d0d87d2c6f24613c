//! How a newcomer gets to a primary, and begins again when that fails.

use super::{Action, Ending, Input, Phase, Secondary};
use crate::protocol::command::{Command, CommandRefused};
use crate::protocol::event::{Event, RejoinReason};
use crate::protocol::failure_detector::{FailureDetector, HeartbeatTimer, SleepGuard};
use crate::protocol::messages::{Channel, Hello, Message, PROTOCOL_VERSION, RefuseReason, Welcome};
use crate::protocol::peer_loss::{PeerFault, PeerLoss};
use crate::protocol::types::{ConnId, Generation, Instant};

/// A newcomer waits twice as long after each time it finds the primary busy, up to so many times.
const BUSY_DOUBLINGS_MAX: u32 = 4;

impl Secondary {
    pub(super) fn new_conn(&mut self) -> ConnId {
        self.conns += 1;
        self.conns
    }

    pub(super) fn try_primary(&mut self) {
        let conn = self.new_conn();
        self.phase = Phase::Connecting;
        self.data = Some(conn);
        self.step_at = None;
        self.generation = Generation(0);
        self.actions.push_back(Action::Connect { conn, channel: Channel::Data });
        self.guard = None;
    }

    pub(super) fn connected(&mut self, now: Instant, conn: ConnId) {
        let channel = match (self.phase, conn) {
            (Phase::Connecting, conn) if self.data == Some(conn) => Channel::Data,
            (Phase::Joining, conn) if self.heartbeat == Some(conn) => Channel::Heartbeat,
            _ => return self.actions.push_back(Action::Close { conn }),
        };
        if channel == Channel::Data {
            self.phase = Phase::Greeting;
        }
        self.step_at = Some(now + self.config.answer_timeout);
        let hello = Hello {
            channel,
            version: PROTOCOL_VERSION,
            guest: self.config.guest.clone(),
            instance: self.me,
            features: self.config.features,
            staging_bytes_max: self.config.staging_bytes_max,
            cpu: self.config.cpu,
        };
        self.actions.push_back(Action::Send { conn, message: Message::Hello(hello) });
    }

    pub(super) fn welcomed(&mut self, now: Instant, conn: ConnId, welcome: Welcome) {
        self.step_at = None;
        match self.phase {
            Phase::Greeting if self.data == Some(conn) => {
                if let Err((reason, detail)) = self.check_welcome(&welcome) {
                    return self.exit(Ending::Refused { reason, detail });
                }
                self.generation = welcome.generation;
                (self.no_primary, self.busy_times) = (None, 0);
                self.welcome = Some(welcome);
                self.open_heartbeat_connection(now);
            }
            Phase::Joining if self.heartbeat == Some(conn) && self.welcome.as_ref() == Some(&welcome) => {
                self.phase = Phase::Building;
                let interval = std::time::Duration::from_micros(welcome.heartbeat_interval_us);
                let timeout = std::time::Duration::from_micros(welcome.heartbeat_timeout_us);
                self.life = Some((HeartbeatTimer::new(interval, now), FailureDetector::new(timeout, now)));
                self.guard = Some(SleepGuard::new(interval, timeout, now));
                self.actions.push_back(Action::BuildMachine(welcome));
            }
            _ => self.lose_primary(now, PeerFault::WelcomeOutOfTurn.into()),
        }
    }

    /// A primary welcomes nobody whom it asks too much of; one that does so all the same is not
    /// believed, whatever it is.
    pub(super) fn check_welcome(&self, welcome: &Welcome) -> Result<(), (RefuseReason, String)> {
        let epoch_bytes_max = welcome.shape.epoch_bytes_max();
        if epoch_bytes_max > self.config.staging_bytes_max {
            let detail = format!(
                "an epoch of its guest may hold {} MiB, and this node stages at most {} MiB; raise --staging-max",
                epoch_bytes_max.div_ceil(1 << 20),
                self.config.staging_bytes_max >> 20
            );
            return Err((RefuseReason::Staging, detail));
        }
        let Welcome { heartbeat_interval_us: interval_us, heartbeat_timeout_us: timeout_us, .. } = *welcome;
        if interval_us == 0 || timeout_us / 2 < interval_us {
            let detail = format!(
                "it announced heartbeats every {interval_us} µs and a timeout of {timeout_us} µs, which no primary \
                 does; check --peer"
            );
            return Err((RefuseReason::Malformed, detail));
        }
        Ok(())
    }

    pub(super) fn machine_ready(&mut self, now: Instant, made: Vec<bool>) {
        if self.phase != Phase::Building {
            return;
        }
        self.made = made;
        self.phase = Phase::Syncing;
        if let Some((timer, _)) = &mut self.life {
            // The primary begins with the heartbeat that says so.
            timer.feed_at(now);
        }
    }

    fn open_heartbeat_connection(&mut self, now: Instant) {
        let conn = self.new_conn();
        self.phase = Phase::Joining;
        self.heartbeat = Some(conn);
        self.step_at = Some(now + self.config.answer_timeout);
        self.actions.push_back(Action::Connect { conn, channel: Channel::Heartbeat });
    }

    pub(super) fn refused(&mut self, now: Instant, reason: RefuseReason, detail: String) {
        if matches!(reason, RefuseReason::Busy | RefuseReason::NotPrimary) {
            self.start_over(now, PeerLoss::Closed(detail));
            if reason == RefuseReason::Busy && self.phase == Phase::Connecting {
                // It has a secondary, most likely for long.
                self.step_at = Some(now + self.config.retry * (1 << self.busy_times));
                self.busy_times = (self.busy_times + 1).min(BUSY_DOUBLINGS_MAX);
            }
        } else {
            self.exit(Ending::Refused { reason, detail });
        }
    }

    /// Back to the start. Before a machine is begun that costs only a while; afterwards this
    /// instance is over.
    pub(super) fn start_over(&mut self, now: Instant, why: PeerLoss) {
        self.close_connections();
        if matches!(self.phase, Phase::Connecting | Phase::Greeting | Phase::Joining) {
            self.phase = Phase::Connecting;
            self.step_at = Some(now + self.config.retry);
            // Told once, not with every try.
            let why = why.to_string();
            if self.no_primary.as_ref() != Some(&why) {
                self.no_primary = Some(why.clone());
                self.tell(Event::NoPrimary { why });
            }
        } else {
            self.rejoin(RejoinReason::Lost(why));
        }
    }

    pub(super) fn command(&mut self, ticket: u64, command: Command) {
        let result = if command == Command::Quit { Ok(()) } else { Err(CommandRefused::Secondary) };
        self.actions.push_back(Action::Answer { ticket, result });
        if command == Command::Quit {
            self.quit();
        }
    }

    /// What comes when the guest is being restored, or when this life is over.
    pub(super) fn handle_at_the_end(&mut self, input: Input) {
        let (ticket, command) = match input {
            Input::Command { ticket, command } => (ticket, command),
            Input::Hello { conn } => return self.hello(conn),
            Input::RestoreFailed { why } => return self.restore_failed(why),
            _ => return,
        };
        let result = match command {
            Command::Quit => Ok(()),
            _ => Err(CommandRefused::TakingOver),
        };
        self.quit_in_takeover |= result.is_ok();
        self.actions.push_back(Action::Answer { ticket, result });
    }

    /// Ends this node. While it asks for the guest it may be the only one that has it, so the
    /// answer is waited for (and the guest run, if that is the answer), unless the operator asks
    /// twice.
    pub(super) fn quit(&mut self) {
        let twice = std::mem::replace(&mut self.quitting, true);
        if twice || !matches!(self.phase, Phase::Deciding | Phase::Locking) {
            self.exit(Ending::Quit);
        }
    }

    pub(super) fn rejoin(&mut self, why: RejoinReason) {
        assert!(
            !matches!(self.phase, Phase::Standby | Phase::Paired),
            "I6: a whole image is dropped without the arbiter's word"
        );
        if self.quitting {
            return self.exit(Ending::Quit);
        }
        self.close_connections();
        self.phase = Phase::Done;
        self.tell(Event::Rejoining { why });
        self.actions.push_back(Action::Rejoin { after: self.config.retry });
    }

    pub(super) fn exit(&mut self, ending: Ending) {
        self.close_connections();
        self.phase = Phase::Done;
        // What a spoilt image holds is no epoch.
        let spoilt = matches!(ending, Ending::ImageFailed(_) | Ending::NotRestored { .. });
        let stamp = self.committed.filter(|_| self.whole && !spoilt);
        self.actions.push_back(Action::Exit { ending, stamp });
    }

    pub(super) fn close_connections(&mut self) {
        for conn in [self.data.take(), self.heartbeat.take()].into_iter().flatten() {
            self.actions.push_back(Action::Close { conn });
        }
        self.life = None;
        self.guard = None;
        self.step_at = None;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::protocol::cpu::HostCpu;
    use crate::protocol::secondary::SecondaryConfig;
    use crate::protocol::types::{GuestName, InstanceId};

    const RETRY: Duration = Duration::from_millis(200);

    fn secondary() -> Secondary {
        let config = SecondaryConfig {
            guest: GuestName::new("web").expect("a name"),
            cpu: HostCpu { digest: 1, tsc_khz: 1, tsc_scales: false },
            features: 0,
            staging_bytes_max: u64::MAX,
            retry: RETRY,
            answer_timeout: Duration::from_secs(1),
            stall_max: Duration::from_secs(2),
        };
        Secondary::new(config, InstanceId(1), 0, Instant::from_us(0))
    }

    /// Lets it try once and be refused; how long it waits until it tries again.
    fn refused(node: &mut Secondary, now: &mut Instant, reason: RefuseReason) -> Duration {
        *now = node.poll_timeout().expect("it tries");
        node.handle(*now, Input::Tick);
        let conn = node.last_conn();
        node.handle(*now, Input::Connected { conn });
        let message = Message::Refuse { reason, detail: "not now".into() };
        node.handle(*now, Input::Message { conn, message });
        node.poll_timeout().expect("it tries again").since(*now)
    }

    #[test]
    fn a_newcomer_that_finds_the_primary_busy_asks_less_and_less_often() {
        let (mut node, mut now) = (secondary(), Instant::from_us(0));
        let mut waits = || refused(&mut node, &mut now, RefuseReason::Busy).as_millis();
        assert_eq!([waits(), waits(), waits(), waits(), waits(), waits()], [200, 400, 800, 1600, 3200, 3200]);
        // Told once.
        let told = std::iter::from_fn(|| node.poll_action()).filter(|action| matches!(action, Action::Tell(_)));
        assert_eq!(told.count(), 1);
        // A secondary that may become the primary at any moment is asked as before.
        assert_eq!(refused(&mut node, &mut now, RefuseReason::NotPrimary), RETRY);
    }
}
