//! A backend's answer on its way to the client: its head goes out, its body passes, and the account is settled.

use std::time::Duration;

use http::{Method, StatusCode};
use tokio::time::{Instant, timeout};

use super::{
    account::Learner,
    attempt::Attempt,
    call::{After, Asked, Call},
    client::Transport,
    failure::{Ending, Failure, Left, Lesson, Stage, judge},
    headers::{self, Delivery, Persistence, ToClient},
    own::discard,
    paths,
    relay::{Cut, Relay, Relayed, Watch as _},
    reuse,
    state::Proxy,
    tunnel,
};
use crate::{
    base::error::ProxyError,
    pool::backend::InFlight,
    wire::{
        http1::{
            body::{Framing, push_chunk},
            head::{Known, ResponseHead},
        },
        scan::{AnswerKind, IdReader},
    },
};

/// How long the error event of a broken stream may take to reach its client.
const LAST_WORDS_TIME: Duration = Duration::from_secs(1);
/// A request whose answer passes can do nothing but end.
const NOTHING_LEFT: Left =
    Left { can_replay: false, can_relieve: false, may_go_elsewhere: false, may_await_news: false };

/// A backend's answer, of which the head has come, with all that depends on it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) head: ResponseHead,
    pub(super) attempt: Attempt,
    pub(super) in_flight: InFlight,
}

/// How an answer is told to its client.
struct Form {
    framing: Framing,
    delivery: Delivery,
    connection: Persistence,
    has_body: bool,
    /// It goes on with another protocol.
    is_upgraded: bool,
    /// An event can be added to it when it is cut.
    can_add_events: bool,
    /// Its connection to the backend can carry another request, as far as the heads tell.
    is_reusable: bool,
}

impl<S: Transport> Call<'_, S> {
    /// Passes an answer on to the client, to its end.
    pub(super) async fn pass(&mut self, answer: Answer) -> After {
        let Answer { head, mut attempt, mut in_flight } = answer;
        attempt.forget_sent(&mut self.replay);
        self.account.status = head.status.as_u16();
        self.account.trace.answered(self.account.status, head.is_event_stream());
        let form = Form::of(&self.asked, &head, &attempt);
        let own_address = &in_flight.backend().own_address;
        let to = ToClient { framing: form.delivery, common: self.asked.common(form.connection), own_address };
        headers::push_response(self.client.outbox(), &head, &to);
        let (kind, learner) = match head.status.is_success() && form.has_body {
            true => listeners(self.proxy, &self.asked, &head, &in_flight),
            false => {
                in_flight.says_nothing_of_pace();
                (None, None)
            }
        };
        self.account.is_answered(in_flight, kind, learner);
        drop(head);
        let mut relay = Relay::new(form.framing, form.delivery, self.proxy.idle_timeout);
        let relayed = match form.is_upgraded {
            true => tunnel::run(self.client, &mut attempt, &mut self.account, self.proxy.idle_timeout).await,
            false => relay.run(self.client, &mut attempt, &mut self.replay, &mut self.account).await,
        };
        self.account.request_bytes = Some(self.replay.seen_bytes());
        match relayed {
            Relayed::Complete => {
                // The connection first: the request that waits for the slot may want it.
                if form.is_reusable && relay.is_clean() && attempt.is_sent(&self.replay) {
                    attempt.lease.give_back(Instant::now());
                } else {
                    drop(attempt);
                }
                self.account.has_answer();
                self.deliver(&form).await
            }
            Relayed::Gone => {
                drop(attempt);
                self.account.has_answer();
                self.account.end(Ending::ClientGone);
                After::Abort { by_reset: false }
            }
            Relayed::Cut(why) => {
                drop(attempt);
                self.cut(why, &form).await
            }
        }
    }

    /// Sends what the client has not taken of an answer that has come whole, and closes the account.
    async fn deliver(&mut self, form: &Form) -> After {
        let Call { client, account, replay, .. } = self;
        let is_taken = form.is_upgraded || client.deliver(|is_all| account.passed(is_all)).await.is_ok();
        account.end(if is_taken { Ending::Complete } else { Ending::ClientGone });
        match form.connection {
            _ if !is_taken => After::Abort { by_reset: false },
            Persistence::Upgrade => After::Abort { by_reset: false },
            Persistence::Close => After::Close,
            Persistence::Unsaid | Persistence::KeepAlive => discard(client, replay.let_go()).await,
        }
    }

    /// Ends an answer that was cut, so that the client can see that it is not whole.
    async fn cut(&mut self, why: Cut, form: &Form) -> After {
        let account = &mut self.account;
        let failure = Failure::from(why);
        let (_, lesson) = judge(failure, Stage::Answered, NOTHING_LEFT);
        let is_clients = failure == Failure::ClientBroke;
        let event = (form.can_add_events && !is_clients).then(|| {
            let backend = account.container().unwrap_or_default().to_owned();
            let error = ProxyError::BrokenOff { backend, why: why.to_string() };
            error.stream_event(self.asked.dialect, self.asked.head.path())
        });
        tracing::warn!(
            container = account.container(), model = account.model_id(), request_id = account.request_id(),
            trace_id = account.trace.id(), %why,
            "answer cut"
        );
        self.proxy.metrics.cuts.increment(failure.cut_reason());
        // Both sides of a tunnel may have nothing to say.
        let trouble = failure.trouble(Stage::Answered).filter(|_| lesson == Lesson::Failure && !form.is_upgraded);
        if let Some((mut in_flight, trouble)) = account.has_answer().zip(trouble) {
            in_flight.failed(trouble, Instant::now());
        }
        account.end(if is_clients { Ending::ClientBroke } else { Ending::BackendBroke });
        if let Some(event) = event {
            match form.delivery {
                Delivery::Chunked => push_chunk(self.client.outbox(), &event),
                Delivery::AsIs | Delivery::UntilClose => self.client.outbox().extend_from_slice(&event),
            }
        }
        // What has come is sent; a client that does not take it now will not be told any better later.
        let _ = timeout(LAST_WORDS_TIME, self.client.flush()).await;
        After::Abort { by_reset: form.delivery == Delivery::UntilClose }
    }
}

