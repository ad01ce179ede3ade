//! Bounded access to the bytes of one frame: one of the two seams between the path and its host.

use crate::checksum::{Delta, finish, fold, sum_all, update, update_udp};
use crate::wire::{TRANSPORT, TRANSPORT6};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// By how many bytes an IPv6 header is longer than an IPv4 header.
pub const DIFFERENCE: usize = TRANSPORT6 - TRANSPORT;

/// What a rewrite changes of a transport checksum, in two parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// What it changes of the pseudo header: the addresses.
    pub pseudo: Delta,
    /// What it changes of the transport header itself: the ports.
    pub header: Delta,
}

/// A frame that starts with its Ethernet header.
///
/// A transport checksum may be one that is still to be completed: a sender that leaves this to its device has put only the sum of the
/// pseudo header there (Linux's `CHECKSUM_PARTIAL`). Frames that may be such ones say by their own methods what becomes of theirs.
pub trait Frame {
    /// Bytes from the Ethernet header to the end.
    fn len(&self) -> usize;

    /// Whether it has at least so many bytes; a host may know that without knowing how many there are.
    fn holds(&self, len: usize) -> bool {
        len <= self.len()
    }

    /// A copy of the header at `offset`, or nothing where the frame is too short for it.
    fn read<T: FromBytes + Copy>(&self, offset: usize) -> Option<T>;

    /// Puts `value` at `offset`; nothing is written where the frame is too short for it.
    fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()>;

    /// The same where no checksum beside it makes up for what changes (an IPv6 header has none), so that a device's sum of the whole
    /// packet, where a host keeps one, has to follow.
    #[inline(always)]
    fn write_summed<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        self.write(offset, value)
    }

    /// The length of the IPv4 packet in it, whose header says `stored`: zero stands for a length beyond 65535 bytes in a frame that a
    /// device has yet to cut into segments (Linux's BIG TCP), and for what it says in any other.
    #[inline(always)]
    fn ip_length(&self, stored: u16) -> usize {
        stored.into()
    }

    /// Applies a rewrite to the transport checksum at `offset`, which was read as `stored` (RFC 1624).
    #[inline(always)]
    fn change_checksum(
        &mut self,
        offset: usize,
        stored: [u8; 2],
        is_tcp: bool,
        change: Change,
    ) -> Option<()> {
        let delta = u32::from(change.pseudo) + u32::from(change.header);
        self.write(offset, &if is_tcp { update(stored, delta) } else { update_udp(stored, delta) })
    }

    /// Puts a transport checksum at `offset`, where zero is, of words that sum to `pseudo` in the pseudo header and to `rest` in the
    /// segment itself.
    #[inline(always)]
    fn set_checksum(&mut self, offset: usize, pseudo: u32, rest: u32) -> Option<()> {
        self.write(offset, &finish(pseudo + rest))
    }

    /// Sum of the words of the `len` bytes at `offset`, an odd one padded with zero. Nothing where the frame is too short for them, or
    /// where a device is to make several packets of them, which would each need a sum of its own.
    fn sum(&self, offset: usize, len: u16) -> Option<u16>;

    /// Cuts the frame off behind its first `len` bytes.
    fn truncate(&mut self, len: usize) -> Option<()>;

    /// Lengthens the frame to `len` bytes; the contents of what is added are not defined.
    fn extend(&mut self, len: usize) -> Option<()>;

    /// Makes room for an IPv6 header where an IPv4 header is (`to_ipv6`), or takes it away: what follows the network header stays as it
    /// is, 20 bytes further behind the frame's beginning or nearer to it. The contents of both headers before it are not defined
    /// afterwards.
    fn change_family(&mut self, to_ipv6: bool) -> Option<()>;

    /// Moves what follows the network header so many bytes further behind the frame's beginning, or nearer to it. The contents of what is
    /// in front of it are not defined afterwards.
    fn move_payload(&mut self, by: i32) -> Option<()>;

    /// The largest IP packet on the wire of a frame that holds one of `length` bytes: a device may be to cut it into segments.
    fn largest(&self, length: u16) -> u32 {
        length.into()
    }

    /// Makes room for `len` bytes in front of the first one. What is in them is not defined.
    fn prepend(&mut self, len: usize) -> Option<()>;

    /// Makes room for `len` bytes at `at`, behind a transport header at `AT`, of which the headers stay where they are. What is in it is not
    /// defined.
    #[inline(always)]
    fn insert<const AT: usize>(&mut self, at: usize, len: usize) -> Option<()> {
        self.prepend(len)?;
        // In words: the headers are two bytes, of an address, and a number of these. At most fifteen are the transport's.
        let start = self.read::<[u8; 2]>(len)?;
        self.write(0, &start)?;
        for index in 0..(AT - 2 + 60) / 4 {
            let to = 2 + index * 4;
            if to < at {
                let word = self.read::<[u8; 4]>(to + len)?;
                self.write(to, &word)?;
            }
        }
        Some(())
    }

    /// Makes it as long as this, whatever is in it then.
    fn resize(&mut self, len: usize) -> Option<()> {
        match len.checked_sub(self.len()) {
            Some(more) if more > 0 => self.prepend(more),
            _ => self.truncate(len),
        }
    }

    /// The same number. A host whose program is verified returns one of which the verifier knows nothing.
    fn blur(&self, number: u64) -> u64 {
        number
    }

    /// Whether there is nothing in it.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A frame in ordinary memory.
