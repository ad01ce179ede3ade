//! The maps, declared in the order of `privatelink_common::tables`, which says who writes them, who reads them, and what happens
//! when one is full. Sizes are the defaults of the configuration's `[limits]`; the agent sets them when it creates the maps.

use crate::frame::Chunk;
use crate::vlan::Came;
use aya_ebpf::{
    btf_maps::{
        Array, ArrayOfMaps, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerfEventByteArray,
    },
    macros::btf_map,
};
use privatelink_common::{
    limits::{CALLERS, FRAGMENTED_DATAGRAMS, OUTCOMES, RULE_ENTRIES},
    path::Room,
    tables::{
        Address, Balancer, Bucket, CallerRate, Counter, Datagram, Endpoint, EndpointCounters, Flow, Flow6,
        FlowKey, FlowKey6, FragmentKey, HeldRate, Interface, Listener, ListenerKey, Mtu, Name, NameKey,
        Neighbour, Prefix, Pressure, RuleAddress, RuleMask, RulePort, RulePorts, Stream, Subnet, Target,
        TargetCounters, Trunk, VlanKey, VpcAddress, VpcEndpointId,
    },
};

/// `BPF_F_NO_PREALLOC`: for maps that are mostly empty.
const SPARSE: usize = 1;
/// `BPF_F_INNER_MAP`: the inner maps' sizes differ.
const ANY_SIZE: usize = 1 << 12;

#[btf_map(name = "interfaces")]
pub(crate) static INTERFACES: Array<Interface, { 65536 + 4096 }> = Array::new();
#[btf_map(name = "egress")]
pub(crate) static EGRESS: DevMapHash<4096> = DevMapHash::new();
#[btf_map(name = "mtus")]
pub(crate) static MTUS: Array<Mtu, 4096> = Array::new();
#[btf_map(name = "egress_tcx")]
pub(crate) static EGRESS_TCX: Array<u32, 4096> = Array::new();
#[btf_map(name = "vlans")]
pub(crate) static VLANS: HashMap<VlanKey, u32, 4096, SPARSE> = HashMap::new();
#[btf_map(name = "trunks")]
pub(crate) static TRUNKS: Array<Trunk, 4096> = Array::new();
#[btf_map(name = "prefixes")]
pub(crate) static PREFIXES: LpmTrie<Prefix, u32, 16384> = LpmTrie::new();
#[btf_map(name = "rules_by_address")]
pub(crate) static RULES_BY_ADDRESS: LpmTrie<RuleAddress, RuleMask, { RULE_ENTRIES as usize }> =
    LpmTrie::new();
