//! SPIFFE IDs and trust domains, as the SPIFFE-ID standard has them.

use std::{fmt, sync::Arc};

/// Longest SPIFFE ID in bytes (SPIFFE-ID, section 2.3).
const MAX_ID_LENGTH: usize = 2048;
/// Longest trust domain name in bytes (SPIFFE-ID, section 2.1).
const MAX_TRUST_DOMAIN_LENGTH: usize = 255;
const SCHEME: &str = "spiffe://";

/// Name of a trust domain: lower case letters, digits, `.`, `-` and `_`, at most 255 bytes
/// (SPIFFE-ID, section 2.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// A SPIFFE ID of a workload: `spiffe://TRUST-DOMAIN/PATH` with a path (SPIFFE-ID, section 2).
/// Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    whole: Arc<str>,
    trust_domain: TrustDomain,
}

/// Why a text is not a SPIFFE ID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpiffeIdError {
    /// Longer than 2048 bytes.
    #[error("a SPIFFE ID has at most 2048 bytes")]
    TooLong,
    /// The scheme is missing or another.
    #[error("a SPIFFE ID starts with `spiffe://`")]
    Scheme,
    /// The trust domain is empty, too long, or has a character it may not have.
    #[error("a trust domain is 1 to 255 of `a-z`, `0-9`, `.`, `-`, `_`, without user or port")]
    TrustDomain,
    /// No path where one is needed.
    #[error("a workload's SPIFFE ID has a path, as in `spiffe://example.org/ns/shop/sa/cart`")]
    NoPath,
    /// An empty, `.` or `..` segment, or a slash at the end.
    #[error("the path has an empty, `.` or `..` segment, or ends in a slash")]
    Segment,
    /// A character that is not allowed in a path; percent-encoding, query and fragment are not.
    #[error("a path is made of `a-z`, `A-Z`, `0-9`, `.`, `-`, `_` and `/`")]
    PathCharacter,
}

// === impl TrustDomain ===

impl TrustDomain {
    /// Parses a bare trust domain name, as in `example.org`.
    ///
    /// # Errors
    /// [`SpiffeIdError::TrustDomain`] when it is empty, too long or has another character.
    pub fn parse(name: &str) -> Result<Self, SpiffeIdError> {
        let allowed =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'-' | b'_');
        if name.is_empty() || name.len() > MAX_TRUST_DOMAIN_LENGTH || !name.bytes().all(allowed) {
            return Err(SpiffeIdError::TrustDomain);
        }
        Ok(Self(name.into()))
    }

    /// The bare name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

// === impl SpiffeId ===

impl SpiffeId {
    /// Parses a workload's SPIFFE ID.
    ///
    /// # Errors
    /// The first rule that the text breaks.
    pub fn parse(text: &str) -> Result<Self, SpiffeIdError> {
        if text.len() > MAX_ID_LENGTH {
            return Err(SpiffeIdError::TooLong);
        }
        let rest = text.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (domain, path) = rest.split_once('/').ok_or(SpiffeIdError::NoPath)?;
        let trust_domain = TrustDomain::parse(domain)?;
        for segment in path.split('/') {
            if matches!(segment, "" | "." | "..") {
                return Err(SpiffeIdError::Segment);
            }
            if !segment
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
            {
                return Err(SpiffeIdError::PathCharacter);
            }
        }
        Ok(Self {
            whole: text.into(),
            trust_domain,
        })
    }

    /// The form that Istio and Kubernetes give to identities:
    /// `spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.
    ///
    /// # Errors
    /// When a name is empty or has a character that a path may not have.
    pub fn for_service_account(
        trust_domain: &TrustDomain,
        namespace: &str,
        service_account: &str,
    ) -> Result<Self, SpiffeIdError> {
        Self::parse(&format!(
            "{SCHEME}{}/ns/{namespace}/sa/{service_account}",
            trust_domain.as_str()
        ))
    }

    /// The whole ID.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.whole
    }

    /// Trust domain of the ID.
    #[must_use]
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path with its leading slash.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.whole[SCHEME.len() + self.trust_domain.0.len()..]
    }

    /// Namespace and service account, where the path is `/ns/NAMESPACE/sa/SERVICE-ACCOUNT`.
    #[must_use]
    pub fn service_account(&self) -> Option<(&str, &str)> {
        let (namespace, account) = self.path().strip_prefix("/ns/")?.split_once("/sa/")?;
        (!namespace.contains('/') && !account.contains('/')).then_some((namespace, account))
    }
}

macro_rules! text_impls {
    ($($type:ty: $parse:path;)+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.as_str()) }
        }
        impl fmt::Debug for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { f.write_str(self.as_str()) }
        }
        impl std::str::FromStr for $type {
            type Err = SpiffeIdError;
            fn from_str(text: &str) -> Result<Self, SpiffeIdError> { $parse(text) }
        }
        impl serde::Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.serialize_str(self.as_str())
            }
        }
        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                $parse(&text).map_err(serde::de::Error::custom)
            }
        }
    )+};
}

text_impls! {
    TrustDomain: TrustDomain::parse;
    SpiffeId: SpiffeId::parse;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_its_parts() {
        let id = SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap();
        assert_eq!(id.trust_domain().as_str(), "example.org");
        assert_eq!(id.path(), "/ns/shop/sa/cart");
        assert_eq!(id.service_account(), Some(("shop", "cart")));
    }

    #[test]
    fn what_breaks_a_rule_is_refused_by_its_name() {
        for (text, error) in [
            ("https://example.org/a", SpiffeIdError::Scheme),
            ("SPIFFE://example.org/a", SpiffeIdError::Scheme),
            ("spiffe://example.org", SpiffeIdError::NoPath),
            ("spiffe://example.org/", SpiffeIdError::Segment),
            ("spiffe:///a", SpiffeIdError::TrustDomain),
            ("spiffe://Example.org/a", SpiffeIdError::TrustDomain),
            ("spiffe://user@example.org/a", SpiffeIdError::TrustDomain),
            ("spiffe://example.org:80/a", SpiffeIdError::TrustDomain),
            ("spiffe://ex%61mple.org/a", SpiffeIdError::TrustDomain),
            ("spiffe://example.org/a//b", SpiffeIdError::Segment),
            ("spiffe://example.org/a/", SpiffeIdError::Segment),
            ("spiffe://example.org/./b", SpiffeIdError::Segment),
            ("spiffe://example.org/../b", SpiffeIdError::Segment),
            ("spiffe://example.org/a%20b", SpiffeIdError::PathCharacter),
            ("spiffe://example.org/a?q", SpiffeIdError::PathCharacter),
            ("spiffe://example.org/a?q=1", SpiffeIdError::PathCharacter),
            ("spiffe://example.org/a#f", SpiffeIdError::PathCharacter),
        ] {
            assert_eq!(SpiffeId::parse(text), Err(error), "{text}");
        }
        let long = format!("spiffe://example.org/{}", "a".repeat(2048));
        assert_eq!(SpiffeId::parse(&long), Err(SpiffeIdError::TooLong));
        let domain = format!("spiffe://{}/a", "a".repeat(256));
        assert_eq!(SpiffeId::parse(&domain), Err(SpiffeIdError::TrustDomain));
    }
}
