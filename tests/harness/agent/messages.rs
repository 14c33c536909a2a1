//! Messages of the three APIs, by the field numbers of their published definitions. Written apart from the
//! daemon's, and with fields that it has no use for: a number that is wrong there must not be wrong here too.

use std::collections::HashMap;

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(super) struct X509SvidResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) svids: Vec<X509Svid>,
    #[prost(bytes = "vec", repeated, tag = "2")]
    pub(super) crl: Vec<Vec<u8>>,
    #[prost(map = "string, bytes", tag = "3")]
    pub(super) federated_bundles: HashMap<String, Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct X509Svid {
    #[prost(string, tag = "1")]
    pub(super) spiffe_id: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) x509_svid: Vec<u8>,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) x509_svid_key: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub(super) bundle: Vec<u8>,
    #[prost(string, tag = "5")]
    pub(super) hint: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct BrokerRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) reference: Option<WorkloadReference>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WorkloadReference {
    #[prost(message, optional, tag = "1")]
    pub(super) reference: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Any {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct WorkloadPidReference {
    #[prost(int32, tag = "1")]
    pub(super) pid: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DelegatedRequest {
    #[prost(message, repeated, tag = "1")]
    pub(super) selectors: Vec<Selector>,
    #[prost(int32, tag = "2")]
    pub(super) pid: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Selector {
    #[prost(string, tag = "1")]
    pub(super) r#type: String,
    #[prost(string, tag = "2")]
    pub(super) value: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct DelegatedResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) x509_svids: Vec<SvidWithKey>,
    #[prost(string, repeated, tag = "2")]
    pub(super) federates_with: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SvidWithKey {
    #[prost(message, optional, tag = "1")]
    pub(super) x509_svid: Option<Svid>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) x509_svid_key: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Svid {
    #[prost(bytes = "vec", repeated, tag = "1")]
    pub(super) cert_chain: Vec<Vec<u8>>,
    #[prost(message, optional, tag = "2")]
    pub(super) id: Option<SpiffeId>,
    #[prost(int64, tag = "3")]
    pub(super) expires_at: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SpiffeId {
    #[prost(string, tag = "1")]
    pub(super) trust_domain: String,
    #[prost(string, tag = "2")]
    pub(super) path: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct BundlesResponse {
    #[prost(map = "string, bytes", tag = "1")]
    pub(super) ca_certificates: HashMap<String, Vec<u8>>,
}
