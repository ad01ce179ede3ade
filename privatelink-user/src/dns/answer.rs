//! What becomes of a question: bytes in, bytes out, nothing else.

use super::view::{Found, Records, View, key, name_of, parent};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// Seconds that answers may be kept (AWS: load balancers' and endpoints' names).
const TTL: u32 = 60;
/// The largest datagram that fits everywhere (RFC 9715, 3.1), also through paths that carry no fragments.
pub const DATAGRAM: u16 = 1232;
/// The largest answer to a question without EDNS (RFC 1035, 4.2.1).
const PLAIN: usize = 512;
/// Bytes of a header.
const HEADER: usize = 12;

/// What a message came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Datagrams.
    Udp,
    /// A connection.
    Tcp,
}

/// What is to be done with a message.
#[derive(Clone, Debug)]
pub enum Judged {
    /// Send this back, which says that.
    Answer(Vec<u8>, ResponseCode),
    /// Ask others.
    Forward(Box<Question>),
    /// It is not a question. Nothing is sent back.
    Malformed,
}

/// A question for others.
#[derive(Clone, Debug)]
pub struct Question {
    /// As it came.
    pub request: Message,
    /// The rule that it goes by.
    pub rule: usize,
    /// The largest answer that may be sent back.
    pub limit: usize,
}

impl Question {
    /// What is sent back where nobody has answered.
    pub fn failure(&self) -> Vec<u8> {
        encode(&reply(&self.request, ResponseCode::ServFail), self.limit)
    }

    /// What is sent back where the answer is larger than may be: that it is, so that the client asks again by TCP.
    pub fn truncated(&self) -> Vec<u8> {
        let reply = reply(&self.request, ResponseCode::NoError).truncate();
        encode(&reply, self.limit)
    }
}

/// The rules of a resolver, by the keys of their domains.
pub type Rules = BTreeMap<Vec<u8>, usize>;

/// Judges a message.
pub fn judge(bytes: &[u8], over: Transport, view: &View, rules: &Rules) -> Judged {
    let Some(header) = bytes.first_chunk::<HEADER>() else { return Judged::Malformed };
    // An answer is not answered, nor is what cannot be: two that did would never stop.
    if header[2] & 0x80 != 0 {
        return Judged::Malformed;
    }
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    // The counts are looked at before anything is made room for.
    let is_question = count(4) == 1 && count(6) == 0 && count(8) == 0 && count(10) <= 2;
    let opcode = OpCode::from_u8(header[2] >> 3 & 15);
    if opcode != OpCode::Query {
        return bare(header, ResponseCode::NotImp);
    }
    let request = Message::from_vec(bytes).ok().filter(|_| is_question);
    let Some((request, question)) =
        request.and_then(|it| it.queries.first().cloned().map(|query| (it, query)))
    else {
        return bare(header, ResponseCode::FormErr);
    };
    let limit = limit(&request, over);
    let say = |code| Judged::Answer(encode(&reply(&request, code), limit), code);
    if request.edns.as_ref().is_some_and(|edns| edns.version() != 0) {
        return say(ResponseCode::BADVERS);
    }
    let kind = question.query_type();
    if question.query_class() != DNSClass::IN || [RecordType::AXFR, RecordType::IXFR].contains(&kind) {
        return say(ResponseCode::Refused);
    }
    let key = key(question.name());
    let found = view.find(&key);
    let rule = rule(rules, &key);
    match (found, rule) {
        // The more specific one counts, and of two for the same domain the rule (AWS: resolver rules).
        (Some(found), rule) if rule.is_none_or(|(domain, _)| domain.len() < found.apex.len()) => {
            let reply = answer(&request, question.name(), kind, &found);
            let code = reply.metadata.response_code;
            Judged::Answer(encode(&reply, limit), code)
        }
        (_, Some((_, rule))) => Judged::Forward(Box::new(Question { request, rule, limit })),
        _ => say(ResponseCode::Refused),
    }
}

/// The rule for a name: that of the longest domain.
fn rule<'a>(rules: &Rules, key: &'a [u8]) -> Option<(&'a [u8], usize)> {
    let mut at = key;
    loop {
        if let Some(rule) = rules.get(at) {
            return Some((at, *rule));
        }
        at = parent(at)?;
    }
}

/// How large an answer may be.
fn limit(request: &Message, over: Transport) -> usize {
    match (over, &request.edns) {
        (Transport::Tcp, _) => u16::MAX.into(),
        (Transport::Udp, None) => PLAIN,
        (Transport::Udp, Some(edns)) => usize::from(edns.max_payload().min(DATAGRAM)).max(PLAIN),
    }
}

