//! The status page: one file, held by the binary, under a policy that lets nothing else in.

use std::sync::OnceLock;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderValue, Response, header};
use ring::digest::{SHA256, digest};

/// The page, with its style and its script.
const HTML: &str = include_str!("status.html");

/// The page with the headers that guard it.
pub(super) fn page() -> Response<Bytes> {
    static POLICY: OnceLock<HeaderValue> = OnceLock::new();
    let policy = POLICY.get_or_init(|| {
        let policy = policy(HTML);
        // Hashes and fixed words are ASCII; if they were not, nothing is allowed.
        HeaderValue::try_from(policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'"))
    });
    let mut response = Response::new(Bytes::from_static(HTML.as_bytes()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(header::CONTENT_SECURITY_POLICY, policy.clone());
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

/// Content Security Policy (<https://www.w3.org/TR/CSP3/>): what runs is what stands in `html`, known by its hash; it may
/// talk to where it came from; text never becomes markup (trusted types).
fn policy(html: &str) -> String {
    let hash = |tag: &str| {
        let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
        let inner = html.split_once(&open).and_then(|(_, rest)| rest.split_once(&close)).map_or("", |(inner, _)| inner);
        STANDARD.encode(digest(&SHA256, inner.as_bytes()))
    };
    format!(
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; img-src data:; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'",
        hash("script"),
        hash("style")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::kinds::{ContainerState, Named as _};

    #[test]
    fn the_policy_knows_the_page_by_its_hashes() {
        let policy = policy("<style>a{}</style><script>alert(1)</script>");
        // printf 'alert(1)' | openssl dgst -sha256 -binary | base64
        assert!(policy.contains("script-src 'sha256-bhHHL3z2vDgxUt0W3dWQOrprscmda2Y5pLsLg4GF+pI='"), "{policy}");
        assert!(policy.starts_with("default-src 'none'; ") && !policy.contains("unsafe"), "{policy}");
    }

    #[test]
    fn the_page_knows_every_state_of_a_container() {
        let ranks = HTML.lines().find(|line| line.contains("const rank = {")).unwrap();
        // A container that has ended is not shown.
        for state in ContainerState::ALL.iter().filter(|state| **state != ContainerState::Gone) {
            assert!(ranks.contains(&format!(" {}: ", state.word())), "{} is missing in: {ranks}", state.word());
        }
        assert_eq!(ranks.matches(": ").count(), ContainerState::ALL.len() - 1, "a state that there is not: {ranks}");
    }

    #[test]
    fn the_page_is_one_file_that_takes_no_text_for_markup() {
        for once in ["<style>", "</style>", "<script>", "</script>"] {
            assert_eq!(HTML.matches(once).count(), 1, "{once}");
        }
        let html = HTML.replace("http://www.w3.org/2000/svg", "");
        for never in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "style=\"",
            "onclick",
            "http://",
            "@import",
        ] {
            assert!(!html.contains(never), "{never}");
        }
        let links: Vec<&str> = HTML.match_indices("https://").map(|(at, _)| &HTML[at..at + 30]).collect();
        assert!(links.is_empty(), "{links:?}");
        assert!(HTML.len() < 64 * 1024, "{} bytes", HTML.len());
    }
}
