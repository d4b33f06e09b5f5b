//! Links, addresses and routes by rtnetlink(7).

use super::Lease;
use crate::error::{AgentError, Result};
use futures_util::TryStreamExt;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::{Handle, LinkUnspec, RouteMessageBuilder};
use std::io::Error;
use std::net::Ipv4Addr;

pub struct Links(Handle);

impl Links {
    /// Opens the socket; its reader runs in the background until the handle is dropped.
    pub fn open() -> Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().map_err(AgentError::system("opening a netlink socket"))?;
        tokio::spawn(connection);
        Ok(Self(handle))
    }

    async fn index_and_mac(&self, name: &str) -> Result<(u32, Vec<u8>)> {
        let failed = |e: rtnetlink::Error| AgentError::system(format!("looking up {name}"))(Error::other(e));
        let mut found = self.0.link().get().match_name(name.to_owned()).execute();
        let message = found.try_next().await.map_err(failed)?;
        let message = message.ok_or(AgentError::NoInterface)?;
        let mac = message.attributes.iter().find_map(|a| match a {
            LinkAttribute::Address(mac) => Some(mac.clone()),
            _ => None,
        });
        Ok((message.header.index, mac.unwrap_or_default()))
    }

    /// Sets the link up; gives its hardware address.
    pub async fn up(&self, name: &str) -> Result<Vec<u8>> {
        let (index, mac) = self.index_and_mac(name).await?;
        let change = self.0.link().set(LinkUnspec::new_with_index(index).up().build()).execute().await;
        change.map_err(|e| AgentError::system(format!("setting {name} up"))(Error::other(e)))?;
        Ok(mac)
    }

    /// Address and default route of a lease, in place of what was there.
    pub async fn configure(&self, lease: &Lease) -> Result<()> {
        let name = &lease.interface;
        let (index, _) = self.index_and_mac(name).await?;
        let failed = |what: String| move |e: rtnetlink::Error| AgentError::system(what)(Error::other(e));
        let address = self.0.address().add(index, lease.address.into(), lease.prefix).replace().execute().await;
        address.map_err(failed(format!("giving {name} the address {}/{}", lease.address, lease.prefix)))?;
        if let Some(router) = lease.router {
            let route = RouteMessageBuilder::<Ipv4Addr>::new().gateway(router).output_interface(index).build();
            let added = self.0.route().add(route).replace().execute().await;
            added.map_err(failed(format!("setting the default route by {router}")))?;
        }
        Ok(())
    }
}
