//! The front of a snapshot file: the preface and the head.

use std::fmt;
use std::path::Path;

use super::{FILE_VERSION, HEAD_BYTES_MAX, MAGIC, PREFACE_BYTES, SnapshotError, SnapshotId};
use crate::machine::{CpuModel, cpu_maker};
use crate::protocol::cpu::{GuestCpu, HostCpu};
use crate::protocol::machine_shape::MachineShape;
use crate::protocol::messages::PROTOCOL_VERSION;
use crate::protocol::types::{EpochId, GUEST_NAME_BYTES_MAX, Generation, GuestName};
use crate::wire::codec::{decode_shape, encode_shape};

/// Longest name of a build, in bytes.
const BUILD_BYTES_MAX: usize = 64;

/// The numbers of [`CpuModel`] in a file.
const MODELS: [(u8, CpuModel); 2] = [(0, CpuModel::Host), (1, CpuModel::Baseline)];

/// The CPU a guest saw when its snapshot was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedCpu {
    /// The model it was shown.
    pub model: CpuModel,
    /// The maker of its host's CPU.
    pub maker: [u8; 12],
    /// What it saw.
    pub guest: GuestCpu,
}

/// What a snapshot file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotHead {
    /// Its name, which no other snapshot has.
    pub id: SnapshotId,
    /// The guest.
    pub guest: GuestName,
    /// The epoch the guest was in.
    pub at: EpochId,
    /// When, in seconds since 1970; for people only.
    pub taken_s: u64,
    /// The guest was stopped for good with it: its disks' images are of this very moment.
    pub stopped: bool,
    /// The machine.
    pub shape: MachineShape,
    /// Its CPU.
    pub cpu: SavedCpu,
    /// The release of mcd that wrote it.
    pub build: String,
}

/// What is read off the front of the preface.
pub(super) struct Preface {
    pub(super) head_bytes: usize,
    pub(super) head_crc: u32,
}

