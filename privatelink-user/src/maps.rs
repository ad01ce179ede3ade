//! The pinned maps, typed. The only module that reads and writes them.
//!
//! This goes to bpf(2) directly rather than through aya's typed maps, because most of what the agent does to the large ones is in
//! batches, which aya does not have, and one way of reaching a map is simpler than two.

use crate::sys::{self, Command};
use anyhow::{Context, Result};
use privatelink_common::tables::{
    Address, Balancer, Bucket, CallerRate, Counter, Datagram, Endpoint, EndpointCounters, Flow, Flow6,
    FlowKey, FlowKey6, FragmentKey, HeldRate, Interface, Listener, ListenerKey, Mtu, Name, NameKey,
    Neighbour, Prefix, Pressure, RuleAddress, RuleMask, RulePort, RulePorts, Stream, Subnet, Target,
    TargetCounters, Trunk, VlanKey, VpcAddress, VpcEndpointId,
};
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Entries that a walk reads at once.
pub const CHUNK: u32 = 4096;

/// What keys and values are: bytes, with nothing in between.
pub trait Plain: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout + Copy> Plain for T {}

/// A map of this host.
#[derive(Debug)]
pub struct Map<K, V> {
    fd: OwnedFd,
    name: &'static str,
    types: PhantomData<fn(K) -> V>,
}

fn is_missing(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOENT)
}

impl<K: Plain, V: Plain> Map<K, V> {
    /// Opens the map of this name below `dir`; refuses one whose keys or values are of another size.
    pub fn open(dir: &Path, name: &'static str) -> Result<Self> {
        let path = dir.join(name);
        let fd = sys::open_pin(&path).with_context(|| format!("cannot open the map {}", path.display()))?;
        let map = Self { fd, name, types: PhantomData };
        let info = map.info()?;
        let (key, value) = (info.key_size as usize, info.value_size as usize);
        anyhow::ensure!(
            (key, value) == (size_of::<K>(), size_of::<V>()),
            "the map {} has keys of {key} and values of {value} bytes; this version uses {} and {}",
            path.display(),
            size_of::<K>(),
            size_of::<V>()
        );
        Ok(map)
    }

    /// What the kernel says of it.
    pub fn info(&self) -> Result<sys::MapInfo> {
        sys::map_info(self.fd.as_fd()).with_context(|| format!("cannot ask for the map {}", self.name))
    }

    /// Bytes of the kernel's memory that it takes, as the kernel accounts them.
    pub fn memory(&self) -> Result<u64> {
        let path = format!("/proc/self/fdinfo/{}", sys::raw(&self.fd));
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
        line.and_then(|bytes| bytes.trim().parse().ok())
            .with_context(|| format!("the kernel does not say how large the map {} is", self.name))
    }

    /// The value of a key.
    pub fn get(&self, key: &K) -> Result<Option<V>> {
        self.take(Command::Lookup, key)
    }

    /// Removes a key, and returns its value.
    pub fn remove(&self, key: &K) -> Result<Option<V>> {
        self.take(Command::LookupAndDelete, key)
    }

    fn take(&self, command: Command, key: &K) -> Result<Option<V>> {
        let mut value = V::new_zeroed();
        // `V` cannot be lent as mutable bytes (that would need more of it than a copy does), so the bytes are copied.
        let mut bytes = value.as_bytes().to_vec();
        match sys::element(command, self.fd.as_fd(), key.as_bytes(), &mut bytes, 0) {
            Ok(()) => {
                value = V::read_from_bytes(&bytes).map_err(|_| anyhow::anyhow!("a value of another size"))?;
                Ok(Some(value))
            }
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read the map {}", self.name)),
        }
    }

    /// Sets the value of a key.
    pub fn set(&self, key: &K, value: &V) -> Result<()> {
        self.update(key, value, 0)
    }

    /// Sets the value of a key that has none (`BPF_NOEXIST`).
    pub fn insert(&self, key: &K, value: &V) -> Result<()> {
        self.update(key, value, 1)
    }

    fn update(&self, key: &K, value: &V, flags: u64) -> Result<()> {
        let mut bytes = value.as_bytes().to_vec();
        sys::element(Command::Update, self.fd.as_fd(), key.as_bytes(), &mut bytes, flags)
            .with_context(|| format!("cannot write to the map {}", self.name))
    }

    /// Sets many keys at once.
    pub fn fill(&self, keys: &[K], values: &[V]) -> Result<()> {
        let count = u32::try_from(keys.len().min(values.len()))?;
        sys::update_batch(self.fd.as_fd(), keys.as_bytes(), values.as_bytes(), count)
            .with_context(|| format!("cannot fill the map {}", self.name))
    }

