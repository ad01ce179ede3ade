//! Identifiers: which number a name has. They are kept in the pinned map `names`, beside the maps whose numbers they explain, so
//! they live exactly as long as those do: an agent that starts again finds every name with the number that flows remember.

use anyhow::{Context, Result, ensure};
use privatelink_common::tables::{Name, NameKey};
use std::collections::BTreeMap;

/// What is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Kind {
    /// A VPC.
    Vpc = 1,
    /// A slot: an interface, or `stack/VPC`.
    Interface = 2,
    /// One address of an endpoint: `ENDPOINT/ZONE`.
    Endpoint = 3,
    /// One address of a load balancer: `LOAD_BALANCER/ZONE`.
    Balancer = 4,
    /// A Maglev table: `TARGET_GROUP/ZONE/SLOTS`.
    Table = 5,
    /// A target: `TARGET_GROUP/ADDRESS:PORT`.
    Target = 6,
    /// A set of rules, named after what is in it.
    Rules = 7,
    /// A subnet that a network ACL is about: `VPC/CIDR`.
    Subnet = 8,
}

/// Names and their numbers.
#[derive(Clone, Debug, Default)]
pub struct Names {
    numbers: BTreeMap<(u32, String), u32>,
    names: BTreeMap<(u32, u32), String>,
}

impl Names {
    /// The names in the map's entries.
    pub fn read(entries: &[(NameKey, Name)]) -> Self {
        let mut names = Self::default();
        for (key, name) in entries {
            let text = String::from_utf8_lossy(name);
            names.put(key.kind, key.id, text.trim_end_matches('\0'));
        }
        names
    }

    fn put(&mut self, kind: u32, id: u32, name: &str) {
        self.numbers.insert((kind, name.to_owned()), id);
        self.names.insert((kind, id), name.to_owned());
    }

    /// The number of a name, if it has one.
    pub fn id(&self, kind: Kind, name: &str) -> Option<u32> {
        self.numbers.get(&(kind as u32, name.to_owned())).copied()
    }

    /// The name of a number, or the number itself where it has none any more.
    pub fn name(&self, kind: Kind, id: u32) -> String {
        self.names.get(&(kind as u32, id)).cloned().unwrap_or_else(|| format!("#{id}"))
    }

    /// The number of a name, which gets the lowest free one below `limit` if it has none. Numbers begin at 1.
    pub fn assign(&mut self, kind: Kind, name: &str, limit: u32) -> Result<u32> {
        if let Some(id) = self.id(kind, name) {
            return Ok(id);
        }
        let id = (1..).find(|id| !self.names.contains_key(&(kind as u32, *id))).unwrap_or(u32::MAX);
        ensure!(id < limit, "there is no room for {name}: all {limit} of its kind are in use");
        self.put(kind as u32, id, name);
        Ok(id)
    }

    /// As the map has them.
    pub fn entries(&self) -> Result<BTreeMap<NameKey, Name>> {
        let entry = |(&(kind, id), name): (&(u32, u32), &String)| {
            let mut bytes: Name = [0; 160];
            let room = bytes.get_mut(..name.len()).with_context(|| format!("{name} is too long a name"))?;
            room.copy_from_slice(name.as_bytes());
            Ok((NameKey { kind, id }, bytes))
        };
        self.names.iter().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_number_and_a_new_one_takes_the_lowest_free() {
        let mut names = Names::default();
        for (name, id) in [("a", 1), ("b", 2), ("a", 1), ("c", 3)] {
            assert_eq!(names.assign(Kind::Vpc, name, 10).expect("there is room"), id);
        }
        assert_eq!(
            names.assign(Kind::Target, "a", 10).expect("there is room"),
            1,
            "each kind counts by itself"
        );
        let entries: Vec<_> = names.entries().expect("short names").into_iter().collect();
        let kept: Vec<_> = entries.into_iter().filter(|(key, _)| (key.kind, key.id) != (1, 2)).collect();
        let mut names = Names::read(&kept);
        assert_eq!(names.id(Kind::Vpc, "c"), Some(3));
        assert_eq!(names.assign(Kind::Vpc, "d", 10).expect("there is room"), 2);
        assert!(names.assign(Kind::Vpc, "e", 4).is_err(), "there is no number left");
    }
}
