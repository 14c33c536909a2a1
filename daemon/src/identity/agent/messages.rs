//! What is said on the wire: the X.509 parts of the three APIs, with the field numbers of their
//! published definitions (`workloadapi.proto`, `brokerapi.proto`, `delegatedidentity.proto`).
//!
//! They are written down here, and not taken from a client library, for what those leave out: the
//! revocation lists that come with a response, and every identity of it but the first.

use std::{collections::HashMap, fmt};

use prost::Message;

/// Asks for all of the caller's own SVIDs (Workload API, section 5.2).
#[derive(Clone, PartialEq, Message)]
pub(super) struct X509SvidRequest {}

/// The whole of what one workload is entitled to. The Broker API answers with the same fields.
#[derive(Clone, PartialEq, Message)]
pub(super) struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) svids: Vec<X509Svid>,
    /// Revocation lists, DER, of whichever authority.
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) crl: Vec<Vec<u8>>,
    /// Bundles of other trust domains, by the trust domain's SPIFFE ID.
    #[prost(map = "string, bytes", tag = "3")]
    pub(super) federated_bundles: HashMap<String, Vec<u8>>,
}

/// One SVID with its key and its trust domain's bundle.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct X509Svid {
    #[prost(string, tag = "1")]
    pub(super) spiffe_id: String,
    /// Certificates, DER, one after another, leaf first.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) x509_svid: Vec<u8>,
    /// PKCS #8, DER.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) x509_svid_key: Vec<u8>,
    /// Certificates, DER, one after another.
    #[prost(bytes = "vec", tag = "4")]
    pub(super) bundle: Vec<u8>,
}

/// Asks for a workload's SVIDs (Broker API, section 5.2).
#[derive(Clone, PartialEq, Message)]
pub(super) struct BrokerRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) reference: Option<WorkloadReference>,
}

/// Which workload.
#[derive(Clone, PartialEq, Message)]
pub(super) struct WorkloadReference {
    #[prost(message, optional, tag = "1")]
    pub(super) reference: Option<Any>,
}

/// `google.protobuf.Any`.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Any {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
}

/// A process of this machine.
#[derive(Clone, PartialEq, Message)]
pub(super) struct ProcessReference {
    #[prost(int32, tag = "1")]
    pub(super) pid: i32,
}

/// Asks for a workload's SVIDs (SPIRE's Delegated Identity API): by selectors or by process.
#[derive(Clone, PartialEq, Message)]
pub(super) struct DelegatedRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) selectors: Vec<SelectorMessage>,
    #[prost(int32, tag = "2")]
    pub(super) pid: i32,
}

/// One of the facts by which SPIRE tells workloads apart.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SelectorMessage {
    #[prost(string, tag = "1")]
    pub(super) r#type: String,
    #[prost(string, tag = "2")]
    pub(super) value: String,
}

/// The whole of what one workload is entitled to; the bundles come by [`BundlesResponse`].
#[derive(Clone, PartialEq, Message)]
pub(super) struct DelegatedResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) x509_svids: Vec<SvidWithKey>,
    /// Trust domains whose bundles are the workload's as well.
    #[prost(string, repeated, tag = "2")]
    pub(super) federates_with: Vec<String>,
}

/// One SVID and its key, PKCS #8, DER.
#[derive(Clone, PartialEq, Message)]
#[prost(skip_debug)]
pub(super) struct SvidWithKey {
    #[prost(message, optional, tag = "1")]
    pub(super) x509_svid: Option<SvidChain>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) x509_svid_key: Vec<u8>,
}

/// One SVID: certificates, DER, leaf first.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SvidChain {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(super) cert_chain: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "2")]
    pub(super) id: Option<IdMessage>,
}

/// A SPIFFE ID in two pieces; the path begins with a slash.
#[derive(Clone, PartialEq, Message)]
pub(super) struct IdMessage {
    #[prost(string, tag = "1")]
    pub(super) trust_domain: String,
    #[prost(string, tag = "2")]
    pub(super) path: String,
}

/// Asks for the bundles of all trust domains that the agent knows.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BundlesRequest {}

/// All of them: certificates, DER, one after another, by trust domain.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BundlesResponse {
    #[prost(map = "string, bytes", tag = "1")]
    pub(super) ca_certificates: HashMap<String, Vec<u8>>,
}

// === impl Debug ===

// By hand, without the keys.

impl fmt::Debug for X509Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("X509Svid")
            .field("spiffe_id", &self.spiffe_id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for SvidWithKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SvidWithKey")
            .field("x509_svid", &self.x509_svid)
            .finish_non_exhaustive()
    }
}
