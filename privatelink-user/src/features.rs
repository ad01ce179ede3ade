//! What an interface can do with XDP, in the kernel's own words: the generic netlink family `netdev` (Linux 6.3 on).

use anyhow::{Context, Result, bail};
use futures_util::TryStreamExt;
use genetlink::new_connection;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    NlasIterator, ParseableParametrized,
};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};

/// `NETDEV_CMD_DEV_GET`
const DEV_GET: u8 = 1;
/// `NETDEV_A_DEV_IFINDEX`
const IFINDEX: u16 = 1;
/// `NETDEV_A_DEV_XDP_FEATURES`
const XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_BASIC`: the driver runs programs.
const BASIC: u64 = 1;
/// `NETDEV_XDP_ACT_REDIRECT`: a program may redirect what it gets here.
const REDIRECT: u64 = 2;
/// `NETDEV_XDP_ACT_NDO_XMIT`: frames may be redirected to here.
const XMIT: u64 = 4;
/// `NETDEV_XDP_ACT_NDO_XMIT_SG`: also frames in several buffers.
const XMIT_SG: u64 = 64;
/// The largest MTU whose frames are in one buffer, whatever the driver: a page, less what the kernel keeps in it.
const ONE_BUFFER: u32 = 3000;

/// What an interface can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    /// Whether its driver runs programs that redirect.
    pub fn runs(self) -> bool {
        self.0 & (BASIC | REDIRECT) == BASIC | REDIRECT
    }

    /// Whether it takes frames of up to an MTU that programs on other interfaces redirect to it. A veth does for as long as its other
    /// end has GRO or a program of its own, wherever that end is.
    pub fn takes(self, mtu: u32) -> bool {
        let needed = if mtu > ONE_BUFFER { XMIT | XMIT_SG } else { XMIT };
        self.0 & needed == needed
    }
}

/// A request for a device, and its answer.
#[derive(Clone, Copy, Debug, Default)]
struct Device {
    ifindex: u32,
    features: Option<u64>,
}

impl Device {
    fn request(&self) -> DefaultNla {
        DefaultNla::new(IFINDEX, self.ifindex.to_ne_bytes().to_vec())
    }
}

impl GenlFamily for Device {
    fn family_name() -> &'static str {
        "netdev"
    }

    fn command(&self) -> u8 {
        DEV_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Device {
    fn buffer_len(&self) -> usize {
        Emitable::buffer_len(&self.request())
    }

    fn emit(&self, buffer: &mut [u8]) {
        Emitable::emit(&self.request(), buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Device {
    fn parse_with_param(bytes: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        let mut device = Self::default();
        for attribute in NlasIterator::new(bytes) {
            let attribute = attribute?;
            let value = attribute.value();
            match attribute.kind() {
                IFINDEX => device.ifindex = value.try_into().map(u32::from_ne_bytes).unwrap_or_default(),
                XDP_FEATURES => device.features = value.try_into().map(u64::from_ne_bytes).ok(),
                _ => {}
            }
        }
        Ok(device)
    }
}

/// Asks for an interface of the calling thread's network namespace. Fails on kernels that do not say.
pub fn of(ifindex: u32) -> Result<Features> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, mut handle, _) = new_connection().context("cannot open a generic netlink socket")?;
        let connection = tokio::spawn(connection);
        let result = ask(&mut handle, ifindex).await;
        connection.abort();
        result
    })
}

async fn ask(handle: &mut genetlink::GenetlinkHandle, ifindex: u32) -> Result<Features> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let request = GenlMessage::from_payload(Device { ifindex, features: None });
    let mut answers = handle.request(NetlinkMessage::new(header, request.into())).await?;
    match answers.try_next().await?.map(|answer| answer.payload) {
        Some(NetlinkPayload::InnerMessage(answer)) => {
            answer.payload.features.map(Features).context("the kernel does not say what the interface can do")
        }
        other => bail!("cannot ask what the interface can do: {other:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Features, of};

    #[test]
    fn jumbo_frames_are_taken_only_by_a_driver_that_takes_several_buffers() {
        for (features, mtu, taken) in [(3, 1500, false), (7, 1500, true), (7, 9000, false), (71, 9000, true)]
        {
            assert_eq!(Features(features).takes(mtu), taken, "{features:#x} with an MTU of {mtu}");
        }
    }

    #[test]
    fn the_kernel_says_what_the_loopback_interface_can_do_and_refuses_one_that_is_not_there() {
        assert_eq!(of(1).unwrap(), Features(0), "no driver, no XDP");
        assert!(of(0x7fff_ffff).is_err());
    }
}
