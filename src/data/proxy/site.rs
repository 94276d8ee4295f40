//! What one port serves. The same engine answers on all ports, so no port can have answers of another kind.

use std::{net::IpAddr, sync::Arc};

use super::{
    client::{Closing, Patience, Transport},
    state::{Port, Proxy},
};
use crate::{base::error::ProxyError, telemetry::metrics::Metrics};

/// A port with what answers on it.
#[derive(Debug, Clone)]
pub struct Site {
    proxy: Arc<Proxy>,
    port: Port,
}

impl Site {
    /// `proxy`, on this port.
    pub fn new(proxy: Arc<Proxy>, port: Port) -> Site {
        Site { proxy, port }
    }

    /// Serves a connection of a client at `client_ip`, of which `first` has been read already, to its end.
    pub async fn serve<S: Transport>(&self, io: S, first: Vec<u8>, client_ip: IpAddr, closing: Closing) {
        self.proxy.serve(self.port, io, first, client_ip, closing).await;
    }

    /// Answers the request in `first` with this error, and ends the connection.
    pub async fn refuse<S: Transport>(
        &self,
        io: S,
        first: Vec<u8>,
        client_ip: IpAddr,
        closing: Closing,
        error: &ProxyError,
    ) {
        self.proxy.refuse(io, first, client_ip, closing, error).await;
    }

    /// How long connections wait for their clients.
    pub fn patience(&self) -> Patience {
        self.proxy.patience
    }

    /// Where connections are counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.proxy.metrics
    }
}
