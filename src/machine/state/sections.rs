//! The byte form of a machine's state: a row of sections.
//!
//! Each section is a header of ten bytes, little-endian, and a payload:
//!
//! ```text
//! kind u16 · version u16 · instance u16 · length u32 · payload
//! ```
//!
//! *Kind* says what it is ([`Kind`]), *version* which form the payload has, *instance* which one of
//! several (the vCPU's number, the interrupt chip's, the disk's). Every kind and instance occurs
//! once. The bytes come from a peer: reading them never panics, never allocates by a length it was
//! told, and refuses what it does not know.

use thiserror::Error;

/// Bytes of a section's header.
const HEADER_BYTES: usize = 10;
/// Most bytes one section may have: far above the largest (XSAVE with all extensions is about 11
/// KiB).
const SECTION_BYTES_MAX: usize = 256 * 1024;
/// Most sections a state may have: far above what 255 vCPUs need.
const SECTIONS_MAX: usize = 8192;

/// What a section holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(in crate::machine) enum Kind {
    /// The machine's shape, so that a state of another machine is refused.
    Shape = 1,
    /// Per vCPU: MP state, whether the guest ended it, its TSC frequency.
    VcpuRun = 2,
    /// Per vCPU: general registers.
    Regs = 3,
    /// Per vCPU: segments, control registers, descriptor tables.
    Sregs = 4,
    /// Per vCPU: floating point and vector state.
    Xsave = 5,
    /// Per vCPU: extended control registers.
    Xcrs = 6,
    /// Per vCPU: debug registers.
    DebugRegs = 7,
    /// Per vCPU: local APIC.
    Lapic = 8,
    /// Per vCPU: model-specific registers.
    Msrs = 9,
    /// Per vCPU: events on their way in.
    VcpuEvents = 10,
    /// Interval timer.
    Pit = 16,
    /// Interrupt controllers: 0 master PIC, 1 slave PIC, 2 IOAPIC.
    IrqChip = 17,
    /// kvmclock.
    Clock = 18,
    /// Serial port.
    Serial = 32,
    /// virtio-net.
    Net = 33,
    /// Per disk: virtio-blk.
    Block = 34,
    /// virtio-rng.
    Rng = 35,
    /// PCI configuration ports.
    Pci = 48,
}

/// Why state bytes were refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FormatError {
    /// The bytes end inside a section.
    #[error("machine state ends inside a section at byte {at}: it was cut off")]
    Truncated {
        /// Offset of the section.
        at: usize,
    },
    /// A length beyond the cap.
    #[error("machine state section {kind} claims {bytes} bytes: it is damaged")]
    TooLong {
        /// The section's kind.
        kind: u16,
        /// The length it claims.
        bytes: usize,
    },
    /// More sections than any machine has.
    #[error("machine state has more than {SECTIONS_MAX} sections: it is damaged")]
    TooMany,
    /// A section occurs twice.
    #[error("machine state section {kind} of instance {instance} occurs twice: it is damaged")]
    Twice {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
    },
    /// A section that must be there is not.
    #[error("machine state has no section {kind:?} of instance {instance}: it is of another build or damaged")]
    Missing {
        /// The section's kind.
        kind: &'static str,
        /// The section's instance.
        instance: u16,
    },
    /// A section this build does not know, or one too many.
    #[error("machine state has section {kind} of instance {instance}, which this machine has no use for")]
    Unknown {
        /// The section's kind.
        kind: u16,
        /// The section's instance.
        instance: u16,
    },
    /// A version this build does not know.
    #[error("machine state section {kind} is of version {version}, this build knows version {known}")]
    Version {
        /// The section's kind.
        kind: &'static str,
        /// The version found.
        version: u16,
        /// The version this build writes.
        known: u16,
    },
    /// A payload that is no such thing.
    #[error("machine state section {kind} makes no sense: {what}")]
    Payload {
        /// The section's kind.
        kind: &'static str,
        /// What is wrong with it.
        what: String,
    },
}

