//! The headers that the proxy looks at, recognised by their names.

/// Headers that the proxy looks at; recognised once, while a head is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each is the header of the same name")]
pub enum Known {
    AllowOrigin,
    AnthropicVersion,
    Connection,
    ContentEncoding,
    ContentLength,
    ContentType,
    Cookie,
    Date,
    Expect,
    Host,
    KeepAlive,
    Origin,
    ProxyConnection,
    RetryAfter,
    Te,
    TraceParent,
    TraceState,
    TransferEncoding,
    Upgrade,
    XAccelBuffering,
    XForwardedFor,
    XForwardedHost,
    XForwardedProto,
    XRequestId,
    /// Any other one.
    Other,
}

impl Known {
    /// The header of this name, in any case.
    pub(super) fn of(name: &[u8]) -> Known {
        // The length leaves at most four names to compare with.
        match name.len() {
            2 => one_of(name, [(b"te", Known::Te)]),
            4 => one_of(name, [(b"date", Known::Date), (b"host", Known::Host)]),
            6 => one_of(name, [(b"expect", Known::Expect), (b"origin", Known::Origin), (b"cookie", Known::Cookie)]),
            7 => one_of(name, [(b"upgrade", Known::Upgrade)]),
            10 => one_of(
                name,
                [
                    (b"connection", Known::Connection),
                    (b"keep-alive", Known::KeepAlive),
                    (b"tracestate", Known::TraceState),
                ],
            ),
            11 => one_of(name, [(b"retry-after", Known::RetryAfter), (b"traceparent", Known::TraceParent)]),
            12 => one_of(name, [(b"content-type", Known::ContentType), (b"x-request-id", Known::XRequestId)]),
            14 => one_of(name, [(b"content-length", Known::ContentLength)]),
            15 => one_of(name, [(b"x-forwarded-for", Known::XForwardedFor)]),
            16 => one_of(
                name,
                [
                    (b"content-encoding", Known::ContentEncoding),
                    (b"x-forwarded-host", Known::XForwardedHost),
                    (b"proxy-connection", Known::ProxyConnection),
                ],
            ),
            17 => one_of(
                name,
                [
                    (b"transfer-encoding", Known::TransferEncoding),
                    (b"x-forwarded-proto", Known::XForwardedProto),
                    (b"anthropic-version", Known::AnthropicVersion),
                    (b"x-accel-buffering", Known::XAccelBuffering),
                ],
            ),
            27 => one_of(name, [(b"access-control-allow-origin", Known::AllowOrigin)]),
            _ => Known::Other,
        }
    }

    /// Belongs to one connection (RFC 9110, 7.6.1), as does what `Connection` names. `Trailer` does not.
    pub fn is_hop_by_hop(self) -> bool {
        matches!(
            self,
            Known::Connection
                | Known::KeepAlive
                | Known::ProxyConnection
                | Known::Te
                | Known::TransferEncoding
                | Known::Upgrade
        )
    }

    /// Says where the body ends, how it is to be read, or on whose behalf: never ends at a connection.
    pub(super) fn is_for_every_reader(self) -> bool {
        matches!(
            self,
            Known::ContentEncoding
                | Known::ContentLength
                | Known::ContentType
                | Known::Host
                | Known::XForwardedFor
                | Known::XForwardedHost
                | Known::XForwardedProto
                | Known::XRequestId
        )
    }
}

/// Which of the candidates a name is, in any case.
fn one_of<const LENGTH: usize, const COUNT: usize>(name: &[u8], candidates: [(&[u8; LENGTH], Known); COUNT]) -> Known {
    let Ok(name) = <&[u8; LENGTH]>::try_from(name) else { return Known::Other };
    for (candidate, known) in candidates {
        // The cases of a letter differ in this bit. No character that a name may hold differs from `-` in it alone.
        let differences = std::iter::zip(name, candidate).fold(0, |all, (byte, known)| all | ((byte | 0x20) ^ known));
        if differences == 0 {
            return known;
        }
    }
    Known::Other
}
