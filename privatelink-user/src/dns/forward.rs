//! Questions to other name servers. What they answer is passed on as it is; only the number of the question is the client's.

use super::answer::{DATAGRAM, Question, Transport};
use crate::sockets::{Kind, Sockets, open};
use anyhow::{Context, Result, bail};
use hickory_proto::op::{Edns, Header, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::serialize::binary::{BinDecodable, BinDecoder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, UdpSocket};

/// How long a name server has. Clients ask again after five seconds, most of them.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How many name servers are asked about one question.
const SERVERS: usize = 3;

/// From where questions are asked.
#[derive(Clone, Debug)]
pub enum Place {
    /// Inside a VPC's stack, from this address.
    Stack(Sockets, IpAddr),
    /// From this host, as any program asks.
    Host,
}

impl Place {
    async fn open(&self, kind: Kind, to: SocketAddr) -> Result<socket2::Socket> {
        match self {
            Self::Stack(sockets, address) => sockets.open(kind, SocketAddr::new(*address, 0)).await,
            Self::Host if to.is_ipv4() => open(kind, (Ipv4Addr::UNSPECIFIED, 0).into()),
            Self::Host => open(kind, (Ipv6Addr::UNSPECIFIED, 0).into()),
        }
    }
}

/// The same question with a number that nobody can guess, and without what is between the client and us alone: EDNS options, and a
/// larger size than passes without fragments.
pub fn ask(request: &Message) -> Result<Vec<u8>> {
    let mut number = [0; 2];
    getrandom::fill(&mut number)?;
    let mut message = Message::new(u16::from_ne_bytes(number), MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = request.metadata.recursion_desired;
    message.metadata.checking_disabled = request.metadata.checking_disabled;
    message.metadata.authentic_data = request.metadata.authentic_data;
    message.add_queries(request.queries.iter().cloned());
    if let Some(asked) = &request.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(asked.max_payload().clamp(512, DATAGRAM));
        edns.set_version(0).set_dnssec_ok(asked.flags().dnssec_ok);
        message.set_edns(edns);
    }
    Ok(message.to_vec()?)
}

/// What the first name server says that can say something, with the client's number; the first one that is asked is `first`.
///
/// A name server that fails or refuses is one that cannot. The place in `servers` of the one that could is returned, too.
pub async fn forward(
    question: &Question,
    servers: &[(SocketAddr, Place)],
    first: usize,
    over: Transport,
) -> Result<(Vec<u8>, usize)> {
    let (mut last, mut failure) = (None, None);
    for turn in 0..servers.len().min(SERVERS) {
        let place = (first + turn) % servers.len();
        let Some((server, from)) = servers.get(place) else { break };
        let query = ask(&question.request)?;
        match exchange(from, *server, &query, over).await {
            Ok(reply) if [ResponseCode::ServFail, ResponseCode::Refused].contains(&code(&reply)) => {
                last = Some((reply, place));
            }
            Ok(reply) => {
                last = Some((reply, place));
                break;
            }
            Err(error) => failure = Some(error),
        }
    }
    let Some((mut reply, place)) = last else {
        return Err(failure.unwrap_or_else(|| anyhow::anyhow!("there is no name server")));
    };
    if reply.len() > question.limit {
        return Ok((question.truncated(), place));
    }
    reply[..2].copy_from_slice(&question.request.metadata.id.to_be_bytes());
    Ok((reply, place))
}

/// The code of an answer, without the part that EDNS may add.
fn code(reply: &[u8]) -> ResponseCode {
    ResponseCode::from(0, reply.get(3).copied().unwrap_or(0) & 15)
}

/// Asks one name server, and waits for its answer for as long as it has.
pub async fn exchange(from: &Place, server: SocketAddr, query: &[u8], over: Transport) -> Result<Vec<u8>> {
    let answer = async {
        match over {
            Transport::Udp => by_datagrams(from, server, query).await,
            Transport::Tcp => by_connection(from, server, query).await,
        }
    };
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(result) => result,
        Err(_) => bail!("{server} does not answer"),
    }
}