// === impl Form ===

impl Form {
    fn of(asked: &Asked<'_>, head: &ResponseHead, attempt: &Attempt) -> Form {
        let is_upgraded = head.status == StatusCode::SWITCHING_PROTOCOLS;
        let has_body = asked.head.method != Method::HEAD
            && !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            && !is_upgraded;
        let framing = if has_body { head.framing } else { Framing::Empty };
        let delivery = Delivery::of(framing, asked.head.version);
        Form {
            framing,
            delivery,
            connection: match is_upgraded {
                true => Persistence::Upgrade,
                false => asked.persistence(delivery == Delivery::UntilClose),
            },
            is_upgraded,
            has_body,
            // Only where the end is not announced and the bytes are not compressed.
            can_add_events: delivery != Delivery::AsIs
                && head.is_event_stream()
                && !head.lines.has(Known::ContentEncoding),
            is_reusable: reuse::is_certain(asked.head, head) && !attempt.leaves_doubt(),
        }
    }
}

/// What reads the answer with this head while it passes: in which form it tells of itself, and what its id is learnt by.
fn listeners<'r>(
    proxy: &'r Proxy,
    asked: &Asked<'r>,
    head: &ResponseHead,
    in_flight: &InFlight,
) -> (Option<AnswerKind>, Option<Learner<'r>>) {
    let content_type = head.lines.first(Known::ContentType).unwrap_or_default();
    let coding = head.lines.first(Known::ContentEncoding);
    let kind = if proxy.usage_metrics { AnswerKind::of(content_type, coding.is_some()) } else { None };
    if !paths::makes(&asked.head.method, asked.head.path()) {
        return (kind, None);
    }
    let reader = match kind {
        // The tap sees the id as well.
        Some(AnswerKind::Json) => None,
        _ => match IdReader::for_answer(content_type, coding.unwrap_or_default()) {
            Some(reader) => Some(Box::new(reader)),
            None => return (kind, None),
        },
    };
    let (path, member) = (asked.head.path(), in_flight.member().clone());
    (kind, Some(Learner { makers: &proxy.makers, path, member, reader }))
}
