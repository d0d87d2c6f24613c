//! The trace: one column per node and one for the arbiter, one line per thing that happened.

const COLUMN: usize = 46;

/// What happened, kept only when somebody wants to read it.
pub struct Trace {
    pub on: bool,
    lines: Vec<String>,
}

impl Trace {
    pub fn new(on: bool) -> Trace {
        Trace { on, lines: Vec::new() }
    }

    /// Writes `text` into the column of `slot`.
    pub fn at(&mut self, us: u64, slot: usize, text: &str) {
        if self.on {
            let pad = slot * (COLUMN + 2);
            self.lines.push(format!("{:>10.3} ms  {:pad$}│ {text}", us as f64 / 1000.0, ""));
        }
    }

    /// Writes `text` across all columns.
    pub fn across(&mut self, us: u64, text: &str) {
        if self.on {
            self.lines.push(format!("{:>10.3} ms  ── {text}", us as f64 / 1000.0));
        }
    }

    pub fn into_lines(self) -> Vec<String> {
        self.lines
    }
}