impl Kind {
    /// The kind's name in messages.
    pub(in crate::machine) fn name(self) -> &'static str {
        match self {
            Kind::Shape => "shape",
            Kind::VcpuRun => "vcpu-run",
            Kind::Regs => "regs",
            Kind::Sregs => "sregs",
            Kind::Xsave => "xsave",
            Kind::Xcrs => "xcrs",
            Kind::DebugRegs => "debugregs",
            Kind::Lapic => "lapic",
            Kind::Msrs => "msrs",
            Kind::VcpuEvents => "vcpu-events",
            Kind::Pit => "pit",
            Kind::IrqChip => "irqchip",
            Kind::Clock => "clock",
            Kind::Serial => "serial",
            Kind::Net => "net",
            Kind::Block => "block",
            Kind::Rng => "rng",
            Kind::Pci => "pci",
        }
    }

    /// The error for a payload of this kind that makes no sense.
    pub(in crate::machine) fn bad(self, what: impl Into<String>) -> FormatError {
        FormatError::Payload { kind: self.name(), what: what.into() }
    }
}

/// Appends a section whose payload `fill` writes. The length is put in afterwards, so that nothing
/// is copied twice.
pub(in crate::machine) fn write(
    out: &mut Vec<u8>,
    kind: Kind,
    version: u16,
    instance: u16,
    fill: impl FnOnce(&mut Vec<u8>),
) {
    out.extend_from_slice(&(kind as u16).to_le_bytes());
    out.extend_from_slice(&version.to_le_bytes());
    out.extend_from_slice(&instance.to_le_bytes());
    let length_at = out.len();
    out.extend_from_slice(&[0; 4]);
    let start = out.len();
    fill(out);
    let length = u32::try_from(out.len() - start).unwrap_or(u32::MAX);
    debug_assert!(length as usize <= SECTION_BYTES_MAX);
    if let Some(field) = out.get_mut(length_at..start) {
        field.copy_from_slice(&length.to_le_bytes());
    }
}

struct Section<'a> {
    kind: u16,
    version: u16,
    instance: u16,
    payload: &'a [u8],
    taken: bool,
}

/// The sections of a state, each to be taken once.
pub(in crate::machine) struct Sections<'a> {
    sections: Vec<Section<'a>>,
}

impl<'a> Sections<'a> {
    /// Splits `bytes` into sections.
    pub(in crate::machine) fn parse(bytes: &'a [u8]) -> Result<Sections<'a>, FormatError> {
        let mut sections: Vec<Section<'a>> = Vec::new();
        let mut at = 0;
        while at < bytes.len() {
            let section = parse_one(bytes, at)?;
            at += HEADER_BYTES + section.payload.len();
            sections.push(section);
            if sections.len() > SECTIONS_MAX {
                return Err(FormatError::TooMany);
            }
        }
        let mut keys: Vec<(u16, u16)> = sections.iter().map(|s| (s.kind, s.instance)).collect();
        keys.sort_unstable();
        if let Some(pair) = keys.windows(2).find(|pair| pair.first() == pair.last())
            && let Some((kind, instance)) = pair.first()
        {
            return Err(FormatError::Twice { kind: *kind, instance: *instance });
        }
        Ok(Sections { sections })
    }

    /// Takes the section `kind` of `instance`, which must be there and have `version`.
    pub(in crate::machine) fn take(
        &mut self,
        kind: Kind,
        version: u16,
        instance: u16,
    ) -> Result<Fields<'a>, FormatError> {
        let found = self.sections.iter_mut().find(|s| s.kind == kind as u16 && s.instance == instance && !s.taken);
        let section = found.ok_or(FormatError::Missing { kind: kind.name(), instance })?;
        if section.version != version {
            return Err(FormatError::Version { kind: kind.name(), version: section.version, known: version });
        }
        section.taken = true;
        Ok(Fields { kind, rest: section.payload })
    }

    /// Checks that every section was taken.
    pub(in crate::machine) fn finish(&self) -> Result<(), FormatError> {
        match self.sections.iter().find(|s| !s.taken) {
            Some(s) => Err(FormatError::Unknown { kind: s.kind, instance: s.instance }),
            None => Ok(()),
        }
    }
}