    /// Removes a key, if it is there.
    pub fn delete(&self, key: &K) -> Result<()> {
        match sys::element(Command::Delete, self.fd.as_fd(), key.as_bytes(), &mut [], 0) {
            Err(error) if !is_missing(&error) => {
                Err(error).with_context(|| format!("cannot remove from the map {}", self.name))
            }
            _ => Ok(()),
        }
    }

    /// Every key, as they were while the map was walked.
    pub fn keys(&self) -> Result<Vec<K>> {
        let mut keys = Vec::new();
        let mut next = K::new_zeroed().as_bytes().to_vec();
        let mut last: Vec<u8> = Vec::new();
        let limit = self.info()?.max_entries;
        for _ in 0..=limit {
            match sys::element(Command::NextKey, self.fd.as_fd(), &last, &mut next, 0) {
                Ok(()) => {}
                Err(error) if is_missing(&error) => break,
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot walk the map {}", self.name));
                }
            }
            last.clone_from(&next);
            keys.extend(K::read_from_bytes(&next));
        }
        Ok(keys)
    }

    /// Every entry. For maps that are small, or change little.
    pub fn entries(&self) -> Result<Vec<(K, V)>> {
        let keys = self.keys()?;
        keys.into_iter()
            .filter_map(|key| self.get(&key).map(|value| Some((key, value?))).transpose())
            .collect()
    }

    /// How many entries there are.
    pub fn count(&self) -> Result<usize> {
        let mut count = 0;
        self.walk(CHUNK, |keys, _| count += keys.len())?;
        Ok(count)
    }

    /// Hands every entry to `each`, `chunk` at a time, without stopping those who write.
    pub fn walk(&self, chunk: u32, mut each: impl FnMut(&[K], &[V])) -> Result<()> {
        let room = chunk as usize;
        let (mut keys, mut values) = (vec![K::new_zeroed(); room], vec![V::new_zeroed(); room]);
        let (mut key_bytes, mut value_bytes) =
            (vec![0u8; room * size_of::<K>()], vec![0u8; room * size_of::<V>()]);
        let mut cursor = None;
        let limit = self.info()?.max_entries / chunk.max(1) * 4 + 64;
        for _ in 0..limit {
            let (count, last) =
                sys::lookup_batch(self.fd.as_fd(), &mut cursor, &mut key_bytes, &mut value_bytes, chunk)
                    .with_context(|| format!("cannot walk the map {}", self.name))?;
            let count = (count as usize).min(room);
            for (index, key) in keys.iter_mut().enumerate().take(count) {
                let (from, to) = (index * size_of::<K>(), (index + 1) * size_of::<K>());
                *key = K::read_from_bytes(&key_bytes[from..to]).unwrap_or(*key);
            }
            for (index, value) in values.iter_mut().enumerate().take(count) {
                let (from, to) = (index * size_of::<V>(), (index + 1) * size_of::<V>());
                *value = V::read_from_bytes(&value_bytes[from..to]).unwrap_or(*value);
            }
            each(&keys[..count], &values[..count]);
            if last {
                return Ok(());
            }
        }
        Ok(())
    }
}

impl<V: Plain + Default + PartialEq> Map<u32, V> {
    /// The entries of an array that are not all zeros.
    pub fn filled(&self) -> Result<BTreeMap<u32, V>> {
        let mut entries = BTreeMap::new();
        self.walk(CHUNK, |keys, values| {
            let set = keys.iter().zip(values).filter(|(_, value)| **value != V::default());
            entries.extend(set.map(|(key, value)| (*key, *value)));
        })?;
        Ok(entries)
    }
}

/// A map with a value for each CPU.
#[derive(Debug)]
pub struct PerCpu<V> {
    map: Map<u32, V>,
    cpus: usize,
}

impl<V: Plain> PerCpu<V> {
    fn open(dir: &Path, name: &'static str) -> Result<Self> {
        let cpus = sys::possible_cpus().context("cannot learn how many CPUs there are")?;
        Ok(Self { map: Map::open(dir, name)?, cpus })
    }

    /// The values of every CPU.
    pub fn get(&self, index: u32) -> Result<Vec<V>> {
        let stride = size_of::<V>().next_multiple_of(8);
        let mut bytes = vec![0; stride * self.cpus];
        sys::element(Command::Lookup, self.map.fd.as_fd(), index.as_bytes(), &mut bytes, 0)
            .with_context(|| format!("cannot read the map {}", self.map.name))?;
        Ok(bytes
            .chunks(stride)
            .filter_map(|chunk| V::read_from_prefix(chunk).ok())
            .map(|(value, _)| value)
            .collect())
    }

    /// Sets every CPU's value.
    pub fn set_all(&self, index: u32, value: &V) -> Result<()> {
        self.set_each(index, &vec![*value; self.cpus])
    }

