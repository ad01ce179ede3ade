//! A VPC's names, as its resolver looks them up.

use super::{Entry, Standing};
use hickory_proto::rr::Name;
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What a name resolves to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Records {
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// The name that it points to.
    pub pointer: Option<Name>,
}

/// What is known of a name that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found<'a> {
    /// The zone that it is in, as a key.
    pub apex: &'a [u8],
    /// What it resolves to; none: there is no such name.
    pub records: Option<&'a Records>,
}

/// A name as a key: its labels on the wire, in lower case, so that every suffix that begins with a label is a key, too.
pub fn key(name: &Name) -> Vec<u8> {
    let mut key = Vec::new();
    for label in name.iter() {
        push(&mut key, label);
    }
    key
}

/// The key of a name as it is written, without escapes.
pub fn key_of(text: &str) -> Vec<u8> {
    let mut key = Vec::new();
    for label in text.split('.').filter(|label| !label.is_empty()) {
        push(&mut key, label.as_bytes());
    }
    key
}

fn push(key: &mut Vec<u8>, label: &[u8]) {
    // A label has 63 bytes at most.
    key.push(u8::try_from(label.len()).unwrap_or(u8::MAX));
    key.extend(label.iter().map(u8::to_ascii_lowercase));
}

/// A key without its first label; none of the root.
pub fn parent(key: &[u8]) -> Option<&[u8]> {
    key.get(usize::from(*key.first()?) + 1..)
}

/// The name that a key is of.
pub fn name_of(mut key: &[u8]) -> Name {
    let mut labels = Vec::new();
    while let Some(rest) = parent(key) {
        labels.push(&key[1..key.len() - rest.len()]);
        key = rest;
    }
    Name::from_labels(labels).unwrap_or_else(|_| Name::root())
}

/// The names of one VPC.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Zones, by their apex, with the names in them.
    zones: BTreeMap<Vec<u8>, BTreeMap<Vec<u8>, Records>>,
    /// What all names below a domain resolve to which no zone has.
    wildcards: BTreeMap<Vec<u8>, Records>,
}

impl View {
    /// The names of a VPC: those of `domains` are in zones of these, every other is a zone of its own.
    pub fn new<'a>(entries: impl Iterator<Item = &'a Entry>, domains: &[String]) -> Self {
        let mut view = Self::default();
        for domain in domains {
            let apex = key_of(domain);
            view.zones.insert(apex.clone(), BTreeMap::from([(apex, Records::default())]));
        }
        for entry in entries.filter(|entry| !matches!(entry.standing, Standing::Absent(_))) {
            view.add(entry);
        }
        view
    }

    fn add(&mut self, entry: &Entry) {
        let pointer = entry.pointer.as_ref().and_then(|to| Name::from_ascii(format!("{to}.")).ok());
        let records = Records { addresses: entry.addresses.clone(), pointer };
        if let Some(domain) = entry.name.strip_prefix("*.") {
            self.wildcards.insert(key_of(domain), records);
            return;
        }
        let key = key_of(&entry.name);
        let mut above = Some(key.as_slice());
        while let Some(apex) = above {
            if let Some(zone) = self.zones.get_mut(apex) {
                fill(zone, apex, &key, records);
                return;
            }
            above = parent(apex);
        }
        self.zones.insert(key.clone(), BTreeMap::from([(key, records)]));
    }

    /// What is known of the name with this key; nothing of one that is not ours. The nearest zone counts, also where it says that there is
    /// no such name; a wildcard counts for what is below it, and more than a zone at the same place.
    pub fn find<'a>(&'a self, key: &'a [u8]) -> Option<Found<'a>> {
        let mut at = key;
        loop {
            if at.len() < key.len()
                && let Some(records) = self.wildcards.get(at)
            {
                return Some(Found { apex: at, records: Some(records) });
            }
            if let Some(zone) = self.zones.get(at) {
                return Some(Found { apex: at, records: zone.get(key) });
            }
            at = parent(at)?;
        }
    }
}

