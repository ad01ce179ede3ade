//! Reads pcapng files, by the format's description alone (draft-ietf-opsawg-pcapng).

/// A packet of a file.
#[derive(Clone, Debug)]
pub struct Record {
    pub interface: String,
    pub outbound: bool,
    /// Its checksum is left to a device.
    pub unfinished: bool,
    /// It stands for more than one packet of the wire.
    pub segmented: bool,
    pub comment: String,
    pub bytes: Vec<u8>,
    pub length: usize,
}

fn word(bytes: &[u8], at: usize) -> usize {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn option(mut options: &[u8], wanted: u16) -> Option<&[u8]> {
    while options.len() >= 4 {
        let (code, length) = (
            u16::from_le_bytes([options[0], options[1]]),
            usize::from(u16::from_le_bytes([options[2], options[3]])),
        );
        if code == wanted {
            return Some(&options[4..4 + length]);
        }
        options = &options[4 + length.next_multiple_of(4)..];
    }
    None
}

fn text(options: &[u8], wanted: u16) -> String {
    String::from_utf8(option(options, wanted).unwrap_or_default().to_vec()).unwrap()
}

/// The packets of a file, which must be whole.
pub fn read(mut bytes: &[u8]) -> Vec<Record> {
    let (mut interfaces, mut records) = (Vec::new(), Vec::new());
    assert_eq!(&bytes[..4], &[0x0a, 0x0d, 0x0d, 0x0a], "it begins with a section");
    while !bytes.is_empty() {
        let length = word(bytes, 4);
        let (block, rest) = bytes.split_at(length);
        assert_eq!(word(block, length - 4), length, "a block says its length twice");
        let body = &block[8..length - 4];
        match word(block, 0) {
            1 => {
                assert_eq!((body[0], option(&body[8..], 9)), (1, Some(&[9][..])), "Ethernet, nanoseconds");
                interfaces.push(text(&body[8..], 2));
            }
            6 => {
                let captured = word(body, 12);
                let options = &body[20 + captured.next_multiple_of(4)..];
                let flags = word(option(options, 2).unwrap(), 0);
                assert!(flags & !0xa03 == 0 && matches!(flags & 3, 1 | 2), "{flags:#x}");
                records.push(Record {
                    interface: interfaces[word(body, 0)].clone(),
                    outbound: flags & 3 == 2,
                    unfinished: flags & 1 << 9 != 0,
                    segmented: flags & 1 << 11 != 0,
                    comment: text(options, 1),
                    bytes: body[20..20 + captured].to_vec(),
                    length: word(body, 16),
                });
            }
            _ => {}
        }
        bytes = rest;
    }
    records
}
