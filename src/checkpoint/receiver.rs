//! The data connection's reading end: makes staged epochs of the frames that a
//! [`Sender`](super::sender) wrote.
//!
//! It has no thread, socket or clock of its own: whoever reads the connection gives it each frame
//! and the time.

use std::sync::Arc;

use thiserror::Error;

use super::stage::{StageError, StagedEpoch, Stager, StagingBudget};
use crate::protocol::layout::ImageLayout;
use crate::protocol::messages::Message;
use crate::protocol::types::Instant;
use crate::wire::{Frame, FrameKind, WireError};

/// Why a primary's data connection is of no more use.
#[derive(Debug, Error)]
pub enum ReceiveError {
    /// A frame or a message breaks the format.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The frames make no epoch.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// A frame that needs the guest's size came before the welcome that has it.
    #[error("the primary sent an epoch before its welcome")]
    BeforeWelcome,
    /// Hashes came, which only a secondary sends.
    #[error("the primary sent hashes, which are a secondary's to send")]
    Hashes,
}

impl ReceiveError {
    /// True if the peer does not speak this version of the protocol: connecting to it again would
    /// not help.
    pub fn is_foreign(&self) -> bool {
        matches!(self, ReceiveError::Wire(error) if error.is_foreign())
    }
}

/// What a frame brought.
#[derive(Debug)]
pub enum Received {
    /// Nothing yet: a part of an epoch, or a probe.
    Nothing,
    /// A message for the protocol.
    Message(Message),
    /// A whole epoch, checked.
    Epoch {
        /// The epoch.
        epoch: Box<StagedEpoch>,
        /// When its first frame was taken.
        began: Instant,
    },
    /// Background pages: encoded and checked.
    Background(Vec<u8>),
}

/// Turns the frames of one data connection into staged epochs, background pages and messages.
pub struct EpochReceiver {
    budget: Arc<StagingBudget>,
    /// There is one once the guest's size is known.
    stager: Option<Stager>,
    /// When the first frame of the newest epoch was taken.
    began: Instant,
}

impl EpochReceiver {
    /// A receiver at the start of a connection; the primary's welcome will have the guest's size.
    pub fn new(budget: Arc<StagingBudget>) -> EpochReceiver {
        EpochReceiver { budget, stager: None, began: Instant::default() }
    }

    /// A receiver for an image of `pages` pages.
    pub fn for_pages(budget: Arc<StagingBudget>, pages: u64) -> EpochReceiver {
        let stager = Stager::new(budget.clone(), pages);
        EpochReceiver { budget, stager: Some(stager), began: Instant::default() }
    }

    /// Takes the next frame, read at `now`. Waits while the staging budget is spent.
    ///
    /// # Errors
    /// [`ReceiveError`]; the connection is of no more use then.
    pub fn take(&mut self, now: Instant, frame: Frame<'_>) -> Result<Received, ReceiveError> {
        match frame.kind {
            FrameKind::Probe => Ok(Received::Nothing),
            FrameKind::Message => self.message(now, frame.message()?),
            FrameKind::Pages => {
                self.stager()?.pages(frame.payload)?;
                Ok(Received::Nothing)
            }
            FrameKind::State => {
                self.stager()?.state(frame.payload)?;
                Ok(Received::Nothing)
            }
            FrameKind::Background => Ok(Received::Background(self.stager()?.background(frame.payload)?)),
            FrameKind::Hashes => Err(ReceiveError::Hashes),
        }
    }

    fn message(&mut self, now: Instant, message: Message) -> Result<Received, ReceiveError> {
        match message {
            Message::EpochBegin { id, completes_resync } => {
                self.began = now;
                self.stager()?.begin(id, completes_resync)?;
                Ok(Received::Nothing)
            }
            Message::EpochEnd { id, pages, state_bytes, digest } => {
                let epoch = Box::new(self.stager()?.end(id, pages, state_bytes, digest)?);
                Ok(Received::Epoch { epoch, began: self.began })
            }
            message => {
                if let Message::Welcome(welcome) = &message {
                    let pages = ImageLayout::of(&welcome.shape).pages();
                    self.budget.fit(welcome.shape.epoch_bytes_max());
                    self.stager = Some(Stager::new(self.budget.clone(), pages));
                }
                Ok(Received::Message(message))
            }
        }
    }

