//! Addresses of either family, as the maps have them and as people write them.

use privatelink_common::wire::Ip;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// A family of addresses, by AWS's names (`IpAddressType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// That of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        }
    }

    /// The family with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// An address, for the maps.
pub fn entry(address: IpAddr) -> Ip {
    match address {
        IpAddr::V4(address) => Ip::from_ipv4(address.octets()),
        IpAddr::V6(address) => Ip(address.octets()),
    }
}

/// An address of the maps, for people.
pub fn shown(address: Ip) -> IpAddr {
    IpAddr::from(address.0).to_canonical()
}

/// An address of the maps with a port, for people.
pub fn with_port(address: Ip, port: impl Into<u16>) -> SocketAddr {
    SocketAddr::new(shown(address), port.into())
}

/// The bytes of an address, as many as its family has.
pub fn bytes(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_either_family_is_shown_as_it_was_written() {
        for text in ["10.0.9.9", "fd00::9", "2001:db8::1:0:0:1"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(shown(entry(address)).to_string(), text);
            assert_eq!(entry(address).is_ipv4(), address.is_ipv4());
        }
        assert_eq!(with_port(entry("fd00::9".parse().unwrap()), 80u16).to_string(), "[fd00::9]:80");
    }
}
