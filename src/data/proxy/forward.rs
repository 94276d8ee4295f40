//! A request up to the model that it names, and what becomes of it then.
//!
//! API keys belong before the body is read, here; aliases and the reuse of answers belong between the model and the choice
//! of a replica.

use tokio::time::Instant;

use super::{
    answer::Answer,
    call::{After, Call, GAVE_WAY, NoAnswer, body_error},
    client::{BodyWait, Transport},
    failure::Ending,
    own::respond,
    paths,
    state::Proxy,
};
use crate::{
    base::error::ProxyError,
    data::{
        affinity,
        replay::{BodyFault, Replay},
    },
    pool::table::Lookup,
    wire::{
        http1::{body::Framing, head::Known},
        scan::{ModelScanner, ScanError},
    },
};

impl<S: Transport> Call<'_, S> {
    /// Routes the request by the model that it names, and sees it to its end.
    pub(super) async fn forward(&mut self) -> After {
        match self.ask().await {
            Ok(answer) => self.pass(answer).await,
            Err(NoAnswer::Gone) => {
                self.account.client_left(!self.replay.is_over());
                After::Abort { by_reset: false }
            }
            Err(NoAnswer::Error(error)) => {
                let response = self.proxy.reject(&error, self.asked.dialect);
                self.account.answered_by_proxy(&response);
                self.account.end(Ending::Complete);
                let rest = self.replay.let_go();
                respond(self.client, &self.asked, &response, rest).await
            }
        }
    }

    /// Gets the head of an answer from a backend.
    async fn ask(&mut self) -> Result<Answer, NoAnswer> {
        let (proxy, head) = (self.proxy, self.asked.head);
        let in_query = paths::model_in_query(head.query())
            .map_err(|error| ProxyError::BadRequest { code: "invalid_request", message: error.to_string() })?;
        if matches!(head.framing, Framing::Length(length) if length > proxy.limits.max_body_bytes) {
            return Err(body_error(proxy, BodyFault::TooLarge).into());
        }
        let made = proxy.made(head.path());
        let may_name_none = made.is_some() || paths::may_name_no_model(&head.method, head.path());
        // A body may do without the model that the query names; but it has the last word, so it is held until it is clear
        // that it says nothing else.
        let key_is_optional = may_name_none || in_query.is_some();
        let mut scanner = self.scanner(in_query.is_some())?;
        if let Some(scanner) = scanner.as_mut().filter(|_| key_is_optional) {
            scanner.let_model_be_none();
        }
        self.replay.look_for(scanner, key_is_optional);
        self.read_model().await?;
        let slot = match self.replay.model().map(str::to_owned).or(in_query) {
            Some(model) => self.choose(&model, made).await?,
            None if may_name_none => self.choose_unnamed(made).await?,
            None => return Err(body_error(proxy, BodyFault::Scan(ScanError::ModelMissing)).into()),
        };
        self.send(slot).await
    }

    /// What looks for the routing key in the body, if anything does.
    fn scanner(&self, is_known: bool) -> Result<Option<ModelScanner>, ProxyError> {
        let (proxy, head) = (self.proxy, self.asked.head);
        if head.framing == Framing::Empty {
            return Ok(None);
        }
        let mut kinds = head.lines.all(Known::ContentType);
        let kind = kinds.next();
        // Bytes that nothing here can read pass only where servers take them as they are, with the model beside them.
        let takes_raw_bytes = paths::takes_raw_bytes(head.path());
        let may_be_opaque = is_known && takes_raw_bytes;
        let is_opaque = |kind: &[u8]| may_be_opaque && is_opaque(kind);
        // Lines are one list.
        let coding = head.lines.all(Known::ContentEncoding).collect::<Vec<_>>().join(&b", "[..]);
        let plain = match takes_raw_bytes {
            true => ModelScanner::for_fields,
            false => ModelScanner::for_content_type,
        };
        let scanner = |kind: Option<&[u8]>| {
            let scanner = match plain(kind) {
                Ok(scanner) if coding.is_empty() => return Ok(Some(scanner)),
                scanner => scanner.and_then(|scanner| scanner.coded(Some(&coding))),
            };
            match scanner {
                Ok(scanner) => Ok(Some(scanner)),
                // A body whose type says that it names a model, or may, must be read.
                Err(ScanError::UnsupportedCoding { .. }) if kind.is_some_and(is_opaque) => Ok(None),
                Err(error) => Err(body_error(proxy, error.into())),
            }
        };
        let mut first = scanner(kind)?;
        for other in kinds.filter(|other| Some(*other) != kind) {
            // Servers differ in which of two they believe. That does not matter where both mean the same.
            let is_same = match (&first, scanner(Some(other))?) {
                (Some(first), Some(other)) => first.reads_as(&other),
                (first, other) => first.is_some() == other.is_some(),
            };
            if !is_same || kind.is_some_and(is_opaque) != is_opaque(other) {
                let message =
                    "the request has two Content-Type headers, by which its body reads differently".to_owned();
                return Err(ProxyError::BadRequest { code: "invalid_request", message });
            }
        }
        if kind.is_some_and(is_opaque) {
            return Ok(None);
        }
        if let Some(scanner) = &mut first
            && let Some(affinity) = proxy.affinity.as_ref().filter(|_| paths::continues_prompt(head.path()))
        {
            scanner.mark_prompt(affinity.seed());
        }
        Ok(first)
    }

    /// Reads the body as far as it takes to know the model, and the prompt if that matters.
    async fn read_model(&mut self) -> Result<(), NoAnswer> {
        let Call { proxy, client, asked, replay, account, .. } = self;
        if asked.head.expects_continue() && client.unread().is_empty() && !replay.is_over() {
            client.outbox().extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
        }
        loop {
            let is_partial = client.feed(replay, false).map_err(|fault| body_error(proxy, fault))?;
            let is_known = match replay.is_scanned() {
                true => replay.model().is_some(),
                false => true,
            };
            if is_known {
                replay.has_model();
            }
            if replay.is_over() || is_known && !proxy.waits_for_prompt(replay) {
                client.expect_nothing();
                break;
            }
            if is_partial {
                std::future::poll_fn(|cx| client.poll_turn(cx)).await;
            } else {
                let began = Instant::now();
                if !is_known {
                    replay.awaits_model(began);
                }
                let came = client.more_body(replay).await?;
                account.has_waited(began.elapsed());
                if came == BodyWait::TooSlow {
                    let what = if replay.has_given_way() { GAVE_WAY } else { "the body of the request" };
                    return Err(ProxyError::RequestTimeout { what }.into());
                }
            }
        }
        if proxy.affinity.is_some()
            && let Some(model) = replay.model().map(str::to_owned)
            && let Some(prompt) = replay.end_prompt(&model)
            && let Some(session) = affinity::SESSION_HEADERS.iter().find_map(|name| asked.head.lines.named(name))
        {
            prompt.set_session(session);
        }
        Ok(())
    }
}

impl Proxy {
    /// Whether a replica is better chosen when more of the prompt has come: there is a choice.
    fn waits_for_prompt(&self, replay: &Replay) -> bool {
        let is_choice = |model: &str| matches!(self.table.snapshot().lookup(model), Lookup::Ready(route) if route.members.len() > 1);
        !replay.is_prompt_here(affinity::WAIT_BYTES_MAX) && replay.model().is_some_and(is_choice)
    }
}

/// Bytes that are neither JSON nor a form of either kind. A type that could be taken for one of them is not opaque.
fn is_opaque(content_type: &[u8]) -> bool {
    let holds = |word: &[u8]| content_type.windows(word.len()).any(|window| window.eq_ignore_ascii_case(word));
    !content_type.trim_ascii().is_empty() && ![&b"json"[..], b"form-data", b"urlencoded"].iter().any(|word| holds(word))
}
