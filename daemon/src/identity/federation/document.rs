//! SPIFFE bundle documents: a trust domain's keys as a JWK Set (SPIFFE Trust Domain and Bundle,
//! section 4; X509-SVID, section 6.2).

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rustls_pki_types::CertificateDer;
use serde::Deserialize;
use serde_json::Value;

use crate::identity::{BundleError, RejectReason, TrustBundle, TrustDomain};

/// The `use` of a key that signs X.509-SVIDs.
const X509_SVID: &str = "x509-svid";
/// Key types that there are (RFC 7518, section 6.1; RFC 8037). A key of another one is not used.
const KEY_TYPES: [&str; 3] = ["EC", "RSA", "OKP"];

/// What a bundle document says. It does not say of which trust domain it is: who fetched it knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleDocument {
    authorities: Vec<Authority>,
    /// Raised by the publisher at each change; none where it does not say.
    pub sequence: Option<u64>,
    /// How often the publisher wants to be asked; none where it does not say.
    pub refresh_hint: Option<Duration>,
    /// Keys that are not for X.509-SVIDs, and are not used.
    pub ignored: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Authority {
    /// Its place among `keys`, from 0.
    index: usize,
    certificate: CertificateDer<'static>,
}

/// What is wrong with a bundle document. It is taken whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// It is not JSON, or not an object with the members that it should have.
    #[error("the bundle document cannot be read: {0}")]
    Json(String),
    /// There are no keys. None of them revokes a trust domain, and that has to be said: `[]`.
    #[error("the bundle document has no `keys`; expected a list of JSON Web Keys")]
    NoKeys,
    /// A key for X.509-SVIDs cannot be used.
    #[error("the bundle document's `keys[{index}]` {problem}")]
    Key {
        /// Which, counted from 0.
        index: usize,
        /// What is wrong with it.
        problem: KeyProblem,
    },
}

/// What is wrong with a key for X.509-SVIDs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyProblem {
    /// It is no JSON object.
    #[error("is no JSON object")]
    NoObject,
    /// It has no `kty`, or not a text.
    #[error("has no `kty`; expected a text, as in `EC`")]
    NoKeyType,
    /// It has not exactly one certificate.
    #[error("has {0} in `x5c`; expected exactly one")]
    Certificates(String),
    /// The certificate is not base64 of DER.
    #[error("has no base64 in `x5c[0]`")]
    Base64,
    /// The certificate may not sign.
    #[error("has a certificate that is refused: {0}")]
    Certificate(RejectReason),
}

/// A document as it is written. Members that mean nothing here are left alone.
#[derive(Deserialize)]
struct Written {
    keys: Option<Vec<WrittenKey>>,
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<u64>,
}

/// Members of any type: those of keys that are not used are nobody's business.
#[derive(Deserialize)]
struct WrittenKey {
    #[serde(default)]
    kty: Value,
    #[serde(default, rename = "use")]
    usage: Value,
    #[serde(default)]
    x5c: Value,
}

// === impl BundleDocument ===

impl BundleDocument {
    /// Reads a document.
    ///
    /// # Errors
    /// The first thing in it that is wrong.
    pub fn parse(text: &[u8]) -> Result<Self, DocumentError> {
        let json = |error: serde_json::Error| DocumentError::Json(without_contents(&error));
        let written: Written = serde_json::from_slice(text).map_err(json)?;
        are_objects(&serde_json::from_slice(text).map_err(json)?)?;
        let keys = written.keys.ok_or(DocumentError::NoKeys)?;
        let mut authorities = Vec::new();
        for (index, key) in keys.iter().enumerate() {
            match key.certificate() {
                Ok(Some(certificate)) => authorities.push(Authority { index, certificate }),
                Ok(None) => {}
                Err(problem) => return Err(DocumentError::Key { index, problem }),
            }
        }
        Ok(Self {
            ignored: keys.len() - authorities.len(),
            authorities,
            sequence: written.spiffe_sequence,
            refresh_hint: written.spiffe_refresh_hint.map(Duration::from_secs),
        })
    }

