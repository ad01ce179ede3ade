//! Bounded access to the bytes of one frame: one of the two seams between the path and its host.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// A frame that starts with its Ethernet header.
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

    /// Cuts the frame off behind its first `len` bytes.
    fn truncate(&mut self, len: usize) -> Option<()>;

    /// Makes it longer by so many bytes, of any content, before its first.
    fn grow(&mut self, by: usize) -> Option<()>;

    /// Makes it as long as this, whatever is in it then.
    fn resize(&mut self, len: usize) -> Option<()> {
        match len.checked_sub(self.len()) {
            Some(more) if more > 0 => self.grow(more),
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
    len: usize,
}

impl<'a> SliceFrame<'a> {
    /// The whole of `bytes` as one frame.
    pub fn new(bytes: &'a mut [u8]) -> Self {
        Self::with_room(bytes, 0)
    }

    /// `bytes` but for the first `room` as one frame, which may grow by these.
    pub fn with_room(bytes: &'a mut [u8], room: usize) -> Self {
        let start = room.min(bytes.len());
        let len = bytes.len() - start;
        Self { bytes, start, len }
    }

    /// The frame as it is now.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(self.start..self.start + self.len).unwrap_or_default()
    }
}

impl Frame for SliceFrame<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn read<T: FromBytes + Copy>(&self, offset: usize) -> Option<T> {
        T::read_from_prefix(self.as_bytes().get(offset..)?).ok().map(|(value, _)| value)
    }

    fn write<T: IntoBytes + Immutable>(&mut self, offset: usize, value: &T) -> Option<()> {
        let end = offset.checked_add(value.as_bytes().len()).filter(|end| *end <= self.len)?;
        self.bytes.get_mut(self.start + offset..self.start + end)?.copy_from_slice(value.as_bytes());
        Some(())
    }

    fn truncate(&mut self, len: usize) -> Option<()> {
        if len > self.len {
            return None;
        }
        self.len = len;
        Some(())
    }

    fn grow(&mut self, by: usize) -> Option<()> {
        self.start = self.start.checked_sub(by)?;
        self.len += by;
        Some(())
    }
}
