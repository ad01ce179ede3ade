//! The head of a stream to a target that takes the Proxy Protocol's header, whatever its consumer does to have bytes of its own there.

use crate::memory::RESET;
use crate::streams::{CLIENT, Cookies, ENDPOINT, NOW, Says, read, says};
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::RngSeed;

/// Length of the header, in bytes.
const HEADER: usize = 100;

/// What happens next.
#[derive(Clone, Debug)]
enum Step {
    /// The consumer says something, so far from its initial number, of so many bytes.
    Consumer(&'static str, u32, i32, usize),
    /// The target answers the last SYN that it took, once more.
    Greeting,
    /// The target acknowledges what it has.
    Acknowledgement,
    /// The target has no connection any more, and its consumer is not told.
    Amnesia,
}

/// A host that listens. A SYN finds it listening, or with a connection that it keeps or gives up, as hosts do.
#[derive(Debug, Default)]
struct Target {
    /// The consumer's initial sequence number, and its own.
    begun: Option<(u32, u32)>,
    /// How many connections it has had.
    connections: u32,
    /// What it has of the stream's head, by place.
    head: Vec<Option<u8>>,
    /// Whether its SYN-ACK has been on its way: it says nothing else before (one that is lost is not played).
    greeted: bool,
    /// The frame that it got last.
    last: Option<Vec<u8>>,
}

impl Target {
    /// How much of the head it has without a gap, which nothing changes any more.
    fn known(&self) -> usize {
        self.head.iter().take_while(|it| it.is_some()).count()
    }

    fn take(&mut self, frame: &[u8], expected: &[u8], gives_up: bool) {
        let said = read(frame).0;
        self.last = Some(frame.to_vec());
        if said.flags == "S" {
            assert!(said.data.is_empty(), "a SYN with data");
            if self.begun.is_none() || gives_up {
                self.connections += 1;
                *self = Self {
                    begun: Some((said.sequence, self.connections << 20)),
                    head: vec![None; HEADER],
                    last: self.last.take(),
                    connections: self.connections,
                    greeted: false,
                };
            }
            return;
        }
        // What does not acknowledge the SYN-ACK is of no connection (RFC 9293, 3.10.7.4).
        let speaks =
            |&(_, own): &(u32, u32)| said.flags != "R" && said.acknowledgement == own.wrapping_add(1);
        let Some((initial, _)) = self.begun.filter(speaks) else { return };
        let known = self.known();
        for (index, byte) in (0..).zip(said.data) {
            let place = said.sequence.wrapping_add(index).wrapping_sub(initial.wrapping_add(1));
            if let Some(got) = self.head.get_mut(place as usize).filter(|_| place as usize >= known) {
                assert_eq!(byte, expected[place as usize], "at {place} of the head");
                *got = Some(byte);
            }
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let flags = select(vec!["S", "A", "A", "A", "FA", "SA", "R"]);
    let initials = select(vec![1000_u32, 1000, 900, 899, 1100, u32::MAX - 50]);
    let apart = prop_oneof![Just(1), Just(1), Just(0), -210..210_i32];
    let consumer = (flags, initials, apart, prop_oneof![Just(0_usize), 1..300_usize]);
    prop_oneof![
        6 => consumer.prop_map(|(flags, initial, apart, length)| Step::Consumer(flags, initial, apart, length)),
        3 => Just(Step::Greeting),
        1 => Just(Step::Acknowledgement),
        1 => Just(Step::Amnesia),
    ]
}

/// The header that everything of this consumer begins with: what a connection says which plays no tricks.
fn expected() -> Vec<u8> {
    let world = Cookies::proxied(0);
    let (_, syn) = world.forth(NOW, &says("S", 7, 0, 64240));
    world.back(&syn, &says("SA", 9, 8, 65160));
    let (_, out) = world.forth(NOW, &says("A", 8, 10, 400));
    let header = read(&out).0.data;
    assert_eq!((&header[..5], header.len()), (&b"\r\n\r\n\0"[..], HEADER));
    assert_eq!((&header[16..20], &header[20..24]), (&CLIENT.0[..], &ENDPOINT.0[..]));
    header
}

#[test]
fn a_target_that_keeps_an_old_connection_is_not_taken_for_one_that_answers_the_new_one() {
    let (world, there, here) = (Cookies::proxied(1), |by: u32| 1000 + by, |by: u32| 9000 + by);
    let open = |initial: u32| {
        let (_, out) = world.forth(NOW, &says("S", initial, 0, 64240));
        let cookie = read(&out).0.sequence;
        world.forth(NOW, &says("A", initial + 1, cookie.wrapping_add(1), 400)).1
    };
    let asked = open(there(0));
    world.back(&asked, &says("SA", here(0), there(1), 65160));
    world.forth(NOW, &says("R", there(1), 0, 0));
    // A hundred less: what is shifted by the header's length would lie at the old connection's beginning.
    let again = open(there(0) - 100);
    assert_eq!(read(&again).0.flags, "S", "the target is asked anew");
    let (verdict, _) = world.back(&again, &says("SA", here(0), there(1), 65160));
    assert_eq!(verdict, 1, "it is dropped");
}

proptest! {
    // The same everywhere.
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..ProptestConfig::with_cases(3000) })]

    #[test]
    fn a_target_has_the_header_at_the_head_of_the_stream_or_nothing_whatever_its_consumer_says(
        cookies in 0..2_u32, gives_up: [bool; 3], steps in proptest::collection::vec(step(), 1..24),
    ) {
        let (world, expected, mut target) = (Cookies::proxied(cookies), expected(), Target::default());
        let (mut number, mut syns) = (0_u32, 0);
        for step in steps {
            match step {
                Step::Consumer(flags, initial, apart, length) => {
                    let sequence = if flags == "S" { initial } else { initial.wrapping_add_signed(apart) };
                    let said = says(flags, sequence, number.wrapping_add(1), 400).data(&vec![b'x'; length]);
                    let (verdict, out) = world.forth(NOW, &said);
                    if verdict == 4 {
                        syns += usize::from(flags == "S");
                        target.take(&out, &expected, gives_up[syns % 3]);
                    } else if let Some(Says { flags: "SA", sequence, .. }) = (verdict == RESET).then(|| read(&out).0) {
                        // A cookie.
                        number = sequence;
                    }
                }
                Step::Amnesia => target.begun = None,
                Step::Greeting | Step::Acknowledgement => {
                    let (Some((initial, own)), Some(last)) = (target.begun, target.last.clone()) else { continue };
                    let is_greeting = matches!(step, Step::Greeting);
                    if !is_greeting && !target.greeted {
                        continue;
                    }
                    target.greeted |= is_greeting;
                    let got = u32::try_from(target.known()).unwrap();
                    let (flags, sequence, got) = match step {
                        Step::Greeting => ("SA", own, 0),
                        _ => ("A", own.wrapping_add(1), got),
                    };
                    let (verdict, out) =
                        world.back(&last, &says(flags, sequence, initial.wrapping_add(1).wrapping_add(got), 500));
                    // Whatever the target says tells its number.
                    if verdict == 4 && cookies == 0 {
                        let said = read(&out).0;
                        number = said.sequence.wrapping_sub(u32::from(said.flags == "A"));
                    }
                }
            }
        }
    }
}