    /// The bundle of the trust domain that the document is known to be of. Without a key for
    /// X.509-SVIDs it is empty, which revokes the trust domain.
    ///
    /// # Errors
    /// The first key whose certificate may not sign by the X.509-SVID standard.
    pub fn bundle(&self, trust_domain: TrustDomain) -> Result<TrustBundle, DocumentError> {
        let certificates = self.authorities.iter().map(|it| it.certificate.clone());
        TrustBundle::new(trust_domain, certificates.collect(), Vec::new()).map_err(|error| {
            match error {
                BundleError::Certificate {
                    position, reason, ..
                } => {
                    let found = position
                        .checked_sub(1)
                        .and_then(|at| self.authorities.get(at));
                    DocumentError::Key {
                        index: found.map_or(0, |authority| authority.index),
                        problem: KeyProblem::Certificate(reason),
                    }
                }
                // There are no lists in it.
                error @ BundleError::RevocationList { .. } => {
                    DocumentError::Json(error.to_string())
                }
            }
        })
    }
}

// === impl WrittenKey ===

impl WrittenKey {
    /// The certificate of a key that signs X.509-SVIDs; none of one that is to be ignored.
    fn certificate(&self) -> Result<Option<CertificateDer<'static>>, KeyProblem> {
        if self.usage.as_str() != Some(X509_SVID) {
            return Ok(None);
        }
        let kind = self.kty.as_str().ok_or(KeyProblem::NoKeyType)?;
        if !KEY_TYPES.contains(&kind) {
            return Ok(None);
        }
        let wrong = |what: String| KeyProblem::Certificates(what);
        let text = match &self.x5c {
            Value::Null => return Err(wrong("nothing".into())),
            Value::Array(all) => match &all[..] {
                [Value::String(text)] => text,
                [_] => return Err(wrong("something that is no text".into())),
                all => return Err(wrong(format!("{} certificates", all.len()))),
            },
            _ => return Err(wrong("something that is no list".into())),
        };
        let der = STANDARD.decode(text).map_err(|_| KeyProblem::Base64)?;
        Ok(Some(der.into()))
    }
}

/// A parser's error without the text that it found: a file may be another than it should be, and
/// hold a key.
fn without_contents(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let found = ["invalid type: string ", "invalid value: string "];
    match found.iter().find(|start| text.starts_with(**start)) {
        // What was expected comes last, behind the text that was found.
        Some(start) => match text.rsplit_once(", expected ") {
            Some((_, expected)) => format!("{}, expected {expected}", start.trim_end()),
            None => start.trim_end().to_owned(),
        },
        None => text,
    }
}

