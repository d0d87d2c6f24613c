//! Waiting for what no event announces: one loop for all who watch nodes from outside.

use std::time::{Duration, Instant};

/// How long a test waits before it calls a node hung.
pub const WAIT_MAX: Duration = Duration::from_secs(60);

/// How often and how long to look.
#[derive(Clone, Copy, Debug)]
pub struct WaitLimits {
    /// Rest between two looks.
    pub look: Duration,
    /// Longest wait.
    pub limit: Duration,
}

/// Looks at `subject` until `check` finds what is waited for; `between` runs after each look that
/// did not.
///
/// # Errors
/// The first error of `check` or `between`; what `too_late` makes of it once the limit is over.
pub fn wait_on<S: ?Sized, T, E>(
    subject: &mut S,
    limits: WaitLimits,
    mut check: impl FnMut(&mut S) -> Result<Option<T>, E>,
    mut between: impl FnMut(&mut S) -> Result<(), E>,
    too_late: impl FnOnce(&mut S) -> E,
) -> Result<T, E> {
    let deadline = Instant::now() + limits.limit;
    loop {
        if let Some(found) = check(subject)? {
            return Ok(found);
        }
        between(subject)?;
        if Instant::now() >= deadline {
            return Err(too_late(subject));
        }
        std::thread::park_timeout(limits.look);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: WaitLimits = WaitLimits { look: Duration::from_millis(1), limit: Duration::from_secs(30) };

    #[test]
    fn a_wait_ends_with_what_it_found_or_with_the_first_error() {
        let nothing = |_: &mut u32| Ok(());
        let third = |looks: &mut u32| {
            *looks += 1;
            Ok::<_, &str>((*looks == 3).then_some("found"))
        };
        let mut looks = 0;
        assert_eq!(wait_on(&mut looks, LIMITS, third, nothing, |_| "too late"), Ok("found"));
        assert_eq!(looks, 3);
        let broken = |_: &mut u32| Err::<Option<()>, _>("broken");
        assert_eq!(wait_on(&mut looks, LIMITS, broken, nothing, |_| "too late"), Err("broken"));
        let ended = |_: &mut u32| Err("ended");
        assert_eq!(wait_on(&mut looks, LIMITS, |_| Ok(None::<()>), ended, |_| "too late"), Err("ended"));
    }

    #[test]
    fn a_wait_in_vain_looks_once_and_is_too_late() {
        let limits = WaitLimits { limit: Duration::ZERO, ..LIMITS };
        let mut looks = 0;
        let count = |looks: &mut u32| {
            *looks += 1;
            Ok(None::<()>)
        };
        assert_eq!(wait_on(&mut looks, limits, count, |_| Ok(()), |_| "too late"), Err("too late"));
        assert_eq!(looks, 1);
    }
}
