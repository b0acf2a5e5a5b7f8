//! The ingress qdisc of a link and its filters, by rtnetlink(7).

use futures_util::StreamExt;
use rtnetlink::{
    packet_core::{
        DefaultNla, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage,
        NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption,
            TcActionOption, TcActionType, TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption,
            TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption,
        },
    },
};

use crate::{
    error::NetnsError,
    netlink::{Links, is},
    source_check::Program,
};

/// `ffff:`, the handle of an ingress qdisc.
const INGRESS_QDISC: u32 = 0xffff_0000;

// Of linux/pkt_cls.h; the library has no names for these.
const TCA_BPF_ACT: u16 = 1;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;

/// The filters of a link that matches decide on, in this order.
const FIRST: u16 = 1;
const SECOND: u16 = 2;

/// A link's ingress qdisc. Its filters run before the namespace's own stack.
pub(crate) struct Ingress<'a> {
    links: &'a Links,
    /// Of the link.
    name: &'a str,
    index: i32,
}

impl<'a> Ingress<'a> {
    /// Gives the link a qdisc without filters, in the place of any it has.
    pub(crate) async fn renew(
        links: &'a Links,
        name: &'a str,
        index: u32,
    ) -> Result<Self, NetnsError> {
        let index = index.cast_signed();
        let mut qdiscs = links.handle.qdisc();
        let mut old = qdiscs.del(index);
        old.message_mut().header.parent = TcHandle::INGRESS;
        old.message_mut().header.handle = INGRESS_QDISC.into();
        match old.execute().await {
            Ok(()) => {}
            // There was none.
            Err(rtnetlink::Error::NetlinkError(error))
                if is(&error, libc::ENOENT) || is(&error, libc::EINVAL) => {}
            Err(source) => return Err(links.failed("clear the ingress qdisc of", name)(source)),
        }
        qdiscs
            .add(index)
            .ingress()
            .execute()
            .await
            .map_err(links.failed("add an ingress qdisc to", name))?;
        Ok(Self { links, name, index })
    }

    /// Sends every frame out of the link `to`.
    pub(crate) async fn redirect_all(&self, to: u32) -> Result<(), NetnsError> {
        self.links
            .handle
            .traffic_filter(self.index)
            .add()
            .parent(INGRESS_QDISC)
            .protocol(every_protocol())
            .redirect(to)
            .map_err(self.links.failed("describe the redirect of", self.name))?
            .execute()
            .await
            .map_err(self.links.failed("redirect the packets of", self.name))
    }

    /// Sends the frames that `program` matches out of the link `to`, and drops
    /// all others.
    pub(crate) async fn redirect_matches(
        &self,
        program: &Program,
        to: u32,
    ) -> Result<(), NetnsError> {
        let drop_all = [
            instructions(&Program::drop_all()),
            vec![TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)],
        ];
        self.add_bpf(SECOND, drop_all.concat()).await?;
        let actions = [redirect_to(to)];
        let mut bytes = vec![0; actions.as_slice().buffer_len()];
        actions.as_slice().emit(&mut bytes);
        let redirect = [
            instructions(program),
            vec![TcFilterBpfOption::Other(DefaultNla::new(
                TCA_BPF_ACT,
                bytes,
            ))],
        ];
        self.add_bpf(FIRST, redirect.concat()).await
    }

    async fn add_bpf(
        &self,
        priority: u16,
        options: Vec<TcFilterBpfOption>,
    ) -> Result<(), NetnsError> {
        let mut filter = TcMessage::with_index(self.index);
        filter.header.parent = INGRESS_QDISC.into();
        filter.header.info = u32::from(priority) << 16 | u32::from(every_protocol());
        filter.attributes = vec![
            TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
            TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()),
        ];
        match self.add_filter(filter).await {
            Err(rtnetlink::Error::NetlinkError(error))
                if is(&error, libc::ENOENT) || is(&error, libc::EOPNOTSUPP) =>
            {
                Err(NetnsError::NoClassifier {
                    source: error.to_io(),
                })
            }
            other => other.map_err(self.links.failed("filter the packets of", self.name)),
        }
    }

    async fn add_filter(&self, filter: TcMessage) -> Result<(), rtnetlink::Error> {
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(filter));
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        let mut answers = self.links.handle.clone().request(request)?;
        while let Some(answer) = answers.next().await {
            // An acknowledgement is one without a code.
            if let NetlinkPayload::Error(error) = answer.payload
                && error.code.is_some()
            {
                return Err(rtnetlink::Error::NetlinkError(error));
            }
        }
        Ok(())
    }
}

/// It travels in network byte order.
fn every_protocol() -> u16 {
    (libc::ETH_P_ALL as u16).to_be()
}

fn instructions(program: &Program) -> Vec<TcFilterBpfOption> {
    // No more than `source_check::MAX_INSTRUCTIONS`.
    let count = program.len() as u16;
    vec![
        TcFilterBpfOption::Other(DefaultNla::new(
            TCA_BPF_OPS_LEN,
            count.to_ne_bytes().to_vec(),
        )),
        TcFilterBpfOption::Other(DefaultNla::new(TCA_BPF_OPS, program.bytes())),
    ]
}

/// `action mirred egress redirect`.
fn redirect_to(link: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic = TcActionGeneric::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = link;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            mirror,
        ))]),
    ];
    action
}