impl SnapshotHead {
    /// Preface and head.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut head = Vec::new();
        head.extend_from_slice(&self.id.to_bytes());
        put_text(&mut head, self.guest.as_str(), GUEST_NAME_BYTES_MAX);
        head.extend_from_slice(&self.at.generation.0.to_le_bytes());
        head.extend_from_slice(&self.at.epoch.to_le_bytes());
        head.extend_from_slice(&self.taken_s.to_le_bytes());
        head.push(u8::from(self.stopped));
        head.push(MODELS.iter().find(|(_, model)| *model == self.cpu.model).map_or(u8::MAX, |(number, _)| *number));
        head.extend_from_slice(&self.cpu.maker);
        head.extend_from_slice(&self.cpu.guest.digest.to_le_bytes());
        head.extend_from_slice(&self.cpu.guest.tsc_khz.to_le_bytes());
        put_text(&mut head, &self.build, BUILD_BYTES_MAX);
        encode_shape(&self.shape, &mut head);
        let mut file = Vec::with_capacity(PREFACE_BYTES + head.len());
        file.extend_from_slice(&MAGIC);
        file.extend_from_slice(&FILE_VERSION.to_le_bytes());
        file.extend_from_slice(&PROTOCOL_VERSION.to_le_bytes());
        // A head is a few hundred bytes.
        file.extend_from_slice(&(head.len() as u32).to_le_bytes());
        file.extend_from_slice(&crc32c::crc32c(&head).to_le_bytes());
        file.extend_from_slice(&crc32c::crc32c(&file).to_le_bytes());
        file.extend_from_slice(&head);
        file
    }

    /// Reads the preface.
    pub(super) fn preface(path: &Path, bytes: &[u8; PREFACE_BYTES]) -> Result<Preface, SnapshotError> {
        let u16_at = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_le_bytes(*b));
        let u32_at = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
        if !bytes.starts_with(&MAGIC) {
            return Err(SnapshotError::NotASnapshot { path: path.to_owned() });
        }
        let damaged = |what: &str| SnapshotError::Damaged { path: path.to_owned(), what: what.to_owned() };
        let (theirs, ours) = ((u16_at(8), u16_at(10)), (FILE_VERSION, PROTOCOL_VERSION));
        let crc = bytes.get(..20).map(crc32c::crc32c);
        if crc != Some(u32_at(20)) {
            // Of a version to come nobody knows what is where, but for its number.
            return Err(match theirs.0 == FILE_VERSION {
                true => damaged("the check sum of its preface is wrong"),
                false => SnapshotError::OtherVersion { path: path.to_owned(), theirs, ours },
            });
        }
        if theirs != ours {
            return Err(SnapshotError::OtherVersion { path: path.to_owned(), theirs, ours });
        }
        match usize::try_from(u32_at(12)) {
            Ok(head_bytes) if head_bytes <= HEAD_BYTES_MAX => Ok(Preface { head_bytes, head_crc: u32_at(16) }),
            _ => Err(damaged("its head is too long")),
        }
    }

    /// Reads the head, whose check sum is right.
    pub(super) fn decode(bytes: &[u8]) -> Result<SnapshotHead, &'static str> {
        let mut from = Fields { rest: bytes };
        let id = SnapshotId::from_bytes(from.array()?);
        let guest = GuestName::new(from.text(GUEST_NAME_BYTES_MAX)?).ok_or("the guest's name is none")?;
        let at = EpochId { generation: Generation(from.u64()?), epoch: from.u64()? };
        let taken_s = from.u64()?;
        let stopped = match from.array()? {
            [0] => false,
            [1] => true,
            _ => return Err("a flag is neither 0 nor 1"),
        };
        let [model] = from.array()?;
        let model = MODELS.iter().find(|(number, _)| *number == model).map(|(_, model)| *model);
        let model = model.ok_or("its CPU model is unknown")?;
        let maker = from.array()?;
        let digest = from.u64()?;
        let guest_cpu = GuestCpu { digest, tsc_khz: u32::from_le_bytes(from.array()?) };
        let build = from.text(BUILD_BYTES_MAX)?.to_owned();
        let (shape, rest) = decode_shape(from.rest).map_err(|_| "no machine has its shape")?;
        if !rest.is_empty() {
            return Err("its head is longer than it should be");
        }
        let cpu = SavedCpu { model, maker, guest: guest_cpu };
        Ok(SnapshotHead { id, guest, at, taken_s, stopped, shape, cpu, build })
    }

    /// Checks that the guest can go on on `host`, whose CPU this process runs on.
    ///
    /// # Errors
    /// [`SnapshotError::Cpu`].
    pub fn check_cpu(&self, path: &Path, host: HostCpu) -> Result<(), SnapshotError> {
        match host.takes(self.cpu.guest) {
            Ok(scaled) => {
                if scaled {
                    let khz = self.cpu.guest.tsc_khz;
                    tracing::info!("the guest's TSC of {khz} kHz is scaled: this host's runs at {} kHz", host.tsc_khz);
                }
                Ok(())
            }
            Err(unfit) => {
                let (theirs, ours) = (maker_name(self.cpu.maker), maker_name(cpu_maker()));
                Err(SnapshotError::Cpu { path: path.to_owned(), theirs, ours, unfit })
            }
        }
    }
}

impl SavedCpu {
    /// The maker's name, for people.
    pub fn maker_name(&self) -> String {
        maker_name(self.maker)
    }
}

/// A maker's name for people; a damaged one is no terminal's business.
fn maker_name(maker: [u8; 12]) -> String {
    maker.iter().map(|byte| if byte.is_ascii_graphic() { char::from(*byte) } else { '?' }).collect()
}

impl fmt::Display for SavedCpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SavedCpu { model, maker, guest: GuestCpu { digest, tsc_khz } } = *self;
        write!(f, "{} of {}, features {digest:016x}, TSC {tsc_khz} kHz", model.name(), maker_name(maker))
    }
}

fn put_text(out: &mut Vec<u8>, text: &str, bytes_max: usize) {
    let cut = (0..=text.len().min(bytes_max)).rev().find(|at| text.is_char_boundary(*at));
    let text = cut.and_then(|at| text.get(..at)).unwrap_or_default();
    out.push(text.len() as u8);
    out.extend_from_slice(text.as_bytes());
}

/// Takes fields off the front, never past the end.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or("its head is shorter than it should be")?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u64(&mut self) -> Result<u64, &'static str> {
        self.array().map(u64::from_le_bytes)
    }

    fn text(&mut self, bytes_max: usize) -> Result<&'a str, &'static str> {
        let [length] = self.array()?;
        if usize::from(length) > bytes_max {
            return Err("a text in its head is too long");
        }
        let (taken, rest) = self.rest.split_at_checked(length.into()).ok_or("its head is shorter than it should be")?;
        self.rest = rest;
        std::str::from_utf8(taken).map_err(|_| "a text in its head is none")
    }
}
