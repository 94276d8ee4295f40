//! The life of a request: [`Proxy::serve`] reads it from its client's connection and sees it to its end.
//!
//! A request that goes to a backend is a `Call` (call.rs), which carries all that belongs to it, and its life is a line of
//! steps, one file each:
//!
//! ```text
//! forward    reads the body up to the model that the request names
//!    │
//! claim      chooses a replica and claims a slot on it, or waits in the queue of the model
//!    │
//! send ◄──┐  makes attempts; `failure` says what happens next when one fails
//!    │    │ another, before a byte of an answer has been passed on
//! attempt ┘  sends the request over one connection, until the head of an answer comes
//!    │
//! answer     passes the head on, then the body by `relay` (or both ways by `tunnel`), and settles the account
//! ```
//!
//! `own` has the answers that need no backend. One task serves a client's connection from its first byte to its last,
//! over the sockets themselves. Nothing is handed to another task, so a request that is dropped, for whatever reason,
//! ends everything that was done for it.
//!
//! This module decides nothing about backends: which of them exist and take requests is in the snapshot that it reads.

mod state;
mod site;
mod call;
mod own;
mod forward;
mod claim;
mod send;
pub mod attempt;
mod answer;
pub mod relay;
pub mod tunnel;
pub mod failure;
pub mod account;
pub mod trace;
pub mod client;
pub mod seat;
mod turn;
pub mod paths;
pub mod makers;
pub mod headers;
pub mod cors;
pub mod reuse;

use std::net::IpAddr;

use http::Method;

use self::{
    account::RequestId,
    call::{After, Asked, Call},
    client::{Client, Closing, Next, Transport},
    cors::is_preflight,
    paths::Target,
};
pub use self::{
    site::Site,
    state::{Port, Proxy},
};
use crate::{
    base::error::ProxyError,
    observe::pages,
    wire::http1::{
        body::Framing,
        head::{HeadError, RequestHead},
    },
};

impl Proxy {
    /// Serves a connection of a client at `client_ip`, of which `first` has been read already, to its end.
    pub async fn serve<S: Transport>(&self, port: Port, io: S, first: Vec<u8>, client_ip: IpAddr, closing: Closing) {
        let mut client = Client::new(io, first, self.patience, closing);
        let mut head = RequestHead::default();
        loop {
            let next = client.next(&mut head).await;
            let error = match next {
                Next::Request => {
                    match self.serve_request(port, &mut client, &head, client_ip).await {
                        After::KeepAlive => head.forget_large(),
                        After::Close => return client.close().await,
                        After::Abort { by_reset } => return client.abort(by_reset),
                    }
                    continue;
                }
                Next::End => return client.abort(false),
                Next::Nonsense(error) => {
                    tracing::debug!(client = %client_ip, %error, "the bytes of a client are no request");
                    unreadable(error)
                }
                Next::TooSlow => ProxyError::RequestTimeout { what: "the head of the request" },
            };
            self.count_refused(&error);
            own::refuse_connection(&mut client, &error, &self.cors).await;
            return client.close().await;
        }
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
        let mut client = Client::new(io, first, self.patience, closing.after_one());
        let mut head = RequestHead::default();
        let Next::Request = client.next(&mut head).await else { return client.abort(false) };
        let id = RequestId::of(&head);
        let asked = Asked::new(self, &head, &id, client_ip, true);
        own::answer(self, &mut client, &asked, &self.reject(error, asked.dialect)).await;
        client.close().await;
    }

    /// Serves one request by what its path means.
    async fn serve_request<S: Transport>(
        &self,
        port: Port,
        client: &mut Client<S>,
        head: &RequestHead,
        client_ip: IpAddr,
    ) -> After {
        let id = RequestId::of(head);
        let asked = Asked::new(self, head, &id, client_ip, client.is_for_one());
        let no_path = |message: &str| {
            let error = ProxyError::NoSuchPath { message: message.to_owned() };
            self.reject(&error, asked.dialect)
        };
        if let Some(fault) = head.host_fault() {
            let error = ProxyError::BadRequest { code: "invalid_request", message: fault.to_owned() };
            return own::answer(self, client, &asked, &self.reject(&error, asked.dialect)).await;
        }
        let is_options = head.method == Method::OPTIONS;
        let names_no_model = || paths::model_in_query(head.query()) == Ok(None);
        let preflight = || self.cors.preflight(head, asked.cross_origin);
        let target = match port {
            Port::Data => paths::classify(&head.method, head.path()),
            Port::Admin => paths::classify_page(head.path()),
        };
        let response = match target {
            // Wherever it leads: the browser asks what it may send, not what will become of that.
            _ if is_options && is_preflight(head) => preflight(),
            Target::Own(page) if self.shows(page, port) && page.answers(&head.method) => {
                return own::show_page(self, client, &asked, page).await;
            }
            Target::Control => no_path("engines' control endpoints are not reachable through this proxy"),
            _ if is_options && names_no_model() => preflight(),
            // A server that does not read the body would take it for the next request.
            Target::Forward { .. } if is_options && head.framing != Framing::Empty => preflight(),
            Target::Forward { below_v1 } => return Call::new(self, client, asked, below_v1.is_some()).forward().await,
            Target::Own(page) if self.shows(page, port) => {
                self.reject(&ProxyError::MethodNotAllowed { allow: pages::ALLOW }, asked.dialect)
            }
            Target::ModelList => own::list_models(self, &asked),
            Target::ModelObject(id) => own::show_model(self, &id, asked.dialect),
            Target::Stateful => {
                no_path("this API keeps state that no single backend could answer for; it is not served")
            }
            Target::Unknown if port == Port::Admin => {
                no_path("no such page here; here are /, /status, /metrics, /healthz and /readyz")
            }
            Target::Own(_) | Target::Unknown => {
                no_path("no such path here; the API is under /v1, GET /v1/models lists its models")
            }
        };
        own::answer(self, client, &asked, &response).await
    }
}

fn unreadable(error: HeadError) -> ProxyError {
    let message = error.to_string();
    match error {
        HeadError::TooLarge | HeadError::TooManyLines => ProxyError::HeadTooLarge { message },
        HeadError::Malformed(_) | HeadError::Ambiguous(_) | HeadError::Version => {
            ProxyError::BadRequest { code: "invalid_request", message }
        }
    }
}

#[cfg(test)]
mod tests;