    /// Sets each CPU's value to its own.
    pub fn set_each(&self, index: u32, values: &[V]) -> Result<()> {
        let stride = size_of::<V>().next_multiple_of(8);
        let mut bytes = vec![0; stride * self.cpus];
        for (chunk, value) in bytes.chunks_mut(stride).zip(values) {
            chunk[..size_of::<V>()].copy_from_slice(value.as_bytes());
        }
        sys::element(Command::Update, self.map.fd.as_fd(), index.as_bytes(), &mut bytes, 0)
            .with_context(|| format!("cannot write to the map {}", self.map.name))
    }

    /// What the kernel says of it.
    pub fn info(&self) -> Result<sys::MapInfo> {
        self.map.info()
    }
}

/// A Maglev table inside `tables`.
#[derive(Debug)]
pub struct Maglev {
    map: Map<u32, u32>,
}

impl Maglev {
    /// How many slots it has.
    pub fn slots(&self) -> Result<u32> {
        Ok(self.map.info()?.max_entries)
    }

    /// The target in one slot.
    pub fn get(&self, slot: u32) -> Result<Option<u32>> {
        self.map.get(&slot)
    }

    /// Every slot's target.
    pub fn read(&self) -> Result<Vec<u32>> {
        let slots = self.slots()?;
        let mut table = Vec::with_capacity(slots as usize);
        self.map.walk(slots.max(1), |_, values| table.extend_from_slice(values))?;
        Ok(table)
    }
}

/// The map of Maglev tables.
#[derive(Debug)]
pub struct Tables {
    map: Map<u32, u32>,
}

impl Tables {
    /// The table at an index, if there is one.
    pub fn get(&self, index: u32) -> Result<Option<Maglev>> {
        let Some(id) = self.map.get(&index)? else { return Ok(None) };
        let fd = sys::map_by_id(id).with_context(|| format!("cannot open the Maglev table {index}"))?;
        Ok(Some(Maglev { map: Map { fd, name: "tables", types: PhantomData } }))
    }

    /// Puts whole tables in place, each by one exchange of a pointer; the kernel waits for running programs once for all of them.
    pub fn set(&self, tables: &[(u32, Vec<u32>)]) -> Result<()> {
        if tables.is_empty() {
            return Ok(());
        }
        let (mut indices, mut fds, mut held) = (Vec::new(), Vec::new(), Vec::new());
        for (index, slots) in tables {
            let size = u32::try_from(slots.len())?;
            let fd = sys::create_table(size).context("cannot create a Maglev table")?;
            let map = Map::<u32, u32> { fd, name: "tables", types: PhantomData };
            let keys: Vec<u32> = (0..size).collect();
            sys::update_batch(map.fd.as_fd(), keys.as_bytes(), slots.as_bytes(), size)
                .context("cannot fill a Maglev table")?;
            indices.push(*index);
            fds.push(sys::raw(&map.fd).cast_unsigned());
            held.push(map);
        }
        let count = u32::try_from(tables.len())?;
        sys::update_batch(self.map.fd.as_fd(), indices.as_bytes(), fds.as_bytes(), count)
            .context("cannot put Maglev tables in place")
    }

    /// Bytes of the kernel's memory that the map of tables takes, without the tables.
    pub fn memory(&self) -> Result<u64> {
        self.map.memory()
    }

    /// Takes a table away.
    pub fn delete(&self, index: u32) -> Result<()> {
        self.map.delete(&index)
    }

    /// What the kernel says of it.
    pub fn info(&self) -> Result<sys::MapInfo> {
        self.map.info()
    }
}

/// The key of a longest-prefix-match trie: how many bits count, and the bits.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PrefixKey {
    /// Bits that count, the VPC's 32 included.
    pub bits: u32,
    /// The bits.
    pub prefix: Prefix,
}

/// A key of `rules_by_address`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct AddressRuleKey {
    /// Bits that count, the set's 32 included.
    pub bits: u32,
    /// The bits.
    pub of: RuleAddress,
}

/// A key of `rules_by_port`.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct PortRuleKey {
    /// Bits that count, the 48 before the port included.
    pub bits: u32,
    /// The bits.
    pub of: RulePort,
}