async fn by_datagrams(from: &Place, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    // Connected, so that only the server's own datagrams come; a port of its own, so that they are hard to guess (RFC 5452).
    let socket = UdpSocket::from_std(from.open(Kind::Datagrams, server).await?.into())?;
    socket.connect(server).await.with_context(|| format!("cannot ask {server}"))?;
    socket.send(query).await.with_context(|| format!("cannot ask {server}"))?;
    let mut bytes = vec![0; usize::from(DATAGRAM)];
    loop {
        let length = socket.recv(&mut bytes).await.with_context(|| format!("no answer of {server}"))?;
        if is_answer(query, &bytes[..length]) {
            bytes.truncate(length);
            return Ok(bytes);
        }
    }
}

async fn by_connection(from: &Place, server: SocketAddr, query: &[u8]) -> Result<Vec<u8>> {
    let socket = TcpSocket::from_std_stream(from.open(Kind::Connection, server).await?.into());
    let mut stream = socket.connect(server).await.with_context(|| format!("cannot connect to {server}"))?;
    write(&mut stream, query).await?;
    let reply = read(&mut stream).await?.with_context(|| format!("{server} closes the connection"))?;
    anyhow::ensure!(is_answer(query, &reply), "{server} answers something else");
    Ok(reply)
}

/// Reads a message with its length (RFC 1035, 4.2.2); none where the connection has ended.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Vec<u8>>> {
    let mut length = [0; 2];
    match stream.read_exact(&mut length).await {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message).await?;
    Ok(Some(message))
}

/// Writes a message with its length, in one piece (RFC 7766, section 8).
pub async fn write(stream: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> Result<()> {
    let length = u16::try_from(message.len())?.to_be_bytes();
    Ok(stream.write_all(&[&length, message].concat()).await?)
}

/// Whether this answers the question: its number, and the question itself.
fn is_answer(query: &[u8], reply: &[u8]) -> bool {
    let question = |bytes: &[u8]| -> Option<(u16, MessageType, Query)> {
        let mut decoder = BinDecoder::new(bytes);
        let header = Header::read(&mut decoder).ok()?;
        let query = Query::read(&mut decoder).ok()?;
        (header.counts.queries == 1).then_some((header.metadata.id, header.metadata.message_type, query))
    };
    let (Some((id, _, asked)), Some((other, kind, answered))) = (question(query), question(reply)) else {
        return false;
    };
    id == other && kind == MessageType::Response && asked == answered
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::*;
    use hickory_proto::rr::{Name, RecordType};

    #[test]
    fn an_answer_has_the_number_and_the_question_of_what_was_asked() {
        let mut request = Message::new(7, MessageType::Query, OpCode::Query);
        request.add_query(Query::query(Name::from_ascii("a.example.").unwrap(), RecordType::A));
        let query = ask(&request).unwrap();
        let mut reply = Message::from_vec(&query).unwrap();
        reply.metadata.message_type = MessageType::Response;
        assert!(is_answer(&query, &reply.to_vec().unwrap()));
        assert!(!is_answer(&query, &query), "the question itself");
        let mut other = reply.clone();
        other.metadata.id ^= 1;
        assert!(!is_answer(&query, &other.to_vec().unwrap()));
        let mut other = reply.clone();
        other.queries[0].set_query_type(RecordType::AAAA);
        assert!(!is_answer(&query, &other.to_vec().unwrap()));
        assert!(!is_answer(&query, &reply.to_vec().unwrap()[..12]));
    }

    #[test]
    fn what_is_asked_says_no_more_of_the_client_than_it_has_to() {
        let mut request = Message::new(7, MessageType::Query, OpCode::Query);
        request.add_query(Query::query(Name::from_ascii("a.example.").unwrap(), RecordType::A));
        assert!(Message::from_vec(&ask(&request).unwrap()).unwrap().edns.is_none(), "the client has no EDNS");
        let mut edns = Edns::new();
        edns.set_max_payload(4096);
        edns.options_mut().insert(hickory_proto::rr::rdata::opt::EdnsOption::Unknown(10, vec![1; 8]));
        request.set_edns(edns);
        let asked = Message::from_vec(&ask(&request).unwrap()).unwrap().edns.unwrap();
        assert_eq!((asked.max_payload(), asked.options().as_ref().len()), (DATAGRAM, 0));
    }
}
