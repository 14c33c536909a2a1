//! Where a trust domain publishes its bundle, and who has to be there.

use std::{fmt, path::PathBuf};

use http::Uri;
use rustls_pki_types::ServerName;

use crate::identity::{SpiffeId, TrustDomain};

/// A bundle endpoint and how its server is authenticated (SPIFFE Federation, section 5.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleEndpoint {
    /// Whose bundle it is: the document does not say.
    pub trust_domain: TrustDomain,
    /// Where it is.
    pub url: EndpointUrl,
    /// Who has to be there.
    pub profile: EndpointProfile,
}

/// How the server of an endpoint is authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndpointProfile {
    /// `https_web`: by its name in the URL, as web pages are.
    Web {
        /// PEM file of the authorities that count; none is those of the operating system.
        authorities: Option<PathBuf>,
    },
    /// `https_spiffe`: by its SPIFFE ID, with the newest bundle of that ID's trust domain.
    Spiffe {
        /// The ID.
        id: SpiffeId,
        /// File with the bundle to begin with, in PEM or as a bundle document.
        bootstrap: Option<PathBuf>,
    },
}

/// URL of a bundle endpoint: `https`, without a user (SPIFFE Federation, section 5.2.1.1).
#[derive(Clone, PartialEq, Eq)]
pub struct EndpointUrl {
    text: String,
    host: String,
    port: u16,
    path: String,
}

const HTTPS_PORT: u16 = 443;

// === impl BundleEndpoint ===

impl BundleEndpoint {
    /// Whether the server is of the trust domain whose bundle it serves.
    #[must_use]
    pub fn is_self_serving(&self) -> bool {
        matches!(&self.profile, EndpointProfile::Spiffe { id, .. }
            if *id.trust_domain() == self.trust_domain)
    }

    /// The file with the bundle to begin with.
    #[must_use]
    pub fn bootstrap(&self) -> Option<&PathBuf> {
        match &self.profile {
            EndpointProfile::Spiffe { bootstrap, .. } => bootstrap.as_ref(),
            EndpointProfile::Web { .. } => None,
        }
    }
}

// === impl EndpointProfile ===

impl EndpointProfile {
    /// Name by the standard.
    #[must_use]
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Web { .. } => "https_web",
            Self::Spiffe { .. } => "https_spiffe",
        }
    }
}

// === impl EndpointUrl ===

impl EndpointUrl {
    /// Parses a URL.
    ///
    /// # Errors
    /// What is wrong with it, and what was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            format!("`{text}` {why}; expected one as in `https://example.org/bundle.json`")
        };
        let uri: Uri = text.parse().map_err(|_| wrong("is no URL"))?;
        if uri.scheme_str() != Some("https") {
            return Err(wrong("is not an `https` URL"));
        }
        let authority = uri.authority().ok_or_else(|| wrong("names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("has a user in it"));
        }
        if text.contains('#') {
            return Err(wrong("has a fragment, which is never sent"));
        }
        let host = authority.host();
        let host = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
            .unwrap_or(host)
            .to_owned();
        ServerName::try_from(host.as_str())
            .map_err(|_| wrong("has neither a DNS name nor an address for a host"))?;
        let written = authority.as_str().len() - authority.host().len();
        let port = match authority.port_u16() {
            Some(0) => return Err(wrong("has the port 0")),
            Some(port) => port,
            None if written == 0 => HTTPS_PORT,
            None => return Err(wrong("has no port behind the colon")),
        };
        Ok(Self {
            host,
            port,
            path: uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
            text: text.to_owned(),
        })
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub(super) fn host(&self) -> &str {
        &self.host
    }

    pub(super) const fn port(&self) -> u16 {
        self.port
    }

    /// What a request asks for.
    pub(super) fn path(&self) -> &str {
        &self.path
    }

    /// The value of `Host` in a request.
    pub(super) fn host_header(&self) -> String {
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        match self.port {
            HTTPS_PORT => host,
            port => format!("{host}:{port}"),
        }
    }
}

impl fmt::Debug for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EndpointUrl({})", self.text)
    }
}

impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_host_a_port_and_a_path() {
        for (text, host, port, path, header) in [
            (
                "https://example.org",
                "example.org",
                443,
                "/",
                "example.org",
            ),
            (
                "https://example.org:8443/a/bundle.json?x=1",
                "example.org",
                8443,
                "/a/bundle.json?x=1",
                "example.org:8443",
            ),
            ("https://10.0.0.7/b", "10.0.0.7", 443, "/b", "10.0.0.7"),
            ("https://[fd00::7]:9/b", "fd00::7", 9, "/b", "[fd00::7]:9"),
        ] {
            let url = EndpointUrl::parse(text).unwrap();
            assert_eq!(url.as_str(), text);
            assert_eq!((url.host(), url.port(), url.path()), (host, port, path));
            assert_eq!(url.host_header(), header);
        }
    }

    #[test]
    fn a_url_that_the_standard_does_not_have_is_refused() {
        for (text, why) in [
            ("", "no URL"),
            ("example.org", "not an `https` URL"),
            ("http://example.org/", "not an `https` URL"),
            ("https://user@example.org/", "a user"),
            ("https://user:secret@example.org/", "a user"),
            ("https://example.org/#keys", "a fragment"),
            ("https:///bundle", "no URL"),
            ("https://exa_mple..org/", "neither a DNS name"),
            ("https://example.org:0/", "the port 0"),
            ("https://example.org:/", "no port"),
            ("https://example.org:99999/", "no"),
        ] {
            let said = EndpointUrl::parse(text).unwrap_err();
            assert!(said.contains(why), "{text}: {said}");
        }
    }
}