/// Puts a name into its zone, with those between it and the apex, which exist although they have nothing (RFC 8020).
fn fill(zone: &mut BTreeMap<Vec<u8>, Records>, apex: &[u8], key: &[u8], records: Records) {
    let mut above = parent(key);
    while let Some(name) = above.filter(|name| name.len() > apex.len()) {
        zone.entry(name.to_vec()).or_default();
        above = parent(name);
    }
    let place = zone.entry(key.to_vec()).or_default();
    // Two zones whose names differ in case are one here.
    place.addresses.extend(records.addresses);
    place.pointer = records.pointer.or(place.pointer.take());
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test: a panic with its place is what is wanted")]
mod tests {
    use super::super::entries::Kind;
    use super::*;

    fn entry(name: &str, standing: Standing) -> Entry {
        let addresses = vec!["10.0.9.9".parse().unwrap()];
        let kind = Kind::Private;
        Entry { vpc: "v".into(), name: name.into(), kind, of: "e".into(), addresses, pointer: None, standing }
    }

    fn view(names: &[&str]) -> View {
        let entries: Vec<_> = names.iter().map(|name| entry(name, Standing::Answered)).collect();
        View::new(entries.iter(), &["gen.internal".into()])
    }

    /// The zone that answers for a name, and with how many addresses; none of a name that does not exist.
    fn found(view: &View, name: &str) -> Option<(String, Option<usize>)> {
        let key = key_of(name);
        let found = view.find(&key)?;
        Some((name_of(found.apex).to_ascii(), found.records.map(|it| it.addresses.len())))
    }

    #[test]
    fn a_name_hides_what_is_below_it_and_nothing_else() {
        let view = view(&["api.example.com"]);
        assert_eq!(found(&view, "API.example.com"), Some(("api.example.com.".into(), Some(1))));
        assert_eq!(found(&view, "www.api.example.com"), Some(("api.example.com.".into(), None)));
        assert_eq!(found(&view, "example.com"), None);
        assert_eq!(found(&view, "xapi.example.com"), None);
    }

    #[test]
    fn a_wildcard_is_for_what_is_below_it_at_any_depth_but_for_names_that_are_nearer() {
        let view = view(&["*.example.com", "api.example.com", "*.deep.example.com", "deep.example.com"]);
        assert_eq!(found(&view, "a.b.example.com"), Some(("example.com.".into(), Some(1))));
        assert_eq!(found(&view, "example.com"), None, "the domain itself is not below it");
        assert_eq!(found(&view, "x.api.example.com"), Some(("api.example.com.".into(), None)));
        assert_eq!(found(&view, "x.deep.example.com"), Some(("deep.example.com.".into(), Some(1))));
        assert_eq!(found(&view, "deep.example.com"), Some(("deep.example.com.".into(), Some(1))));
    }

    #[test]
    fn generated_names_share_a_zone_in_which_what_is_between_exists_without_records() {
        let view = view(&["a.b.gen.internal"]);
        assert_eq!(found(&view, "a.b.gen.internal"), Some(("gen.internal.".into(), Some(1))));
        assert_eq!(found(&view, "b.gen.internal"), Some(("gen.internal.".into(), Some(0))));
        assert_eq!(found(&view, "gen.internal"), Some(("gen.internal.".into(), Some(0))));
        assert_eq!(found(&view, "c.gen.internal"), Some(("gen.internal.".into(), None)));
    }

    #[test]
    fn what_is_absent_is_not_ours_and_what_is_withdrawn_has_nothing() {
        let mut withdrawn = entry("w.example", Standing::Withdrawn("it is".into()));
        withdrawn.addresses.clear();
        let entries = [entry("a.example", Standing::Absent("it is".into())), withdrawn];
        let view = View::new(entries.iter(), &[]);
        assert_eq!(found(&view, "a.example"), None);
        assert_eq!(found(&view, "w.example"), Some(("w.example.".into(), Some(0))));
    }
}
