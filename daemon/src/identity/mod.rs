//! Who a workload is: SPIFFE IDs, the X.509-SVID verifier, certificate sources and their reload.
//!
//! In: certificate material from a source. Out: whole, checked TLS configurations per identity.

mod agent;
mod backoff;
mod bundle;
pub mod ca;
mod clock;
mod clock_steps;
mod clocks;
mod crypto;
mod crypto_policy;
mod describe;
mod federation;
mod files;
mod inspect;
mod key_kind;
pub mod pem_file;
mod probe;
mod reject;
mod renewal;
mod revocation;
mod server_name;
mod source;
mod spiffe_id;
mod status;
mod store;
mod svid;
mod svid_rules;
#[cfg(test)]
pub(crate) mod tests;
mod used;
mod verdict;
mod verify;

pub use agent::{Broker, BrokerPeers, DelegatedIdentity, Holder, Holders, Selector, WorkloadApi};
pub use bundle::{BundleError, TrustBundle, TrustBundles, TrustStore};
pub use ca::{CaError, EmbeddedCa};
pub use clocks::{least_skew, skew_by_alert};
pub use crypto::{ALPN, PROVABLE_ALPN, provider};
pub use crypto_policy::{
    CipherSuite, CryptoPolicy, CryptoProfile, CryptoRules, KeyExchangeGroup, KeyType,
    LARGEST_RSA_KEY, SMALLEST_RSA_KEY,
};
pub use describe::CertificateSummary;
pub use federation::{
    BundleDocument, BundleEndpoint, BundleFileError, BundleOrigin, DocumentError, EndpointError,
    EndpointProfile, EndpointStatus, EndpointUrl, Federation, KeyProblem, read_bundle,
};
pub use files::{FilesLayout, FilesSource, PathPattern, read_revocation_lists};
pub use inspect::{BrokenRule, Inspection, inspect};
pub use key_kind::KeyKind;
pub use pem_file::PemError;
pub use probe::{Presented, ProbeError, Probed, probe};
pub use reject::RejectReason;
pub use revocation::RevocationList;
pub use server_name::{server_name_for, server_name_matches};
pub use source::{CertificateSource, Denied, Material, RefusedBundle, Remark, SourceError};
pub use spiffe_id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use status::{BundleStatus, CertificateStatus, IdentityStatus, ReloadCounts, ReloadResult};
pub use store::{IdentityStore, Passed, RevocationLists, Sources};
pub use svid::{ReloadError, Svid};
pub use used::UsedCertificate;
pub use verdict::judged;
pub use verify::{SvidVerifier, Validity, Verified, peer_id, verify_chain};

pub(crate) use renewal::random_fraction;

/// Lower case hexadecimal.
fn hex<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> String {
    bytes
        .into_iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}
