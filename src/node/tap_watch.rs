//! A look at the guest's tap every so often: a tap that was set down, deleted, or taken out of its
//! bridge loses what the guest sends, and nothing else would say so. Both nodes look, because a
//! takeover onto a tap that is down would be none.

use std::sync::{Arc, Weak};
use std::time::Duration;

use netbuf::{LinkState, link_state};

use super::status::StatusStore;
use crate::protocol::event::Event;

/// Time from one look to the next.
const LOOK: Duration = Duration::from_millis(500);

/// Watches the tap `name` for as long as `status` is used; `report` sends events.
pub(super) fn start(
    name: String,
    status: &Arc<StatusStore>,
    report: impl Fn(&Event) + Send + 'static,
) -> std::io::Result<()> {
    let status = Arc::downgrade(status);
    // Before the thread runs, so that what was so at the start is what the tap is compared with.
    let mut watch = TapWatch::new(name.clone(), link_state(&name).ok().flatten());
    std::thread::Builder::new().name("mcd-tap".into()).spawn(move || {
        while watch.look(&status, &report) {
            std::thread::park_timeout(LOOK);
        }
    })?;
    Ok(())
}

struct TapWatch {
    name: String,
    /// The bridge that the tap was a port of.
    master: Option<u32>,
    /// What was wrong at the last look.
    lost: Option<String>,
}

impl TapWatch {
    fn new(name: String, at_start: Option<LinkState>) -> TapWatch {
        TapWatch { name, master: at_start.and_then(|link| link.master), lost: None }
    }

    /// One look; false if nobody wants to know any more.
    fn look(&mut self, status: &Weak<StatusStore>, report: &impl Fn(&Event)) -> bool {
        let Some(status) = status.upgrade() else { return false };
        let Ok(link) = link_state(&self.name) else {
            // That the kernel has no answer now says nothing about the tap.
            return true;
        };
        let now = status.status();
        let why = self.what_is_wrong(link, now.running);
        if why == self.lost {
            return true;
        }
        status.tap_noticed(why.clone());
        match &why {
            Some(why) => report(&Event::TapLost { why: why.clone() }),
            None => report(&Event::TapBack { lost_frames: now.lost_frames }),
        }
        self.lost = why;
        true
    }

    /// What is wrong with the tap, and what to do about it.
    fn what_is_wrong(&mut self, link: Option<LinkState>, running: bool) -> Option<String> {
        let name = &self.name;
        let Some(link) = link else {
            return Some(format!(
                "tap {name} was deleted; make it again and it is opened by itself: ip tuntap add dev {name} mode tap \
                 && ip link set {name} up"
            ));
        };
        if !link.is_up {
            return Some(format!("tap {name} is down: ip link set {name} up"));
        }
        if running && !link.has_carrier {
            return Some(format!(
                "tap {name} is not open here: another interface has its name, or another process has it"
            ));
        }
        match (self.master, link.master) {
            (Some(_), None) => {
                Some(format!("tap {name} is no port of its bridge any more: ip link set {name} master BRIDGE"))
            }
            // An operator may join it to another one.
            (_, master) => {
                self.master = master;
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_loses_frames_is_named_and_an_operators_other_bridge_is_fine() {
        let good = LinkState { index: 4, is_up: true, has_carrier: true, master: Some(3) };
        let mut watch = TapWatch::new("tap0".into(), Some(good));
        let mut wrong = |link, running| watch.what_is_wrong(link, running).unwrap_or_default();
        assert_eq!(wrong(Some(good), true), "");
        assert!(wrong(None, true).contains("was deleted; make it again"));
        assert!(wrong(Some(LinkState { is_up: false, ..good }), true).contains("ip link set tap0 up"));
        assert!(wrong(Some(LinkState { has_carrier: false, ..good }), true).contains("not open here"));
        // A secondary has it open only once its machine is built.
        assert_eq!(wrong(Some(LinkState { has_carrier: false, ..good }), false), "");
        assert!(wrong(Some(LinkState { master: None, ..good }), true).contains("no port of its bridge"));
        assert_eq!(wrong(Some(LinkState { index: 9, master: Some(8), ..good }), true), "");
        let mut routed = TapWatch::new("tap0".into(), Some(LinkState { master: None, ..good }));
        assert_eq!(routed.what_is_wrong(Some(LinkState { master: None, ..good }), true), None);
    }
}
