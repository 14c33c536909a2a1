//! The negative corpus: one certificate for each rule of the X.509-SVID standard that can be broken.

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

use super::{Authority, Issued, expire, leaf_params, uri};

macro_rules! flaws {
    ($($(#[doc = $doc:literal])+ $variant:ident => $reason:literal,)+) => {
        /// A way in which a certificate can be wrong, whoever presents it, while the trust bundle
        /// is right.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Flaw { $($(#[doc = $doc])+ $variant,)+ }

        impl Flaw {
            /// Every flaw.
            pub const ALL: &'static [Flaw] = &[$(Flaw::$variant,)+];

            /// What reeve calls the reason for its refusal.
            pub fn reason(self) -> &'static str {
                match self { $(Flaw::$variant => $reason,)+ }
            }
        }
    };
}

flaws! {
    /// No alternative name at all.
    NoName => "no_uri_san",
    /// A DNS name and no URI.
    OnlyDnsName => "no_uri_san",
    /// Two SPIFFE IDs, the right one first.
    TwoUrisRightFirst => "several_uri_sans",
    /// Two URIs, the right ID last.
    TwoUrisRightLast => "several_uri_sans",
    /// Another scheme.
    OtherScheme => "invalid_spiffe_id",
    /// A query.
    Query => "invalid_spiffe_id",
    /// A fragment.
    Fragment => "invalid_spiffe_id",
    /// Percent-encoding.
    Percent => "invalid_spiffe_id",
    /// Upper case in the trust domain.
    UpperCaseDomain => "invalid_spiffe_id",
    /// Upper case in the scheme.
    UpperCaseScheme => "invalid_spiffe_id",
    /// A user before the trust domain.
    User => "invalid_spiffe_id",
    /// A port after the trust domain.
    Port => "invalid_spiffe_id",
    /// An empty segment.
    EmptySegment => "invalid_spiffe_id",
    /// A `..` segment.
    DotSegment => "invalid_spiffe_id",
    /// A `.` segment.
    SingleDotSegment => "invalid_spiffe_id",
    /// A character that a path may not have.
    OtherCharacter => "invalid_spiffe_id",
    /// A trust domain of more than 255 bytes.
    LongTrustDomain => "invalid_spiffe_id",
    /// Nothing at all as the trust domain.
    NoTrustDomain => "invalid_spiffe_id",
    /// A slash at the end.
    TrailingSlash => "invalid_spiffe_id",
    /// More than 2048 bytes.
    LongId => "invalid_spiffe_id",
    /// A URI that is not text.
    NotText => "invalid_spiffe_id",
    /// A trust domain's ID.
    NoPath => "id_without_path",
    /// cA is true.
    LeafIsCa => "leaf_is_ca",
    /// KeyUsage missing.
    NoKeyUsage => "leaf_key_usage",
    /// KeyUsage without digitalSignature.
    NoDigitalSignature => "leaf_key_usage",
    /// KeyUsage with keyCertSign.
    KeyCertSign => "leaf_may_sign",
    /// KeyUsage with cRLSign.
    CrlSign => "leaf_may_sign",
    /// ExtendedKeyUsage with clientAuth only.
    ClientOnly => "extended_key_usage",
    /// ExtendedKeyUsage with serverAuth only.
    ServerOnly => "extended_key_usage",
    /// ExtendedKeyUsage with neither.
    OtherPurpose => "extended_key_usage",
    /// ExtendedKeyUsage with any purpose, which names neither.
    AnyPurpose => "extended_key_usage",
    /// ExtendedKeyUsage with no purpose.
    EmptyPurposes => "extended_key_usage",
    /// An extension that nobody knows, and that must be known.
    UnknownCritical => "malformed",
    /// Over before it begins.
    BackwardsValidity => "expired",
    /// Expired.
    Expired => "expired",
    /// Not yet valid.
    NotYetValid => "not_yet_valid",
    /// Signed by a CA that is in no bundle.
    Unknown => "untrusted_chain",
    /// Signed by itself.
    SelfSigned => "untrusted_chain",
    /// A signature that does not fit.
    Tampered => "bad_signature",
    /// A byte behind the certificate.
    Trailing => "malformed",
    /// An extension twice.
    TwiceKeyUsage => "malformed",
    /// The intermediate is not presented.
    MissingIntermediate => "untrusted_chain",
    /// The intermediate is no CA.
    IntermediateNotCa => "signer_not_ca",
    /// The intermediate has no BasicConstraints.
    IntermediateNoBasicConstraints => "signer_not_ca",
    /// The intermediate has no KeyUsage.
    IntermediateNoKeyUsage => "signer_key_usage",
    /// The intermediate may sign revocation lists only.
    IntermediateNoKeyCertSign => "signer_key_usage",
    /// The intermediate has a workload's SPIFFE ID.
    IntermediateIdHasPath => "signer_id_has_path",
    /// The intermediate is for servers only.
    IntermediateServerOnly => "extended_key_usage",
    /// The intermediate has expired.
    IntermediateExpired => "expired",
    /// The intermediate is below one that allows none below itself.
    PathTooLong => "path_length",
    /// Another workload's certificate has signed.
    SignedByWorkload => "signer_not_ca",
}

impl Flaw {
    /// A certificate for `spiffe_id`, signed by `root` as far as the flaw lets it be.
    pub fn issue(self, root: &Authority, spiffe_id: &str) -> Issued {
        let with_uri = |uri: &str| root.leaf(uri);
        let with = |change: fn(&mut CertificateParams)| root.leaf_with(spiffe_id, change);
        let under = |change: fn(&mut CertificateParams)| root.intermediate(change).leaf(spiffe_id);
        let rest = spiffe_id.trim_start_matches("spiffe://");
        match self {
            Self::NoName => with(|params| params.subject_alt_names.clear()),
            Self::OnlyDnsName => with(|params| {
                params.subject_alt_names = vec![SanType::DnsName("a.example".try_into().unwrap())];
            }),
            Self::TwoUrisRightFirst => with(|params| {
                params
                    .subject_alt_names
                    .push(uri("spiffe://example.org/other"));
            }),
            Self::TwoUrisRightLast => with(|params| {
                params
                    .subject_alt_names
                    .insert(0, uri("https://example.org/other"));
            }),
            Self::OtherScheme => with_uri(&format!("https://{rest}")),
            Self::Query => with_uri(&format!("{spiffe_id}?a=b")),
            Self::Fragment => with_uri(&format!("{spiffe_id}#a")),
            Self::Percent => with_uri(&format!("{spiffe_id}%61")),
            Self::UpperCaseDomain => with_uri(&spiffe_id.replace("spiffe://e", "spiffe://E")),
            Self::UpperCaseScheme => with_uri(&format!("SPIFFE://{rest}")),
            Self::User => with_uri(&format!("spiffe://user@{rest}")),
            Self::Port => with_uri(&format!("spiffe://{}", rest.replacen('/', ":80/", 1))),
            Self::EmptySegment => with_uri(&format!("spiffe://{}", rest.replacen('/', "//", 1))),
            Self::DotSegment => with_uri(&format!("{spiffe_id}/../other")),
            Self::SingleDotSegment => with_uri(&format!("{spiffe_id}/./other")),
            Self::OtherCharacter => with_uri(&format!("{spiffe_id}!")),
            Self::LongTrustDomain => with_uri(&format!("spiffe://{}{rest}", "a.".repeat(128))),
            Self::NoTrustDomain => with_uri("spiffe:///ns/default/sa/client"),
            Self::TrailingSlash => with_uri(&format!("{spiffe_id}/")),
            Self::LongId => with_uri(&format!("{spiffe_id}/{}", "a".repeat(2048))),
            Self::NotText => with(|params| {
                params.subject_alt_names.clear();
                // SEQUENCE { [6] "spiffe://example.org/" 0xff }
                let uri = [b"spiffe://example.org/".as_slice(), &[0xff]].concat();
                let mut san = vec![0x30, 24, 0x86, 22];
                san.extend_from_slice(&uri);
                let san = CustomExtension::from_oid_content(&[2, 5, 29, 17], san);
                params.custom_extensions.push(san);
            }),
            Self::NoPath => with_uri(&format!("spiffe://{}", rest.split('/').next().unwrap())),
            Self::LeafIsCa => with(|params| {
                params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            }),
            Self::NoKeyUsage => with(|params| params.key_usages.clear()),
            Self::NoDigitalSignature => with(|params| {
                params.key_usages = vec![KeyUsagePurpose::KeyAgreement];
            }),
            Self::KeyCertSign => with(|params| {
                params.key_usages.push(KeyUsagePurpose::KeyCertSign);
            }),
            Self::CrlSign => with(|params| params.key_usages.push(KeyUsagePurpose::CrlSign)),
            Self::ClientOnly => with(|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
            }),
            Self::ServerOnly => with(|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }),
            Self::OtherPurpose => with(|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
            }),
            Self::AnyPurpose => with(|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::Any];
            }),
            Self::EmptyPurposes => with(|params| {
                params.extended_key_usages.clear();
                // SEQUENCE {}
                let empty = CustomExtension::from_oid_content(&[2, 5, 29, 37], vec![0x30, 0]);
                params.custom_extensions.push(empty);
            }),
            Self::UnknownCritical => with(|params| {
                // NULL, under an arc that is for examples.
                let oid = [2, 999, 1];
                let mut unknown = CustomExtension::from_oid_content(&oid, vec![5, 0]);
                unknown.set_criticality(true);
                params.custom_extensions.push(unknown);
            }),
            Self::BackwardsValidity => with(|params| {
                params.not_before = OffsetDateTime::now_utc() - Duration::minutes(1);
                params.not_after = params.not_before - Duration::minutes(1);
            }),
            Self::Expired => with(expire),
            Self::NotYetValid => with(|params| {
                params.not_before = OffsetDateTime::now_utc() + Duration::minutes(30);
            }),
            Self::Unknown => Authority::root("example.org").leaf(spiffe_id),
            Self::SelfSigned => {
                let key = KeyPair::generate().unwrap();
                let certificate = leaf_params(spiffe_id).self_signed(&key).unwrap();
                Issued {
                    chain: vec![certificate.into()],
                    key: key.serialize_der().into(),
                }
            }
            Self::Tampered => root.leaf(spiffe_id).edit(|der| {
                if let Some(last) = der.last_mut() {
                    *last ^= 1;
                }
            }),
            Self::Trailing => root.leaf(spiffe_id).edit(|der| der.push(0)),
            Self::TwiceKeyUsage => with(|params| {
                // BIT STRING { digitalSignature }
                let again = CustomExtension::from_oid_content(&[2, 5, 29, 15], vec![3, 2, 7, 0x80]);
                params.custom_extensions.push(again);
            }),
            Self::MissingIntermediate => {
                let mut issued = under(|_| {});
                issued.chain.truncate(1);
                issued
            }
            Self::IntermediateNotCa => under(|params| params.is_ca = IsCa::ExplicitNoCa),
            Self::IntermediateNoBasicConstraints => under(|params| params.is_ca = IsCa::NoCa),
            Self::IntermediateNoKeyUsage => under(|params| params.key_usages.clear()),
            Self::IntermediateNoKeyCertSign => under(|params| {
                params.key_usages = vec![KeyUsagePurpose::CrlSign];
            }),
            Self::IntermediateIdHasPath => under(|params| {
                params.subject_alt_names = vec![uri("spiffe://example.org/ca")];
            }),
            Self::IntermediateServerOnly => under(|params| {
                params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
            }),
            Self::IntermediateExpired => under(expire),
            Self::PathTooLong => root
                .intermediate(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)))
                .intermediate(|_| {})
                .leaf(spiffe_id),
            Self::SignedByWorkload => under(|params| {
                params.is_ca = IsCa::ExplicitNoCa;
                params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
                params.subject_alt_names = vec![uri("spiffe://example.org/other")];
            }),
        }
    }
}
