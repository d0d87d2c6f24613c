//! Deliberate bugs, so that the simulator can show that it finds them. Without the feature
//! `mutants` there are none: [`is`] is the constant `false`, and nothing of this is in a build.

#[cfg(feature = "mutants")]
mod chosen {
    use std::cell::Cell;

    thread_local! {
        /// The bug of this thread; each of the simulator's threads runs its own world.
        static CHOSEN: Cell<&'static str> = const { Cell::new("") };
    }

    /// From now on this thread runs with the bug of this name ("" for none).
    pub fn choose(name: &'static str) {
        CHOSEN.set(name);
    }

    /// True if this thread runs with the bug of this name.
    pub fn is(name: &str) -> bool {
        CHOSEN.get() == name
    }
}

#[cfg(feature = "mutants")]
pub use chosen::{choose, is};

/// True if the code is to behave as the bug of this name: never.
#[cfg(not(feature = "mutants"))]
pub const fn is(_name: &str) -> bool {
    false
}
