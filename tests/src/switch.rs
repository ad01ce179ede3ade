//! A switch: tenants' ports on one side, a trunk on the other, each frame tagged or untagged on its way by a program of a few
//! instructions, so that devices keep tags beside their frames and segments are cut as late as they are with any other switch.
//!
//! The programs are put together here, instruction by instruction, and wrapped in the least of an ELF file that aya loads.

use crate::wire::Tag;
use crate::world::World;
use aya::Ebpf;
use aya::programs::{SchedClassifier, TcAttachType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::os::fd::AsFd;

/// A port, and the tags that its frames have on the trunk, from the outside in.
pub type Port<'a> = (&'a str, &'a [Tag]);

/// One instruction: code, destination, source, offset, immediate.
type Instruction = (u8, u8, u8, i16, u32);

const LOAD_WORD: u8 = 0x61;
const MOVE: u8 = 0xbf;
const SET: u8 = 0xb7;
const AND: u8 = 0x57;
const JUMP_UNLESS: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// `bpf_skb_vlan_push`, `bpf_skb_vlan_pop`, `bpf_redirect`.
const PUSH: u32 = 18;
const POP: u32 = 19;
const REDIRECT: u32 = 23;
/// Where `struct __sk_buff` has the tag and its EtherType.
const TAG: i16 = 24;
const ETHERTYPE: i16 = 28;

fn leave(by: u32) -> [Instruction; 4] {
    [(SET, 1, 0, 0, by), (SET, 2, 0, 0, 0), (CALL, 0, 0, 0, REDIRECT), (EXIT, 0, 0, 0, 0)]
}

/// What comes by a port gets its tags, and leaves by the trunk.
fn into(trunk: u32, tags: &[Tag]) -> Vec<Instruction> {
    let mut program = vec![(MOVE, 6, 1, 0, 0)];
    for (kind, vlan) in tags.iter().rev() {
        let kind = u16::from_ne_bytes(kind.to_be_bytes()).into();
        program.extend([
            (MOVE, 1, 6, 0, 0),
            (SET, 2, 0, 0, kind),
            (SET, 3, 0, 0, u32::from(*vlan)),
            (CALL, 0, 0, 0, PUSH),
        ]);
    }
    program.extend(leave(trunk));
    program
}

/// What comes by the trunk leaves by the port that its tags say; other frames end here.
fn out_of(ports: &[(u32, &[Tag])]) -> Vec<Instruction> {
    let mut program = vec![(MOVE, 6, 1, 0, 0)];
    for (port, tags) in ports {
        let mut steps: Vec<Instruction> = Vec::new();
        let mut unless = Vec::new();
        for (kind, vlan) in *tags {
            let kind = u16::from_ne_bytes(kind.to_be_bytes()).into();
            steps.push((LOAD_WORD, 7, 6, ETHERTYPE, 0));
            unless.push(steps.len());
            steps.push((JUMP_UNLESS, 7, 0, 0, kind));
            steps.extend([(LOAD_WORD, 7, 6, TAG, 0), (AND, 7, 0, 0, 0xfff)]);
            unless.push(steps.len());
            steps.push((JUMP_UNLESS, 7, 0, 0, u32::from(*vlan)));
            steps.extend([(MOVE, 1, 6, 0, 0), (CALL, 0, 0, 0, POP)]);
        }
        steps.extend(leave(*port));
        for at in unless {
            steps[at].3 = i16::try_from(steps.len() - at - 1).unwrap();
        }
        program.extend(steps);
    }
    // TC_ACT_SHOT
    program.extend([(SET, 0, 0, 0, 2), (EXIT, 0, 0, 0, 0)]);
    program
}

/// A section of a file: name, type, flags, contents, the two things that it refers to, size of an entry.
type Section<'a> = (&'a str, u32, u64, &'a [u8], u32, u32, u64);

/// The file of a program.
fn elf(program: &[Instruction]) -> Vec<u8> {
    let mut code = Vec::new();
    for (operation, to, from, offset, immediate) in program {
        code.extend([*operation, from << 4 | to]);
        code.extend(offset.to_le_bytes());
        code.extend(immediate.to_le_bytes());
    }
    let names = b"\0classifier\0license\0.symtab\0.strtab\0switch\0";
    let name = |of: &str| {
        let at = names.windows(of.len()).position(|it| it == of.as_bytes()).unwrap();
        u32::try_from(at).unwrap()
    };
    // A global function, of the first section.
    let mut symbols = vec![0; 24];
    symbols.extend(name("switch").to_le_bytes());
    symbols.extend([0x12, 0, 1, 0]);
    symbols.extend(0u64.to_le_bytes());
    symbols.extend((code.len() as u64).to_le_bytes());
    let parts: [Section<'_>; 4] = [
        ("classifier", 1, 6, &code, 0, 0, 0),
        ("license", 1, 3, b"GPL\0", 0, 0, 0),
        (".symtab", 2, 0, &symbols, 4, 1, 24),
        (".strtab", 3, 0, names, 0, 0, 0),
    ];
    let mut file = vec![0; 64];
    let mut headers = vec![0; 64];
    for (of, kind, flags, bytes, link, info, entry) in parts {
        file.resize(file.len().next_multiple_of(8), 0);
        headers.extend(name(of).to_le_bytes());
        headers.extend(kind.to_le_bytes());
        for word in [flags, 0, file.len() as u64, bytes.len() as u64] {
            headers.extend(word.to_le_bytes());
        }
        headers.extend(link.to_le_bytes());
        headers.extend(info.to_le_bytes());
        headers.extend(8u64.to_le_bytes());
        headers.extend(entry.to_le_bytes());
        file.extend(bytes);
    }
    file.resize(file.len().next_multiple_of(8), 0);
    let at = file.len() as u64;
    file.extend(headers);
    file[..16].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // A relocatable file (1) for BPF (247), its section headers, of which the fourth has the names.
    let header = [
        &1u16.to_le_bytes()[..],
        &247u16.to_le_bytes(),
        &1u32.to_le_bytes(),
        &[0; 16],
        &at.to_le_bytes(),
        &[0; 4],
    ]
    .concat();
    let sizes = [64u16, 0, 0, 64, 5, 4].map(u16::to_le_bytes).concat();
    file[16..16 + header.len()].copy_from_slice(&header);
    file[52..64].copy_from_slice(&sizes);
    file
}

/// The programs, which are gone when this is.
#[derive(Debug)]
pub struct Switch {
    _programs: Vec<Ebpf>,
}

impl Switch {
    /// Makes a switch of the devices of a namespace.
    pub fn new(world: &World, namespace: &str, trunk: &str, ports: &[Port<'_>]) -> Self {
        let namespace = File::open(format!("/run/netns/{}", world.namespace(namespace))).unwrap();
        let work = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            let index = |name: &str| rustix::net::netdevice::name_to_index(&socket, name).unwrap();
            let attach = |device: &str, program: &[Instruction]| {
                let mut object = Ebpf::load(&elf(program)).unwrap();
                let program: &mut SchedClassifier = object.program_mut("switch").unwrap().try_into().unwrap();
                program.load().unwrap();
                program.attach(device, TcAttachType::Ingress).unwrap();
                object
            };
            let mut programs: Vec<_> =
                ports.iter().map(|(port, tags)| attach(port, &into(index(trunk), tags))).collect();
            let out: Vec<_> = ports.iter().map(|(port, tags)| (index(port), *tags)).collect();
            programs.push(attach(trunk, &out_of(&out)));
            Self { _programs: programs }
        };
        std::thread::scope(|scope| scope.spawn(work).join().unwrap())
    }
}