#[derive(Debug)]
pub struct SliceFrame<'a> {
    bytes: &'a mut [u8],
    start: usize,
    end: usize,
}

impl<'a> SliceFrame<'a> {
    /// The whole of `bytes` as one frame, which cannot grow.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let end = bytes.len();
        Self { bytes, start: 0, end }
    }

    /// The part of `bytes` from `start` to `end` as a frame, which may grow at both ends; nothing where that is no part of it.
    pub fn within(bytes: &'a mut [u8], start: usize, end: usize) -> Option<Self> {
        bytes.get(start..end)?;
        Some(Self { bytes, start, end })
    }

    /// The frame as it is now.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(self.start..self.end).unwrap_or_default()
    }
}

impl Frame for SliceFrame<'_> {
    fn len(&self) -> usize {
        self.end - self.start
    }

    fn read<T: FromBytes + Copy>(&self, offset: usize) -> Option<T> {
        T::read_from_prefix(self.as_bytes().get(offset..)?).ok().map(|(value, _)| value)
    }

    fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        let frame = self.bytes.get_mut(self.start..self.end)?;
        let end = offset.checked_add(value.as_bytes().len())?;
        frame.get_mut(offset..end)?.copy_from_slice(value.as_bytes());
        Some(())
    }

    fn sum(&self, offset: usize, len: u16) -> Option<u16> {
        let end = offset.checked_add(len.into())?;
        Some(fold(sum_all(self.as_bytes().get(offset..end)?)))
    }

    fn truncate(&mut self, len: usize) -> Option<()> {
        if len > self.len() {
            return None;
        }
        self.end = self.start + len;
        Some(())
    }

    fn extend(&mut self, len: usize) -> Option<()> {
        let end = self.start.checked_add(len).filter(|end| *end >= self.end && *end <= self.bytes.len())?;
        self.end = end;
        Some(())
    }

    fn change_family(&mut self, to_ipv6: bool) -> Option<()> {
        let start =
            if to_ipv6 { self.start.checked_sub(DIFFERENCE)? } else { self.start.checked_add(DIFFERENCE)? };
        if start > self.end {
            return None;
        }
        self.start = start;
        Some(())
    }

    fn move_payload(&mut self, by: i32) -> Option<()> {
        let start = self.start.checked_add_signed(isize::try_from(by).ok()?.checked_neg()?)?;
        if start > self.end {
            return None;
        }
        self.start = start;
        Some(())
    }

    fn prepend(&mut self, len: usize) -> Option<()> {
        self.start = self.start.checked_sub(len)?;
        Some(())
    }
}