/// Every map, in the order of `privatelink_common::tables`.
#[derive(Debug)]
#[allow(missing_docs, reason = "named as the maps are; described in privatelink_common::tables")]
pub struct Maps {
    pub interfaces: Map<u32, Interface>,
    pub egress: Map<u32, [u32; 2]>,
    pub mtus: Map<u32, Mtu>,
    pub egress_tcx: Map<u32, u32>,
    pub vlans: Map<VlanKey, u32>,
    pub trunks: Map<u32, Trunk>,
    pub prefixes: Map<PrefixKey, u32>,
    pub rules_by_address: Map<AddressRuleKey, RuleMask>,
    pub rules_by_port: Map<PortRuleKey, RulePorts>,
    pub subnets: Map<PrefixKey, Subnet>,
    pub addresses: Map<VpcAddress, Address>,
    pub endpoints: Map<u32, Endpoint>,
    pub balancers: Map<u32, Balancer>,
    pub listeners: Map<ListenerKey, Listener>,
    pub tables: Tables,
    pub targets: Map<u32, Target>,
    pub neighbours: Map<VpcAddress, Neighbour>,
    pub callers: Map<VpcAddress, Neighbour>,
    pub established: Map<FlowKey, Flow>,
    pub pending: Map<FlowKey, Flow>,
    pub established6: Map<FlowKey6, Flow6>,
    pub pending6: Map<FlowKey6, Flow6>,
    pub streams: Map<FlowKey, Stream>,
    pub streams6: Map<FlowKey6, Stream>,
    pub counters: PerCpu<EndpointCounters>,
    pub target_counters: PerCpu<TargetCounters>,
    pub buckets: Map<u32, Bucket>,
    pub pressures: Map<u32, Pressure>,
    pub vpc_endpoint_ids: Map<u32, VpcEndpointId>,
    pub fragments: Map<FragmentKey, Datagram>,
    pub identification: Map<u32, u32>,
    pub held: Map<u32, u32>,
    pub caller_rates: Map<u32, CallerRate>,
    pub held_rates: Map<u32, HeldRate>,
    pub held_taken: Map<u32, u64>,
    pub outcomes: PerCpu<Counter>,
    pub names: Map<NameKey, Name>,
    pub layout: Map<u32, u32>,
}

impl Maps {
    /// The names of them all.
    pub const NAMES: [&str; 38] = [
        "interfaces",
        "egress",
        "mtus",
        "egress_tcx",
        "vlans",
        "trunks",
        "prefixes",
        "rules_by_address",
        "rules_by_port",
        "subnets",
        "addresses",
        "endpoints",
        "balancers",
        "listeners",
        "tables",
        "targets",
        "neighbours",
        "callers",
        "established",
        "pending",
        "established6",
        "pending6",
        "streams",
        "streams6",
        "counters",
        "target_counters",
        "buckets",
        "pressures",
        "vpc_endpoint_ids",
        "fragments",
        "identification",
        "held",
        "caller_rates",
        "held_rates",
        "held_taken",
        "outcomes",
        "names",
        "layout",
    ];

    /// Opens what is pinned in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        Ok(Self {
            interfaces: Map::open(dir, "interfaces")?,
            egress: Map::open(dir, "egress")?,
            mtus: Map::open(dir, "mtus")?,
            egress_tcx: Map::open(dir, "egress_tcx")?,
            vlans: Map::open(dir, "vlans")?,
            trunks: Map::open(dir, "trunks")?,
            prefixes: Map::open(dir, "prefixes")?,
            rules_by_address: Map::open(dir, "rules_by_address")?,
            rules_by_port: Map::open(dir, "rules_by_port")?,
            subnets: Map::open(dir, "subnets")?,
            addresses: Map::open(dir, "addresses")?,
            endpoints: Map::open(dir, "endpoints")?,
            balancers: Map::open(dir, "balancers")?,
            listeners: Map::open(dir, "listeners")?,
            tables: Tables { map: Map::open(dir, "tables")? },
            targets: Map::open(dir, "targets")?,
            neighbours: Map::open(dir, "neighbours")?,
            callers: Map::open(dir, "callers")?,
            established: Map::open(dir, "established")?,
            pending: Map::open(dir, "pending")?,
            established6: Map::open(dir, "established6")?,
            pending6: Map::open(dir, "pending6")?,
            streams: Map::open(dir, "streams")?,
            streams6: Map::open(dir, "streams6")?,
            counters: PerCpu::open(dir, "counters")?,
            target_counters: PerCpu::open(dir, "target_counters")?,
            buckets: Map::open(dir, "buckets")?,
            pressures: Map::open(dir, "pressures")?,
            vpc_endpoint_ids: Map::open(dir, "vpc_endpoint_ids")?,
            fragments: Map::open(dir, "fragments")?,
            identification: Map::open(dir, "identification")?,
            held: Map::open(dir, "held")?,
            caller_rates: Map::open(dir, "caller_rates")?,
            held_rates: Map::open(dir, "held_rates")?,
            held_taken: Map::open(dir, "held_taken")?,
            outcomes: PerCpu::open(dir, "outcomes")?,
            names: Map::open(dir, "names")?,
            layout: Map::open(dir, "layout")?,
        })
    }
}

/// The entries of `names` alone.
pub fn names(dir: &Path) -> Result<Vec<(NameKey, Name)>> {
    Map::<NameKey, Name>::open(dir, "names")?.entries()
}