/// The beginning of every answer.
fn reply(request: &Message, code: ResponseCode) -> Message {
    let mut reply = Message::new(request.metadata.id, MessageType::Response, request.metadata.op_code);
    reply.metadata.recursion_desired = request.metadata.recursion_desired;
    reply.metadata.checking_disabled = request.metadata.checking_disabled;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_queries(request.queries.iter().cloned());
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(DATAGRAM).set_version(0).set_dnssec_ok(asked.flags().dnssec_ok);
        reply.set_edns(edns);
    }
    reply
}

/// The answer to a question about a name of ours.
fn answer(request: &Message, name: &Name, kind: RecordType, found: &Found<'_>) -> Message {
    let apex = name_of(found.apex);
    let code = if found.records.is_some() { ResponseCode::NoError } else { ResponseCode::NXDomain };
    let mut reply = reply(request, code);
    let of = |data: RData| Record::from_rdata(name.clone(), TTL, data);
    let mut records: Vec<Record> =
        found.records.map(|it| data(it, kind)).unwrap_or_default().into_iter().map(of).collect();
    if kind == RecordType::SOA && name.to_lowercase() == apex.to_lowercase() {
        records.push(authority(&apex));
    }
    if records.is_empty() {
        // With it, the answer may be kept (RFC 2308, section 5).
        reply.add_authority(authority(&apex));
    } else {
        // Each zone has its turn to be the first.
        let first = usize::from(request.metadata.id) % records.len();
        records.rotate_left(first);
        reply.add_answers(records);
    }
    reply
}

/// The records of a type.
fn data(records: &Records, kind: RecordType) -> Vec<RData> {
    let wants = |it: RecordType| kind == it || kind == RecordType::ANY;
    let mut data: Vec<RData> = Vec::new();
    for address in &records.addresses {
        match address {
            IpAddr::V4(address) if wants(RecordType::A) => data.push(RData::A(A(*address))),
            IpAddr::V6(address) if wants(RecordType::AAAA) => data.push(RData::AAAA(AAAA(*address))),
            _ => {}
        }
    }
    if let Some(pointer) = records.pointer.as_ref().filter(|_| wants(RecordType::PTR)) {
        data.push(RData::PTR(PTR(pointer.clone())));
    }
    data
}

/// What says whose a name is, and for how long it may be believed that there is none.
fn authority(apex: &Name) -> Record {
    let within = |label: &str| {
        Name::from_ascii(label).and_then(|it| it.append_domain(apex)).unwrap_or_else(|_| apex.clone())
    };
    let soa = SOA::new(within("resolver"), within("hostmaster"), 1, 7200, 900, 1_209_600, TTL);
    Record::from_rdata(apex.clone(), TTL, RData::SOA(soa))
}

/// A message of at most `limit` bytes; one that is larger says that it was.
fn encode(message: &Message, limit: usize) -> Vec<u8> {
    let whole = message.to_vec().unwrap_or_default();
    if !whole.is_empty() && whole.len() <= limit {
        return whole;
    }
    message.truncate().to_vec().unwrap_or_default()
}