    fn stager(&mut self) -> Result<&mut Stager, ReceiveError> {
        self.stager.as_mut().ok_or(ReceiveError::BeforeWelcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::pages::PAGE_BYTES;
    use crate::protocol::types::{EpochId, Generation};
    use crate::wire::{FrameBatch, FrameReader, PageEncoder};

    const ID: EpochId = EpochId { generation: Generation(3), epoch: 7 };

    fn receiver() -> (Arc<StagingBudget>, EpochReceiver) {
        let budget = StagingBudget::new(1 << 20);
        (budget.clone(), EpochReceiver::for_pages(budget, 16))
    }

    /// What the last of the frames brings; each is taken one microsecond after the other.
    fn take(receiver: &mut EpochReceiver, batch: &FrameBatch) -> Result<Received, ReceiveError> {
        let mut reader = FrameReader::new(batch.as_bytes());
        let mut last = Ok(Received::Nothing);
        for us in 1.. {
            match reader.read() {
                Ok(frame) => last = receiver.take(Instant::from_us(us), frame),
                Err(WireError::Closed) => break,
                Err(error) => panic!("{error}"),
            }
            if last.is_err() {
                break;
            }
        }
        last
    }

    fn page(index: u64) -> Vec<u8> {
        let mut chunk = Vec::new();
        PageEncoder::new(false).encode(index, &[9; PAGE_BYTES], &mut chunk);
        chunk
    }

    fn epoch() -> FrameBatch {
        let (chunk, state) = (page(4), [5; 10]);
        let digest = crc32c::crc32c_append(crc32c::crc32c(&chunk), &state);
        let mut batch = FrameBatch::new();
        batch.push(FrameKind::Probe, &[]).unwrap();
        batch.push_message(&Message::EpochBegin { id: ID, completes_resync: true }).unwrap();
        batch.push(FrameKind::Pages, &chunk).unwrap();
        batch.push(FrameKind::State, &state).unwrap();
        batch.push_message(&Message::EpochEnd { id: ID, pages: 1, state_bytes: 10, digest }).unwrap();
        batch
    }

    #[test]
    fn an_epoch_comes_out_whole_and_with_the_time_it_began() {
        let (budget, mut receiver) = receiver();
        let Ok(Received::Epoch { epoch, began }) = take(&mut receiver, &epoch()) else { panic!("no epoch") };
        assert_eq!((epoch.id, epoch.completes_resync, began), (ID, true, Instant::from_us(2)));
        assert_eq!((epoch.chunks.len(), epoch.state.len()), (1, 10));
        assert_eq!(budget.used(), epoch.bytes);
    }

    #[test]
    fn messages_and_background_pages_pass() {
        let (budget, mut receiver) = receiver();
        let mut batch = FrameBatch::new();
        batch.push(FrameKind::Background, &page(15)).unwrap();
        assert!(matches!(take(&mut receiver, &batch), Ok(Received::Background(payload)) if payload == page(15)));
        assert_eq!(budget.used(), page(15).len() as u64);
        batch.clear();
        batch.push_message(&Message::Written { through: ID }).unwrap();
        assert!(matches!(take(&mut receiver, &batch), Ok(Received::Message(Message::Written { through: ID }))));
    }

    #[test]
    fn what_a_primary_must_not_send_is_a_typed_error() {
        let refused = |kind: FrameKind, payload: &[u8]| {
            let mut batch = FrameBatch::new();
            batch.push(kind, payload).unwrap();
            take(&mut receiver().1, &batch).expect_err("refused")
        };
        assert!(matches!(refused(FrameKind::Hashes, &[0; 4]), ReceiveError::Hashes));
        assert!(matches!(refused(FrameKind::Pages, &page(3)), ReceiveError::Stage(StageError::OutOfPlace { .. })));
        assert!(matches!(refused(FrameKind::Background, &page(16)), ReceiveError::Stage(StageError::Pages(_))));
        // An empty frame spends nothing of the budget, so nothing would bound how many there are.
        for kind in [FrameKind::Pages, FrameKind::Background, FrameKind::State] {
            assert!(matches!(refused(kind, &[]), ReceiveError::Stage(StageError::Empty { .. })), "{kind}");
        }
        let foreign = refused(FrameKind::Message, &[255]);
        assert!(foreign.is_foreign(), "{foreign}");
    }

    #[test]
    fn an_epoch_needs_the_welcome_first() {
        let mut receiver = EpochReceiver::new(StagingBudget::new(1 << 20));
        assert!(matches!(take(&mut receiver, &epoch()), Err(ReceiveError::BeforeWelcome)));
    }
}
