//! Writes pcapng (draft-ietf-opsawg-pcapng): a section, an interface block for each interface when it is first named, and a packet
//! block for each packet, with its comment and direction. In the machine's byte order, which the format leaves to the writer.

use std::io::{Result, Write};

/// `LINKTYPE_ETHERNET`
const ETHERNET: u16 = 1;

/// Which way a packet went, seen from this host (`epb_flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Way {
    /// It came by the interface.
    Inbound = 1,
    /// It left by it.
    Outbound = 2,
}

/// A packet of the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Record<'a> {
    /// Number of the interface, in the order of [`Writer::interface`].
    pub(super) interface: u32,
    /// Nanoseconds since 1970.
    pub(super) time: u64,
    /// Its bytes, perhaps not all.
    pub(super) bytes: &'a [u8],
    /// How many bytes it had.
    pub(super) length: u32,
    /// Which way it went.
    pub(super) way: Way,
    /// Whether its transport checksum is left to a device.
    pub(super) unfinished: bool,
    /// Whether it is yet to be cut into segments by a device, or was put together of them.
    pub(super) segmented: bool,
    /// What became of it.
    pub(super) comment: &'a str,
}

/// A file that is being written.
#[derive(Debug)]
pub(super) struct Writer<W> {
    to: W,
    interfaces: u32,
    snaplen: u32,
}

impl<W: Write> Writer<W> {
    /// Begins a file whose packets have at most `snaplen` bytes.
    pub(super) fn new(to: W, snaplen: u32) -> Result<Self> {
        let mut this = Self { to, interfaces: 0, snaplen };
        let mut body = Vec::new();
        body.extend(0x1a2b_3c4d_u32.to_ne_bytes());
        body.extend([1_u16, 0].iter().flat_map(|it| it.to_ne_bytes()));
        // The section's length is not known yet.
        body.extend((-1_i64).to_ne_bytes());
        option(&mut body, 4, concat!("privatelink ", env!("CARGO_PKG_VERSION")).as_bytes());
        this.block(0x0a0d_0d0a, body)?;
        Ok(this)
    }

    /// Names an interface; returns its number.
    pub(super) fn interface(&mut self, name: &str, description: &str) -> Result<u32> {
        let mut body = Vec::new();
        body.extend([ETHERNET, 0].iter().flat_map(|it| it.to_ne_bytes()));
        body.extend(self.snaplen.to_ne_bytes());
        option(&mut body, 2, name.as_bytes());
        option(&mut body, 3, description.as_bytes());
        // Timestamps are in units of 10^-9 s.
        option(&mut body, 9, &[9]);
        self.block(1, body)?;
        self.interfaces += 1;
        Ok(self.interfaces - 1)
    }

    /// Writes a packet.
    pub(super) fn packet(&mut self, record: &Record<'_>) -> Result<()> {
        let mut body = Vec::new();
        #[allow(clippy::cast_possible_truncation, reason = "the halves of a word, and a captured length")]
        let words = {
            let captured = record.bytes.len() as u32;
            [record.interface, (record.time >> 32) as u32, record.time as u32, captured, record.length]
        };
        body.extend(words.iter().flat_map(|it| it.to_ne_bytes()));
        body.extend(record.bytes);
        pad(&mut body);
        option(&mut body, 1, record.comment.as_bytes());
        option(&mut body, 2, &flags(record).to_ne_bytes());
        self.block(6, body)
    }

    /// Gives what is written to whoever reads.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.to.flush()
    }

    fn block(&mut self, kind: u32, mut body: Vec<u8>) -> Result<()> {
        // opt_endofopt
        body.extend([0; 4]);
        let length = u32::try_from(body.len() + 12).map_err(std::io::Error::other)?.to_ne_bytes();
        self.to.write_all(&[&kind.to_ne_bytes(), &length, body.as_slice(), &length].concat())
    }
}

/// `epb_flags`. Readers that do not know the bits about checksums and segments pass them over.
fn flags(record: &Record<'_>) -> u32 {
    record.way as u32 | u32::from(record.unfinished) << 9 | u32::from(record.segmented) << 11
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(usize::from(u16::MAX))];
    body.extend(code.to_ne_bytes());
    #[allow(clippy::cast_possible_truncation, reason = "cut above")]
    body.extend((value.len() as u16).to_ne_bytes());
    body.extend(value);
    pad(body);
}

/// Options and packets are filled up to 32 bits. What precedes them in a block always is.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}