fn parse_one(bytes: &[u8], at: usize) -> Result<Section<'_>, FormatError> {
    let rest = bytes.get(at..).unwrap_or_default();
    let (header, rest) = rest.split_first_chunk::<HEADER_BYTES>().ok_or(FormatError::Truncated { at })?;
    let [k0, k1, v0, v1, i0, i1, l0, l1, l2, l3] = *header;
    let kind = u16::from_le_bytes([k0, k1]);
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length > SECTION_BYTES_MAX {
        return Err(FormatError::TooLong { kind, bytes: length });
    }
    let payload = rest.get(..length).ok_or(FormatError::Truncated { at })?;
    let version = u16::from_le_bytes([v0, v1]);
    Ok(Section { kind, version, instance: u16::from_le_bytes([i0, i1]), payload, taken: false })
}

/// The payload of one section, read from the front.
pub(in crate::machine) struct Fields<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    /// The next `length` bytes.
    pub(in crate::machine) fn bytes(&mut self, length: usize) -> Result<&'a [u8], FormatError> {
        let too_short = || self.kind.bad(format!("{} bytes are left where {length} are needed", self.rest.len()));
        let (head, rest) = self.rest.split_at_checked(length).ok_or_else(too_short)?;
        self.rest = rest;
        Ok(head)
    }

    /// The next `N` bytes.
    pub(in crate::machine) fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let bytes = self.bytes(N)?;
        bytes.try_into().map_err(|_| self.kind.bad("short"))
    }

    /// The next byte.
    pub(in crate::machine) fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// The next four bytes.
    pub(in crate::machine) fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// The next eight bytes.
    pub(in crate::machine) fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Everything that is left.
    pub(in crate::machine) fn remaining(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// Checks that nothing is left.
    pub(in crate::machine) fn end(self) -> Result<(), FormatError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(self.kind.bad(format!("{left} bytes too many"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Vec<u8> {
        let mut out = Vec::new();
        write(&mut out, Kind::Shape, 1, 0, |o| o.extend_from_slice(&[1, 2, 3]));
        write(&mut out, Kind::Regs, 2, 7, |_| {});
        out
    }

    #[test]
    fn the_form_is_the_documented_one() {
        assert_eq!(sample(), [1, 0, 1, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3, 3, 0, 2, 0, 7, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn sections_are_taken_once() {
        let bytes = sample();
        let mut sections = Sections::parse(&bytes).expect("parse");
        assert!(matches!(sections.finish(), Err(FormatError::Unknown { kind: 1, .. })));
        let mut shape = sections.take(Kind::Shape, 1, 0).expect("shape");
        assert_eq!(shape.bytes(2).expect("two"), [1, 2]);
        assert!(shape.u32().is_err());
        assert_eq!(shape.u8().expect("u8"), 3);
        shape.end().expect("end");
        assert!(matches!(sections.take(Kind::Shape, 1, 0), Err(FormatError::Missing { .. })));
        assert!(matches!(sections.take(Kind::Regs, 1, 7), Err(FormatError::Version { version: 2, .. })));
        sections.take(Kind::Regs, 2, 7).expect("regs").end().expect("end");
        sections.finish().expect("all taken");
    }

    #[test]
    fn damage_is_named() {
        let mut twice = sample();
        twice.extend(sample());
        assert!(matches!(Sections::parse(&twice), Err(FormatError::Twice { kind: 1, instance: 0 })));
        let bytes = sample();
        for cut in 1..bytes.len() {
            if cut != 13 {
                assert!(matches!(Sections::parse(&bytes[..cut]), Err(FormatError::Truncated { .. })), "{cut}");
            }
        }
        let mut long = sample();
        long[9] = 0x7f;
        assert!(matches!(Sections::parse(&long), Err(FormatError::TooLong { kind: 1, .. })));
        let many: Vec<u8> =
            (0..=SECTIONS_MAX as u32).flat_map(|i| [9, 0, 1, 0, i as u8, (i >> 8) as u8, 0, 0, 0, 0]).collect();
        assert!(matches!(Sections::parse(&many), Err(FormatError::TooMany)));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(mut sections) = Sections::parse(&bytes) {
                let _ = sections.take(Kind::Shape, 1, 0);
                let _ = sections.finish();
            }
        }
    }
}