/// An answer to what could not be read: a header alone, so that it is not larger than what it answers.
fn bare(header: &[u8; HEADER], code: ResponseCode) -> Judged {
    // QR, the operation as it was, RD as it was; RA and the code.
    let [id, other, flags, ..] = *header;
    let bytes = [id, other, 0x80 | flags & 0x79, 0x80 | code.low(), 0, 0, 0, 0, 0, 0, 0, 0];
    Judged::Answer(bytes.to_vec(), code)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::super::entries::Kind;
    use super::super::view::key_of;
    use super::super::{Entry, Standing};
    use super::*;
    use hickory_proto::op::Query;

    fn view(zones: u8) -> View {
        let addresses = (1..=zones).map(|last| IpAddr::from([10, 0, 9, last])).collect();
        let entry = Entry {
            vpc: "v".into(),
            name: "api.example".into(),
            kind: Kind::Private,
            of: "e".into(),
            addresses,
            pointer: None,
            standing: Standing::Answered,
        };
        View::new([&entry].into_iter(), &[])
    }

    fn question(name: &str, kind: RecordType, edns: Option<u16>) -> Message {
        let mut message = Message::new(7, MessageType::Query, OpCode::Query);
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        if let Some(size) = edns {
            let mut edns = Edns::new();
            edns.set_max_payload(size).set_dnssec_ok(true);
            message.set_edns(edns);
        }
        message
    }

    fn answered(bytes: &[u8], over: Transport, view: &View) -> Message {
        match judge(bytes, over, view, &Rules::new()) {
            Judged::Answer(bytes, _) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_name_has_the_addresses_of_the_family_that_was_asked_for_and_an_authority_where_it_has_none() {
        let view = view(2);
        let ask =
            |name: &str, kind| answered(&question(name, kind, None).to_vec().unwrap(), Transport::Udp, &view);
        let reply = ask("API.example.", RecordType::A);
        assert_eq!((reply.answers.len(), reply.answers[0].ttl), (2, 60));
        assert!(reply.answers[0].name.eq_case(&Name::from_ascii("API.example.").unwrap()), "as it was asked");
        let reply = ask("api.example.", RecordType::AAAA);
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
        assert_eq!((reply.answers.len(), reply.authorities[0].record_type()), (0, RecordType::SOA));
        let reply = ask("www.api.example.", RecordType::A);
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain);
        assert_eq!(reply.authorities[0].name.to_ascii(), "api.example.");
        assert_eq!(ask("other.example.", RecordType::A).metadata.response_code, ResponseCode::Refused);
    }

    #[test]
    fn what_does_not_fit_says_so_and_is_whole_over_tcp() {
        let view = view(80);
        let ask = |edns, over| {
            let bytes = question("api.example.", RecordType::A, edns).to_vec().unwrap();
            let Judged::Answer(bytes, _) = judge(&bytes, over, &view, &Rules::new()) else {
                panic!("no answer")
            };
            (bytes.len(), Message::from_vec(&bytes).unwrap())
        };
        for (edns, most) in [(None, 512), (Some(100), 512), (Some(1000), 1000), (Some(65535), 1232)] {
            let (length, reply) = ask(edns, Transport::Udp);
            assert!(reply.metadata.truncation && length <= most, "{edns:?}: {length}");
            assert_eq!(reply.edns.is_some(), edns.is_some());
        }
        let (_, reply) = ask(None, Transport::Tcp);
        assert!(!reply.metadata.truncation && reply.answers.len() == 80);
        let (_, reply) = ask(Some(4096), Transport::Tcp);
        assert!(reply.edns.unwrap().flags().dnssec_ok, "as it was asked (RFC 3225, 3)");
    }

    #[test]
    fn the_longest_domain_decides_who_is_asked_and_a_rule_goes_before_a_name_of_the_same_length() {
        let view = view(1);
        let rules =
            |domains: &[&str]| domains.iter().enumerate().map(|(at, it)| (key_of(it), at)).collect::<Rules>();
        let by = |name: &str, domains: &[&str]| {
            let bytes = question(name, RecordType::A, None).to_vec().unwrap();
            match judge(&bytes, Transport::Udp, &view, &rules(domains)) {
                Judged::Forward(question) => Some(question.rule),
                Judged::Answer(..) => None,
                Judged::Malformed => panic!("{name}"),
            }
        };
        let domains = ["", "example", "corp.example"];
        assert_eq!(by("x.corp.example.", &domains), Some(2));
        assert_eq!(by("corp.example.", &domains), Some(2));
        assert_eq!(by("xcorp.example.", &domains), Some(1));
        assert_eq!(by("elsewhere.", &domains), Some(0));
        assert_eq!(by("api.example.", &domains), None, "the name is longer");
        assert_eq!(by("api.example.", &["api.example"]), Some(0));
    }

    #[test]
    fn what_is_no_question_is_refused_in_a_few_bytes_and_answers_are_never_answered() {
        let view = view(1);
        let good = question("api.example.", RecordType::A, None).to_vec().unwrap();
        let code = |bytes: &[u8]| {
            let reply = judge(bytes, Transport::Udp, &view, &Rules::new());
            let Judged::Answer(bytes, code) = reply else { return None };
            assert!(bytes.len() <= good.len());
            Some(code)
        };
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        assert_eq!(code(&good[..11]), None);
        assert_eq!(code(&with(2, 0x80)), None, "an answer");
        assert_eq!(code(&with(2, 4 << 3)), Some(ResponseCode::NotImp), "NOTIFY");
        assert_eq!(code(&with(5, 2)), Some(ResponseCode::FormErr), "two questions, of which one is missing");
        assert_eq!(code(&with(6, 0xff)), Some(ResponseCode::FormErr), "answers in a question");
        assert_eq!(code(&good[..good.len() - 1]), Some(ResponseCode::FormErr));
        let mut chaos = good.clone();
        let last = chaos.len() - 1;
        chaos[last] = 3;
        assert_eq!(code(&chaos), Some(ResponseCode::Refused));
        let mut edns = question("api.example.", RecordType::A, Some(1232));
        edns.edns.as_mut().unwrap().set_version(1);
        let reply = answered(&edns.to_vec().unwrap(), Transport::Udp, &view);
        assert_eq!(u16::from(reply.metadata.response_code), 16, "BADVERS");
    }

    #[test]
    fn no_bytes_whatsoever_are_too_much() {
        let (view, good) = (view(1), question("api.example.", RecordType::A, Some(1232)).to_vec().unwrap());
        for length in 0..good.len() {
            judge(&good[..length], Transport::Udp, &view, &Rules::new());
        }
        let mut state = 1u64;
        for _ in 0..20_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let mut bytes = good.clone();
            let at = usize::try_from(state >> 32).unwrap() % bytes.len();
            bytes[at] = u8::try_from(state & 0xff).unwrap();
            judge(&bytes, Transport::Tcp, &view, &Rules::new());
        }
    }
}
