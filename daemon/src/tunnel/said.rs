//! What two reeves tell each other beside the protocol: what a connection is called, and why it was
//! refused. For logs only; nothing is decided by it, and other implementations leave it out.

use std::sync::Arc;

use http::{HeaderName, HeaderValue, Request, Response};

use super::TunnelError;
use crate::telemetry::ConnectionId;

/// Field of a request: what the client calls the connection.
pub(super) const CONNECTION: HeaderName = HeaderName::from_static("reeve-connection");
/// Field of an answer other than 200: why.
const REASON: HeaderName = HeaderName::from_static("reeve-reason");
/// Longest reason that is shown.
const LONGEST: usize = 120;

/// What the client calls the connection.
pub(super) fn id<T>(request: &Request<T>) -> Option<ConnectionId> {
    let value = request.headers().get(CONNECTION)?;
    ConnectionId::parse(value.to_str().ok()?)
}

/// Says why a connection is refused that the policy allows: of one that it does not, the status says
/// enough.
pub(super) fn say(response: &mut Response<()>, error: &TunnelError) {
    let reason = error.reason().as_str();
    let why = match error {
        TunnelError::Application(source) => format!("{reason}: {}", source.kind()),
        TunnelError::ApplicationTimeout(limit) => {
            format!("{reason}: the application did not accept the connection within {limit:?}")
        }
        TunnelError::WrongListener | TunnelError::Shutdown | TunnelError::Limit(_) => {
            reason.to_owned()
        }
        _ => return,
    };
    if let Ok(value) = HeaderValue::from_str(&why) {
        response.headers_mut().insert(REASON, value);
    }
}

/// What a peer says of why it refuses: a peer may say anything, so nothing but plain text is shown.
pub(super) fn of<T>(response: &Response<T>) -> Option<Arc<str>> {
    let value = response.headers().get(REASON)?.to_str().ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || " _:.,-()".contains(c);
    let text: String = value.chars().filter(|c| plain(*c)).take(LONGEST).collect();
    (!text.is_empty()).then(|| text.into())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn the_far_applications_refusal_is_read_where_it_was_said() {
        let mut response = Response::new(());
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        say(&mut response, &TunnelError::Application(refused.into()));
        assert_eq!(
            of(&response).as_deref(),
            Some("application_unreachable: connection refused")
        );
        let mut silent = Response::new(());
        say(&mut silent, &TunnelError::WrongAuthority);
        assert_eq!(of(&silent), None);
    }

    #[test]
    fn nothing_but_plain_text_of_a_peer_is_shown() {
        let mut response = Response::new(());
        let value = HeaderValue::from_static("a\t\"b\" <c>");
        response.headers_mut().insert(REASON, value);
        assert_eq!(of(&response).as_deref(), Some("ab c"));
    }

    #[test]
    fn a_connection_is_called_the_same_at_both_ends_or_nothing() {
        let named = |text: &str| {
            Request::builder()
                .header(CONNECTION, text)
                .body(())
                .unwrap()
        };
        let own = ConnectionId::new();
        assert_eq!(id(&named(&own.to_string())), Some(own));
        for text in [
            "",
            "12",
            "+123456789abcdef",
            "0123456789abcdefg",
            "x123456789abcdef",
        ] {
            assert_eq!(id(&named(text)), None, "{text}");
        }
    }
}