#[btf_map(name = "rules_by_port")]
pub(crate) static RULES_BY_PORT: LpmTrie<RulePort, RulePorts, { RULE_ENTRIES as usize }> = LpmTrie::new();
#[btf_map(name = "subnets")]
pub(crate) static SUBNETS: LpmTrie<Prefix, Subnet, 16384> = LpmTrie::new();
#[btf_map(name = "addresses")]
pub(crate) static ADDRESSES: HashMap<VpcAddress, Address, 16384, SPARSE> = HashMap::new();
#[btf_map(name = "endpoints")]
pub(crate) static ENDPOINTS: Array<Endpoint, 4096> = Array::new();
#[btf_map(name = "balancers")]
pub(crate) static BALANCERS: Array<Balancer, 4096> = Array::new();
#[btf_map(name = "listeners")]
pub(crate) static LISTENERS: HashMap<ListenerKey, Listener, 16384, SPARSE> = HashMap::new();
#[btf_map(name = "tables")]
pub(crate) static TABLES: ArrayOfMaps<Array<u32, 251, ANY_SIZE>, 4096> = ArrayOfMaps::new();
#[btf_map(name = "targets")]
pub(crate) static TARGETS: Array<Target, 16384> = Array::new();
#[btf_map(name = "neighbours")]
pub(crate) static NEIGHBOURS: HashMap<VpcAddress, Neighbour, 16384, SPARSE> = HashMap::new();
#[btf_map(name = "callers")]
pub(crate) static CALLERS_BY_ADDRESS: LruHashMap<VpcAddress, Neighbour, CALLERS> = LruHashMap::new();
#[btf_map(name = "caller_rates")]
pub(crate) static CALLER_RATES: Array<CallerRate, 4096> = Array::new();
#[btf_map(name = "established")]
pub(crate) static ESTABLISHED: HashMap<FlowKey, Flow, 1048576> = HashMap::new();
#[btf_map(name = "pending")]
pub(crate) static PENDING: LruHashMap<FlowKey, Flow, 65536> = LruHashMap::new();
#[btf_map(name = "established6")]
pub(crate) static ESTABLISHED6: HashMap<FlowKey6, Flow6, 262144> = HashMap::new();
#[btf_map(name = "pending6")]
pub(crate) static PENDING6: LruHashMap<FlowKey6, Flow6, 32768> = LruHashMap::new();
#[btf_map(name = "streams")]
pub(crate) static STREAMS: HashMap<FlowKey, Stream, 524288, SPARSE> = HashMap::new();
#[btf_map(name = "streams6")]
pub(crate) static STREAMS6: HashMap<FlowKey6, Stream, 131072, SPARSE> = HashMap::new();
#[btf_map(name = "counters")]
pub(crate) static COUNTERS: PerCpuArray<EndpointCounters, 4096> = PerCpuArray::new();
#[btf_map(name = "target_counters")]
pub(crate) static TARGET_COUNTERS: PerCpuArray<TargetCounters, 16384> = PerCpuArray::new();
#[btf_map(name = "buckets")]
pub(crate) static BUCKETS: Array<Bucket, 4096> = Array::new();
#[btf_map(name = "pressures")]
pub(crate) static PRESSURES: Array<Pressure, 4096> = Array::new();
#[btf_map(name = "vpc_endpoint_ids")]
pub(crate) static VPC_ENDPOINT_IDS: Array<VpcEndpointId, 4096> = Array::new();
#[btf_map(name = "fragments")]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, Datagram, FRAGMENTED_DATAGRAMS> = LruHashMap::new();
/// One number, which the identifications of fragmented datagrams are counted by.
#[btf_map(name = "identification")]
pub(crate) static IDENTIFICATION: Array<u32, 1> = Array::new();
/// The buffers by which fragments that are to be held go to the agent, by CPU: the agent's, so that without one there are none.
#[btf_map(name = "held")]
pub(crate) static HELD: PerfEventByteArray = PerfEventByteArray::new();
#[btf_map(name = "held_rates")]
pub(crate) static HELD_RATES: Array<HeldRate, 1024> = Array::new();
#[btf_map(name = "held_taken")]
pub(crate) static HELD_TAKEN: Array<u64, 1024> = Array::new();
#[btf_map(name = "outcomes")]
pub(crate) static OUTCOMES_BY_VPC: PerCpuArray<Counter, { 1024 * OUTCOMES as usize }> = PerCpuArray::new();
#[btf_map(name = "names")]
pub(crate) static NAMES: HashMap<NameKey, Name, 65536, SPARSE> = HashMap::new();
/// What the path remembers of a packet while it decides about it; of no interest to anyone else.
#[btf_map(name = "room")]
pub(crate) static ROOM: PerCpuArray<Room, 1> = PerCpuArray::new();
/// How the frame at hand came, where tags were taken off it.
#[btf_map(name = "came")]
pub(crate) static CAME: PerCpuArray<Came, 1> = PerCpuArray::new();
/// What is being summed of the frame at hand.
#[btf_map(name = "chunk")]
pub(crate) static CHUNK: PerCpuArray<Chunk, 1> = PerCpuArray::new();
/// A word for [`crate::tables::KernelTables`] to order its writes by.
#[btf_map(name = "fence")]
pub(crate) static FENCE: PerCpuArray<u64, 1> = PerCpuArray::new();
/// One number: the layout of all the others.
#[btf_map(name = "layout")]
pub(crate) static LAYOUT: Array<u32, 1> = Array::new();
