//! The output buffer against a model so naive that it is plainly right, over random sequences of
//! operations.

use netbuf::{Limits, OutputBuffer, PushError};
use proptest::prelude::*;
use std::io;

const LIMITS: Limits = Limits { bytes_max: 5_000, packets_max: 20 };

#[derive(Clone, Debug)]
enum Op {
    Push {
        length: usize,
    },
    /// Seals the epoch `above` over the newest one; 0 is a mistake.
    Seal {
        above: u64,
    },
    /// Releases with a sink that fails after `takes` packets.
    Release {
        back: u64,
        takes: usize,
    },
    /// Looks at the first packet and takes it or not.
    Step {
        back: u64,
        take: bool,
    },
    Discard,
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => prop_oneof![4 => 0..600usize, 1 => 600..6_000usize].prop_map(|length| Op::Push { length }),
        4 => (0..4u64).prop_map(|above| Op::Seal { above }),
        3 => (0..4u64, prop_oneof![0..4usize, Just(usize::MAX)]).prop_map(|(back, takes)| Op::Release { back, takes }),
        2 => (0..4u64, any::<bool>()).prop_map(|(back, take)| Op::Step { back, take }),
        1 => Just(Op::Discard),
        1 => Just(Op::Restart),
    ]
}

/// Every packet ever pushed, with the epoch it was sealed in.
#[derive(Default)]
struct Model {
    held: Vec<(Option<u64>, Vec<u8>)>,
    newest: Option<u64>,
    out: Vec<Vec<u8>>,
}

impl Model {
    fn bytes(&self, open_only: bool) -> usize {
        self.held.iter().filter(|(epoch, _)| !open_only || epoch.is_none()).map(|(_, frame)| frame.len()).sum()
    }

    fn open(&self) -> usize {
        self.held.iter().filter(|(epoch, _)| epoch.is_none()).count()
    }

    fn push(&mut self, frame: &[u8]) -> Result<(), PushError> {
        if frame.is_empty() {
            return Err(PushError::Empty);
        }
        if frame.len() > LIMITS.bytes_max {
            return Err(PushError::TooLarge { bytes: frame.len(), bytes_max: LIMITS.bytes_max });
        }
        if self.held.len() == LIMITS.packets_max || self.bytes(false) + frame.len() > LIMITS.bytes_max {
            return Err(PushError::Full { packets: self.held.len(), bytes: self.bytes(false) });
        }
        self.held.push((None, frame.to_vec()));
        Ok(())
    }

    fn seal(&mut self, epoch: u64) -> Option<usize> {
        if self.newest.is_some_and(|newest| epoch <= newest) {
            return None;
        }
        self.newest = Some(epoch);
        let open = self.open();
        self.held.iter_mut().filter(|(epoch, _)| epoch.is_none()).for_each(|(slot, _)| *slot = Some(epoch));
        Some(open)
    }

    /// Releases up to `takes` packets; returns how many, and whether the sink was asked for one
    /// more.
    fn release(&mut self, through: u64, takes: usize) -> (usize, bool) {
        let mut done = 0;
        while self.held.first().is_some_and(|(epoch, _)| epoch.is_some_and(|epoch| epoch <= through)) {
            if done == takes {
                return (done, true);
            }
            self.out.push(self.held.remove(0).1);
            done += 1;
        }
        (done, false)
    }
}

/// A frame nobody else pushes, so that order and doubles show.
fn frame(number: u64, length: usize) -> Vec<u8> {
    number.to_le_bytes().into_iter().cycle().take(length).collect()
}

fn step(op: &Op, number: u64, buffer: &mut OutputBuffer, model: &mut Model, out: &mut Vec<Vec<u8>>) {
    let through = |model: &Model, back: u64| model.newest.unwrap_or(0).saturating_sub(back);
    match *op {
        Op::Push { length } => {
            let frame = frame(number, length);
            assert_eq!(buffer.push(&frame), model.push(&frame));
        }
        Op::Seal { above } => {
            let epoch = model.newest.unwrap_or(0) + above;
            assert_eq!(buffer.seal(epoch).ok().map(|sealed| sealed.packets), model.seal(epoch));
        }
        Op::Release { back, takes } => {
            let through = through(model, back);
            let (packets, failed) = model.release(through, takes);
            let mut taken = 0;
            let result = buffer.release(through, |frame| {
                if taken == takes {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                taken += 1;
                out.push(frame.to_vec());
                Ok(())
            });
            assert_eq!(result.is_err(), failed);
            assert_eq!(result.unwrap_or_else(|error| error.released).packets, packets);
        }
        Op::Step { back, take } => {
            let through = through(model, back);
            if let Some(first) = buffer.first(through) {
                assert_eq!(Some(first.frame()), model.held.first().map(|(_, frame)| frame.as_slice()));
                assert_eq!(Some(first.epoch()), model.held.first().and_then(|(epoch, _)| *epoch));
                if take {
                    out.push(first.frame().to_vec());
                    first.take();
                    assert_eq!(model.release(through, 1).0, 1);
                }
            } else {
                assert_eq!(model.release(through, 0), (0, false));
            }
        }
        Op::Discard => {
            assert_eq!(buffer.discard().packets, model.held.len());
            model.held.clear();
        }
        Op::Restart => {
            let allowed = model.open() == model.held.len();
            assert_eq!(buffer.restart().is_ok(), allowed);
            if allowed {
                model.newest = None;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn the_buffer_is_the_model(ops in proptest::collection::vec(op(), 0..200)) {
        let mut buffer = OutputBuffer::new(LIMITS);
        let mut model = Model::default();
        let mut out = Vec::new();
        for (number, op) in ops.iter().enumerate() {
            step(op, number as u64 + 1, &mut buffer, &mut model, &mut out);
            prop_assert_eq!(&out, &model.out);
            prop_assert_eq!(buffer.held_packets(), model.held.len());
            prop_assert_eq!(buffer.held_bytes(), model.bytes(false));
            prop_assert_eq!(buffer.open_packets(), model.open());
            prop_assert_eq!(buffer.open_bytes(), model.bytes(true));
            prop_assert_eq!(buffer.newest_sealed(), model.newest);
            prop_assert_eq!(buffer.is_empty(), model.held.is_empty());
        }
    }
}
