//! How much memory a message of the guest's takes once it is decoded, found out
//! before it is.
//!
//! Two bytes on the wire may be an entry of hundreds of bytes in memory: a
//! limit on a message's length alone lets a guest of a few MiB take a GiB of
//! its host. So a guest's message is walked first ([`check`]), and one whose
//! entries would take more than [`MAX_ENTRIES_BYTES`] is not decoded. Texts and
//! bytes take what they have on the wire, which the length bounds.

use std::fmt::Debug;
use std::mem::size_of;

use prost::{DecodeError, Message, decode_length_delimiter};

use crate::*;

/// For the entries of one message. Statistics of some nine hundred containers
/// with ten disks each.
pub const MAX_ENTRIES_BYTES: usize = 1 << 20;

/// The fields of a message that take memory for each time that they come, by
/// their numbers.
#[derive(Debug)]
pub struct Shape(pub &'static [(u32, Part)]);

#[derive(Debug)]
pub enum Part {
    /// A message that is kept once, with fields that are not.
    Once(&'static Shape),
    /// A message that is kept each time: how many bytes it takes without its
    /// own fields.
    Entries(usize, &'static Shape),
    /// Numbers of so many bytes each.
    Numbers(usize),
}

/// A message that can be decoded. Stated for each, so that none is forgotten.
pub trait Bounded: Message + Default {
    /// None: it comes from the host, which the guest trusts.
    const SHAPE: Option<&'static Shape>;
}

#[derive(Debug, thiserror::Error)]
pub enum BoundsError {
    #[error("its entries would take more than {MAX_ENTRIES_BYTES} bytes of memory")]
    Entries,
    #[error("it is not well-formed")]
    Malformed,
    #[error("it is not well-formed")]
    Varint(#[from] DecodeError),
}

/// Fails for a message whose entries would take more than `left` bytes, and for
/// one that cannot be decoded; takes them off `left` otherwise.
pub fn check(mut bytes: &[u8], shape: &Shape, left: &mut usize) -> Result<(), BoundsError> {
    const VARINT: usize = 0;
    const EIGHT_BYTES: usize = 1;
    const LENGTH: usize = 2;
    const FOUR_BYTES: usize = 5;
    while !bytes.is_empty() {
        let key = decode_length_delimiter(&mut bytes)?;
        let mut parts = shape.0.iter();
        let part = parts.find(|(number, _)| usize::try_from(*number) == Ok(key >> 3));
        let part = part.map(|(_, part)| part);
        match key & 7 {
            VARINT => {
                decode_length_delimiter(&mut bytes)?;
                if let Some(Part::Numbers(size)) = part {
                    take(left, *size)?;
                }
            }
            EIGHT_BYTES => drop(split(&mut bytes, 8)?),
            FOUR_BYTES => drop(split(&mut bytes, 4)?),
            LENGTH => {
                let length = decode_length_delimiter(&mut bytes)?;
                let inner = split(&mut bytes, length)?;
                match part {
                    None => {}
                    Some(Part::Once(shape)) => check(inner, shape, left)?,
                    Some(Part::Entries(size, shape)) => {
                        take(left, *size)?;
                        check(inner, shape, left)?;
                    }
                    // Of one byte each, at the least.
                    Some(Part::Numbers(size)) => take(left, inner.len().saturating_mul(*size))?,
                }
            }
            // Groups, which no agent has ever sent.
            _ => return Err(BoundsError::Malformed),
        }
    }
    Ok(())
}

fn split<'a>(bytes: &mut &'a [u8], length: usize) -> Result<&'a [u8], BoundsError> {
    let (first, rest) = bytes
        .split_at_checked(length)
        .ok_or(BoundsError::Malformed)?;
    *bytes = rest;
    Ok(first)
}

fn take(left: &mut usize, size: usize) -> Result<(), BoundsError> {
    *left = left.checked_sub(size).ok_or(BoundsError::Entries)?;
    Ok(())
}

const FLAT: Shape = Shape(&[]);
const CONTAINER_STATE: Shape = Shape(&[(8, Part::Numbers(size_of::<u32>()))]);
const CONTAINER_STATS: Shape = Shape(&[(29, Part::Entries(size_of::<DiskStats>(), &FLAT))]);
const GUEST_STATS: Shape = Shape(&[(5, Part::Entries(size_of::<InterfaceStats>(), &FLAT))]);

/// What the guest says.
macro_rules! from_guest {
    ($($message:ty: $shape:expr;)*) => {$(
        impl Bounded for $message {
            const SHAPE: Option<&'static Shape> = Some(&$shape);
        }
    )*};
}

/// What the host says.
macro_rules! from_host {
    ($($message:ty),* $(,)?) => {$(
        impl Bounded for $message {
            const SHAPE: Option<&'static Shape> = None;
        }
    )*};
}

from_guest! {
    ConfigureSandboxResponse: FLAT;
    SetTimeResponse: FLAT;
    CreateContainerResponse: Shape(&[(1, Part::Once(&CONTAINER_STATE))]);
    StartContainerResponse: FLAT;
    SignalContainerResponse: FLAT;
    RemoveContainerResponse: FLAT;
    ListContainersResponse: Shape(&[
        (1, Part::Entries(size_of::<ContainerState>(), &CONTAINER_STATE)),
    ]);
    UpdateContainerResponse: FLAT;
    ExecSyncEvent: FLAT;
    SessionEvent: FLAT;
    ResizeResponse: FLAT;
    Event: FLAT;
    StatsResponse: Shape(&[
        (1, Part::Entries(size_of::<ContainerStats>(), &CONTAINER_STATS)),
        (2, Part::Once(&GUEST_STATS)),
    ]);
    ShutdownResponse: FLAT;
}

from_host! {
    ConfigureSandboxRequest,
    SetTimeRequest,
    CreateContainerRequest,
    StartContainerRequest,
    SignalContainerRequest,
    RemoveContainerRequest,
    ListContainersRequest,
    UpdateContainerRequest,
    ExecSyncRequest,
    ExecRequest,
    AttachRequest,
    ResizeRequest,
    EventsRequest,
    StatsRequest,
    ShutdownRequest,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost_types::field_descriptor_proto::{Label, Type};
    use prost_types::{DescriptorProto, FileDescriptorSet};

    use super::*;

    const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent.descriptors"));

    fn measure<M: Bounded>(message: &M) -> Result<usize, BoundsError> {
        let mut left = MAX_ENTRIES_BYTES;
        check(&message.encode_to_vec(), M::SHAPE.unwrap(), &mut left)?;
        Ok(MAX_ENTRIES_BYTES - left)
    }

    #[test]
    fn entries_are_counted_for_what_they_take_in_memory() {
        let disks = vec![DiskStats::default(); 3];
        let container = ContainerStats {
            disks,
            ..ContainerStats::default()
        };
        let stats = StatsResponse {
            containers: vec![container; 2],
            guest: Some(GuestStats {
                interfaces: vec![InterfaceStats::default(); 4],
                ..GuestStats::default()
            }),
            time_unix_nanos: -1,
        };
        let expected = 2 * size_of::<ContainerStats>()
            + 6 * size_of::<DiskStats>()
            + 4 * size_of::<InterfaceStats>();
        assert_eq!(measure(&stats).unwrap(), expected);

        let state = ContainerState {
            supplemental_groups: vec![1; 100],
            ..ContainerState::default()
        };
        let list = ListContainersResponse {
            containers: vec![state],
        };
        assert_eq!(measure(&list).unwrap(), size_of::<ContainerState>() + 400);
    }

    #[test]
    fn two_million_entries_of_two_bytes_are_refused() {
        let stats = StatsResponse {
            containers: vec![ContainerStats::default(); 4000],
            ..StatsResponse::default()
        };
        assert!(matches!(measure(&stats), Err(BoundsError::Entries)));
        let mut left = MAX_ENTRIES_BYTES;
        let flood = [0x0a, 0].repeat(2_000_000);
        let shape = StatsResponse::SHAPE.unwrap();
        let refused = check(&flood, shape, &mut left).unwrap_err();
        assert!(matches!(refused, BoundsError::Entries), "{refused}");
    }

    #[test]
    fn numbers_that_are_not_packed_are_counted_too() {
        let mut left = MAX_ENTRIES_BYTES;
        let three = [0x40, 1, 0x40, 2, 0x40, 3];
        check(&three, &CONTAINER_STATE, &mut left).unwrap();
        assert_eq!(MAX_ENTRIES_BYTES - left, 12);
    }

    /// Each repeated field of `message`, and of those inside of it, has to be in
    /// its shape.
    fn compare(set: &FileDescriptorSet, message: &DescriptorProto, shape: &Shape) {
        let find = |name: &str| {
            let mut all = set.file.iter().flat_map(|file| &file.message_type);
            all.find(|m| name == format!(".drupe.agent.v1.{}", m.name()))
                .unwrap()
        };
        let mut stated = shape.0.len();
        for field in &message.field {
            let number = u32::try_from(field.number()).unwrap();
            let part = shape.0.iter().find(|(n, _)| *n == number).map(|(_, p)| p);
            let what = format!("{}.{}", message.name(), field.name());
            let repeated = field.label() == Label::Repeated;
            match (field.r#type(), repeated, part) {
                (Type::Message, true, Some(Part::Entries(_, shape)))
                | (Type::Message, false, Some(Part::Once(shape))) => {
                    compare(set, find(field.type_name()), shape);
                }
                (Type::Message, false, None) => compare(set, find(field.type_name()), &FLAT),
                (Type::Uint32, true, Some(Part::Numbers(4))) | (_, false, None) => {}
                other => panic!("{what}: {other:?}"),
            }
            stated -= usize::from(part.is_some());
        }
        assert_eq!(stated, 0, "{} has no such field", message.name());
    }

    #[test]
    fn shapes_are_those_of_the_interface() {
        let set = FileDescriptorSet::decode(DESCRIPTORS).unwrap();
        let file = set.file.iter().find(|f| f.package() == "drupe.agent.v1");
        let file = file.unwrap();
        let find = |name: &str| file.message_type.iter().find(|m| m.name() == name).unwrap();
        macro_rules! shapes {
            ($($message:ident),*) => {
                [$((stringify!($message), $message::SHAPE.unwrap())),*]
            };
        }
        let shapes = shapes![
            ConfigureSandboxResponse,
            SetTimeResponse,
            CreateContainerResponse,
            StartContainerResponse,
            SignalContainerResponse,
            RemoveContainerResponse,
            ListContainersResponse,
            UpdateContainerResponse,
            ExecSyncEvent,
            SessionEvent,
            ResizeResponse,
            Event,
            StatsResponse,
            ShutdownResponse
        ];
        for (name, shape) in &shapes {
            compare(&set, find(name), shape);
        }
        let methods = file.service.iter().flat_map(|service| &service.method);
        for method in methods {
            let output = method.output_type().rsplit('.').next().unwrap();
            assert!(shapes.iter().any(|(name, _)| *name == output), "{output}");
        }
    }

    /// Entries of each kind, a field of no known number, a length that takes more
    /// bytes than it needs, and groups.
    const WORDS: &[&[u8]] = &[
        &[0x0a, 0],
        &[0x0a, 4, 0xea, 1, 0, 0x10],
        &[0x12, 2, 0x2a, 0],
        &[0x12, 0],
        &[0x18, 7],
        &[0x0a, 0x83, 0x80, 0x00, 0xea, 1, 0],
        &[0x0b],
        &[0x0c],
    ];

    proptest! {
        /// What it lets pass takes no more memory than it says.
        #[test]
        fn what_is_let_pass_has_no_more_entries(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut left = MAX_ENTRIES_BYTES;
            let passed = check(&bytes, StatsResponse::SHAPE.unwrap(), &mut left).is_ok();
            if let (true, Ok(stats)) = (passed, StatsResponse::decode(&bytes[..])) {
                let disks = stats.containers.iter().map(|of| of.disks.len()).sum::<usize>();
                let interfaces = stats.guest.map_or(0, |guest| guest.interfaces.len());
                let taken = stats.containers.len() * size_of::<ContainerStats>()
                    + disks * size_of::<DiskStats>()
                    + interfaces * size_of::<InterfaceStats>();
                prop_assert!(taken <= MAX_ENTRIES_BYTES - left);
            }
        }

        /// From keys that mean something, so that messages come of them.
        #[test]
        fn of_likely_bytes_too(
            words in prop::collection::vec(prop::sample::select(WORDS), 0..60),
        ) {
            let bytes = words.concat();
            let mut left = MAX_ENTRIES_BYTES;
            let passed = check(&bytes, StatsResponse::SHAPE.unwrap(), &mut left).is_ok();
            if let (true, Ok(stats)) = (passed, StatsResponse::decode(&bytes[..])) {
                let taken = stats.containers.len() * size_of::<ContainerStats>();
                prop_assert!(taken <= MAX_ENTRIES_BYTES - left);
            }
        }
    }
}
