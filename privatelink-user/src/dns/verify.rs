//! Whether a provider owns the domain of the name that it brings: a TXT record says so (AWS: manage-dns-names).

use super::answer::Transport;
use super::forward::{Place, ask, exchange};
use anyhow::{Result, bail};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RData, RecordType};
use std::net::SocketAddr;

/// Whether one of two names has a TXT record of this value: `_TOKEN.DOMAIN`, or the domain itself. An error: nobody could say.
pub async fn verify(servers: &[SocketAddr], record: &str, domain: &str, value: &str) -> Result<bool> {
    Ok(has(servers, &format!("{record}.{domain}"), value).await? || has(servers, domain, value).await?)
}

async fn has(servers: &[SocketAddr], name: &str, value: &str) -> Result<bool> {
    let mut failure = None;
    for server in servers {
        match texts(*server, name).await {
            Ok(texts) => return Ok(texts.iter().any(|text| text == value.as_bytes())),
            Err(error) => failure = Some(error),
        }
    }
    match failure {
        Some(error) => Err(error),
        None => bail!("there is no name server to ask"),
    }
}

/// The TXT records of a name.
async fn texts(server: SocketAddr, name: &str) -> Result<Vec<Vec<u8>>> {
    let mut request = Message::new(0, MessageType::Query, OpCode::Query);
    request.metadata.recursion_desired = true;
    request.add_query(Query::query(Name::from_ascii(format!("{name}."))?, RecordType::TXT));
    request.set_edns(Edns::new());
    let query = ask(&request)?;
    let mut reply = Message::from_vec(&exchange(&Place::Host, server, &query, Transport::Udp).await?)?;
    if reply.metadata.truncation {
        reply = Message::from_vec(&exchange(&Place::Host, server, &query, Transport::Tcp).await?)?;
    }
    match reply.metadata.response_code {
        ResponseCode::NoError | ResponseCode::NXDomain => {}
        code => bail!("{server} says of {name}: {code}"),
    }
    let text = |data: &RData| if let RData::TXT(text) = data { Some(text.txt_data.concat()) } else { None };
    Ok(reply.answers.iter().filter_map(|record| text(&record.data)).collect())
}
