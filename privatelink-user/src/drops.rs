//! What the program says of packets that it drops, one line each.

use crate::maps::{Map, Maps};
use crate::model::Limits;
use crate::names::Kind;
use crate::net;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record, info};
use privatelink_common::tables::{Name, NameKey};
use privatelink_common::verdict::DropReason;
use privatelink_common::wire::{ICMP, ICMPV6, TCP, UDP};
use std::net::SocketAddr;
use std::time::Duration;

/// How long the program's messages gather before they are read. They have 128 KiB of room, and what comes when that is full is
/// counted and not named: this bounds the log, whatever is sent.
const PAUSE: Duration = Duration::from_millis(200);

/// Takes the numbers in the program's messages, and writes the words for them.
#[derive(Debug)]
pub struct Words {
    /// What slots are called.
    names: Map<NameKey, Name>,
    /// From which index on an interface is tags on a trunk, whose slot follows from it.
    vlans: u32,
}

impl Words {
    /// Those for what has these maps, and these limits.
    pub fn new(maps: Maps, limits: &Limits) -> Self {
        Self { names: maps.names, vlans: limits.max_ifindex }
    }

    /// The name of an interface by its index in the map `interfaces`.
    fn interface(&self, index: u32) -> Option<String> {
        let Some(id) = index.checked_sub(self.vlans) else { return net::name_of(index) };
        let name = self.names.get(&NameKey { kind: Kind::Interface as u32, id }).ok()??;
        Some(String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned())
    }
}

impl Log for Words {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let message = record.args().to_string();
        info!("{}", words(&message, |index| self.interface(index)).unwrap_or(message));
    }

    fn flush(&self) {}
}

/// `REASON IFINDEX PROTOCOL SOURCE:PORT DESTINATION:PORT`, for people.
fn words(message: &str, name: impl Fn(u32) -> Option<String>) -> Option<String> {
    let mut parts = message.split_whitespace();
    let reason = DropReason::from_code(parts.next()?.parse().ok()?)?.name();
    let ifindex: u32 = parts.next()?.parse().ok()?;
    let interface = name(ifindex).unwrap_or_else(|| ifindex.to_string());
    let protocol: u8 = parts.next()?.parse().ok()?;
    let (from, to) = (parts.next()?, parts.next()?);
    let address = |it: &str| it.rsplit_once(':').map(|(address, _)| address.to_owned());
    let with_port = |it: &str| {
        let (address, port) = it.rsplit_once(':')?;
        Some(SocketAddr::new(address.parse().ok()?, port.parse().ok()?).to_string())
    };
    Some(match protocol {
        TCP => format!("dropped {reason}: {interface} tcp {} > {}", with_port(from)?, with_port(to)?),
        UDP => format!("dropped {reason}: {interface} udp {} > {}", with_port(from)?, with_port(to)?),
        ICMP => format!("dropped {reason}: {interface} icmp {} > {}", address(from)?, address(to)?),
        ICMPV6 => format!("dropped {reason}: {interface} icmpv6 {} > {}", address(from)?, address(to)?),
        other => {
            format!("dropped {reason}: {interface} protocol {other} {} > {}", address(from)?, address(to)?)
        }
    })
}

/// Writes the program's messages to the log, for as long as the agent runs.
pub async fn follow(mut logger: EbpfLogger<Words>) {
    let mut pause = tokio::time::interval(PAUSE);
    loop {
        pause.tick().await;
        logger.flush();
    }
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn a_message_of_the_program_becomes_words_and_any_other_is_left_alone() {
        let words = |message| words(message, |index| (index == 7).then(|| "eth1@120".into()));
        let line = words("20 7 6 10.0.1.5:40000 10.0.9.9:81").unwrap();
        assert!(line.contains(": eth1@120 tcp 10.0.1.5:40000 >"), "{line}");
        let line = words("20 4294967295 6 10.0.1.5:40000 10.0.9.9:81").unwrap();
        assert!(line.ends_with(": 4294967295 tcp 10.0.1.5:40000 > 10.0.9.9:81"), "{line}");
        let line = words("40 4294967295 6 fd00::5:40000 fd00::9:81").unwrap();
        assert!(line.ends_with(": 4294967295 tcp [fd00::5]:40000 > [fd00::9]:81"), "{line}");
        for other in ["", "hello", "20 1 6", "999 1 6 1.1.1.1:1 2.2.2.2:2"] {
            assert_eq!(words(other), None, "{other}");
        }
    }
}