/// Lists are no objects, though serde reads either.
fn are_objects(document: &Value) -> Result<(), DocumentError> {
    let members = document
        .as_object()
        .ok_or_else(|| DocumentError::Json("it is no object".to_owned()))?;
    let keys = members.get("keys").and_then(Value::as_array);
    match keys.into_iter().flatten().position(|key| !key.is_object()) {
        Some(index) => Err(DocumentError::Key {
            index,
            problem: KeyProblem::NoObject,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::identity::tests::certs::Authority as Root;

    fn domain() -> TrustDomain {
        TrustDomain::parse("other.example").unwrap()
    }

    fn key(der: &[u8]) -> Value {
        json!({"kty": "EC", "use": "x509-svid", "x5c": [STANDARD.encode(der)]})
    }

    fn parse(document: &Value) -> Result<BundleDocument, DocumentError> {
        BundleDocument::parse(document.to_string().as_bytes())
    }

    fn refusal(document: &Value) -> String {
        let read = parse(document).and_then(|read| read.bundle(domain()));
        read.unwrap_err().to_string()
    }

    #[test]
    fn keys_for_x509_svids_are_used_and_all_others_left_alone() {
        let (one, two) = (Root::root("other.example"), Root::root("other.example"));
        let read = parse(&json!({
            "keys": [
                {"kty": "EC", "use": "jwt-svid", "kid": "a", "x": 7},
                key(&one.certificate()),
                {"kty": "EC", "x5c": "nothing to us without a use"},
                {"kty": "PQ-9", "use": "x509-svid"},
                {"kty": "EC", "use": "X509-SVID"},
                key(&two.certificate()),
            ],
            "spiffe_sequence": u64::MAX,
            "spiffe_refresh_hint": 300,
            "something_else": {"keys": []},
        }));
        let read = read.unwrap();
        assert_eq!(read.ignored, 4);
        assert_eq!(read.sequence, Some(u64::MAX));
        assert_eq!(read.refresh_hint, Some(Duration::from_secs(300)));
        let bundle = read.bundle(domain()).unwrap();
        assert_eq!(
            bundle.certificates(),
            [one.certificate(), two.certificate()]
        );
        assert_eq!(bundle.trust_domain(), &domain());
    }

    #[test]
    fn no_key_at_all_revokes_the_trust_domain_and_has_to_be_said() {
        let read = parse(&json!({"keys": []})).unwrap();
        assert_eq!((read.sequence, read.refresh_hint), (None, None));
        assert!(read.bundle(domain()).unwrap().is_empty());
        assert_eq!(parse(&json!({})), Err(DocumentError::NoKeys));
        assert_eq!(parse(&json!({"keys": null})), Err(DocumentError::NoKeys));
    }

    #[test]
    fn what_is_wrong_names_its_key() {
        let root = Root::root("other.example");
        let good = key(&root.certificate());
        let leaf = root.leaf("spiffe://other.example/ns/default/sa/web").chain[0].clone();
        let der = STANDARD.encode(root.certificate());
        let with = |x5c: Value| json!({"kty": "EC", "use": "x509-svid", "x5c": x5c});
        for (bad, why) in [
            (json!({"use": "x509-svid"}), "has no `kty`"),
            (json!({"kty": "EC", "use": "x509-svid"}), "has nothing in"),
            (with(json!([])), "has 0 certificates in"),
            (with(json!([der, der])), "has 2 certificates in"),
            (with(json!([7])), "no text in"),
            (with(json!(der)), "no list in"),
            (with(json!(["-_-_"])), "has no base64 in"),
            (with(json!(["AAAA"])), "cannot be parsed"),
            (key(&leaf), "is not a CA's"),
        ] {
            let ignored = json!({"kty": "EC", "use": "jwt-svid"});
            let said = refusal(&json!({"keys": [ignored, good, bad]}));
            assert!(
                said.contains("`keys[2]`") && said.contains(why),
                "{why}: {said}"
            );
        }
    }

    #[test]
    fn what_is_no_document_is_refused() {
        let good = "{\"keys\":[]}";
        for (text, why) in [
            ("", "EOF"),
            ("[]", "invalid"),
            ("[[],null,null]", "no object"),
            (
                "{\"keys\":[[\"EC\",\"x509-svid\",[]]]}",
                "`keys[0]` is no JSON object",
            ),
            ("{\"keys\":{}}", "expected a sequence"),
            (
                "{\"keys\":\"MIGHAg, expected\"}",
                "cannot be read: invalid type: string, expected a sequence",
            ),
            ("{\"keys\":[7]}", "invalid type"),
            ("{\"keys\":[],\"keys\":[]}", "duplicate field `keys`"),
            (
                "{\"keys\":[{\"x5c\":[],\"x5c\":[]}]}",
                "duplicate field `x5c`",
            ),
            ("{\"keys\":[],\"spiffe_sequence\":-1}", "expected u64"),
            ("{\"keys\":[],\"spiffe_refresh_hint\":1.5}", "expected u64"),
            (&format!("{good}{good}"), "trailing"),
        ] {
            let read = BundleDocument::parse(text.as_bytes());
            let said = read.expect_err(text);
            assert!(said.to_string().contains(why), "{text}: {said}");
        }
        assert!(BundleDocument::parse(b"{\"keys\":[\"\xff\"]}").is_err());
    }
}
