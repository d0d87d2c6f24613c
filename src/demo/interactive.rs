//! `mcd demo --interactive`: the pair stays up after the rounds, for a person to try.

use std::sync::atomic::Ordering::Relaxed;
use std::thread;

use super::error::DemoError;
use super::run::{Demo, LOOK};
use crate::testbed::error::TestbedError;
use crate::testbed::namespaces::{self, GUEST_IPV4};

impl Demo<'_> {
    /// Leaves the pair up until a signal. Whoever kills a node by hand gets another one.
    pub(super) fn stay_interactive(&mut self) -> Result<(), DemoError> {
        self.load = None;
        self.probe = None;
        self.print_instructions();
        loop {
            match self.tick_interactive() {
                Err(DemoError::Run(TestbedError::Interrupted)) => return Ok(()),
                other => other?,
            }
            thread::park_timeout(LOOK);
        }
    }

    fn print_instructions(&self) {
        let net = self.namespaces.lan.path();
        let user = if namespaces::in_user_namespace() {
            format!("--preserve-credentials --user=/proc/{}/ns/user ", std::process::id())
        } else {
            String::new()
        };
        println!("\nThe pair stays up. Try, from another terminal:");
        println!("  nsenter {user}--net={} redis-cli -h {GUEST_IPV4}", net.display());
        self.show_nodes();
        println!("Ctrl-C ends it; nothing is left behind.");
    }

    fn show_nodes(&self) {
        for (node, role) in
            std::iter::once((&self.primary, "runs the guest")).chain(self.secondary.iter().map(|n| (n, "stands by")))
        {
            println!(
                "  host {} {role}: kill -9 {}   or look: mcd status --control {}",
                node.host(),
                node.pid(),
                node.control().display()
            );
        }
    }

    fn tick_interactive(&mut self) -> Result<(), DemoError> {
        if self.stop.load(Relaxed) {
            return Err(TestbedError::Interrupted.into());
        }
        if self.secondary.as_mut().is_some_and(|node| node.ended().is_some()) {
            self.secondary = None;
            self.screen.say("the secondary is gone; another one starts");
            self.steadily(Demo::protect)?;
            self.show_nodes();
        } else if self.primary.ended().is_some() || self.primary_is_fenced() {
            self.recover()?;
            self.show_nodes();
        }
        Ok(())
    }
}
