//! Certificates, right ones and ones that are wrong in each way that a verifier must notice.
//!
//! The daemon's unit tests include this file as well, so it knows nothing of reeve: a flaw names
//! the reason that it is to be refused for as text.

mod flaw;
mod openssl;

pub use flaw::Flaw;
pub use openssl::OpensslFlaw;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls_pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use time::{Duration, OffsetDateTime};

/// A CA that signs whatever it is asked to.
pub struct Authority {
    /// What it was made of; none where it was only read.
    params: Option<CertificateParams>,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    /// What a certificate of this CA is presented with: itself and those above, without the root.
    intermediates: Vec<CertificateDer<'static>>,
}

/// A certificate with its chain and key, as a workload would present it.
pub struct Issued {
    /// Leaf first, without the root.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS #8.
    pub key: PrivatePkcs8KeyDer<'static>,
}

// === impl Authority ===

impl Authority {
    /// A root for a trust domain, as right as can be.
    pub fn root(trust_domain: &str) -> Self {
        Self::root_with(trust_domain, |_| {})
    }

    /// A root that `change` may spoil.
    pub fn root_with(trust_domain: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        Self::root_of(trust_domain, KeyPair::generate().unwrap(), change)
    }

    /// A root with this key that `change` may spoil.
    pub fn root_of(
        trust_domain: &str,
        key: KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let mut params = ca_params(trust_domain);
        change(&mut params);
        let certificate = params.self_signed(&key).unwrap().into();
        Self {
            params: Some(params.clone()),
            issuer: Issuer::new(params, key),
            certificate,
            intermediates: Vec::new(),
        }
    }

    /// The same root again, by name and key, with another certificate that `change` may spoil.
    pub fn reissued(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = self.params.clone().unwrap();
        change(&mut params);
        let key = KeyPair::try_from(self.issuer.key().serialized_der()).unwrap();
        let certificate = params.self_signed(&key).unwrap().into();
        Self {
            params: Some(params.clone()),
            issuer: Issuer::new(params, key),
            certificate,
            intermediates: Vec::new(),
        }
    }

    /// A root that exists already, as in reeve's CA folder.
    pub fn from_pem(certificate: &str, key: &str) -> Self {
        use rustls_pki_types::pem::PemObject;
        let key = KeyPair::from_pem(key).unwrap();
        Self {
            params: None,
            issuer: Issuer::from_ca_cert_pem(certificate, key).unwrap(),
            certificate: CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap(),
            intermediates: Vec::new(),
        }
    }

    /// A CA below this one that `change` may spoil.
    pub fn intermediate(&self, change: impl FnOnce(&mut CertificateParams)) -> Self {
        self.intermediate_of(KeyPair::generate().unwrap(), change)
    }

    /// A CA below this one with this key.
    pub fn intermediate_of(
        &self,
        key: KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Self {
        let mut params = ca_params("example.org");
        params.subject_alt_names.clear();
        change(&mut params);
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        let certificate = CertificateDer::from(signed);
        let mut intermediates = vec![certificate.clone()];
        intermediates.extend_from_slice(&self.intermediates);
        Self {
            params: Some(params.clone()),
            issuer: Issuer::new(params, key),
            certificate,
            intermediates,
        }
    }

    /// A workload's certificate, as right as can be.
    pub fn leaf(&self, spiffe_id: &str) -> Issued {
        self.leaf_with(spiffe_id, |_| {})
    }

    /// A workload's certificate that `change` may spoil.
    pub fn leaf_with(&self, uri: &str, change: impl FnOnce(&mut CertificateParams)) -> Issued {
        self.leaf_of(uri, KeyPair::generate().unwrap(), change)
    }

    /// A workload's certificate with this key that `change` may spoil.
    pub fn leaf_of(
        &self,
        uri: &str,
        key: KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Issued {
        let mut params = leaf_params(uri);
        change(&mut params);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let mut chain = vec![CertificateDer::from(leaf)];
        chain.extend_from_slice(&self.intermediates);
        Issued {
            chain,
            key: key.serialize_der().into(),
        }
    }

    /// The CA's own certificate.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The CA's own certificate as PEM.
    pub fn certificate_pem(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// The CA's key as PEM.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// A revocation list with these serial numbers, which is to be replaced `valid` from now.
    pub fn revocation_list(
        &self,
        revoked: &[&[u8]],
        valid: Duration,
    ) -> CertificateRevocationListDer<'static> {
        self.revocation_list_with(revoked, valid, |_| {})
    }

    /// The same, which `change` may spoil.
    pub fn revocation_list_with(
        &self,
        revoked: &[&[u8]],
        valid: Duration,
        change: impl FnOnce(&mut CertificateRevocationListParams),
    ) -> CertificateRevocationListDer<'static> {
        let now = OffsetDateTime::now_utc();
        let revoke = |serial: &&[u8]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(serial),
            revocation_time: now - Duration::hours(1),
            reason_code: None,
            invalidity_date: None,
        };
        let mut params = CertificateRevocationListParams {
            this_update: now - Duration::hours(1),
            next_update: now + valid,
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(revoke).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        change(&mut params);
        params.signed_by(&self.issuer).unwrap().into()
    }
}

fn ca_params(trust_domain: &str) -> CertificateParams {
    let mut name = DistinguishedName::new();
    let distinct = OffsetDateTime::now_utc().unix_timestamp_nanos();
    name.push(DnType::CommonName, format!("test CA {distinct}"));
    let mut params = params(&format!("spiffe://{trust_domain}"), name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn leaf_params(uri: &str) -> CertificateParams {
    let mut params = params(uri, DistinguishedName::new());
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params
}

fn params(uri: &str, name: DistinguishedName) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + Duration::hours(1);
    params.distinguished_name = name;
    params.subject_alt_names = vec![self::uri(uri)];
    params
}

/// A URI as alternative name.
pub fn uri(uri: &str) -> SanType {
    SanType::URI(uri.try_into().unwrap())
}

// === impl Issued ===

impl Issued {
    /// A certificate that exists already, as in files.
    pub fn from_pem(chain: &str, key: &str) -> Self {
        use rustls_pki_types::pem::PemObject;
        let chain = CertificateDer::pem_slice_iter(chain.as_bytes());
        Self {
            chain: chain.map(|der| der.unwrap()).collect(),
            key: PrivatePkcs8KeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        }
    }

    /// The key in the type that rustls takes.
    pub fn private_key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key().into()
    }

    /// The serial number.
    pub fn serial(&self) -> Vec<u8> {
        let (_, certificate) = x509_parser::parse_x509_certificate(&self.chain[0]).unwrap();
        certificate.raw_serial().to_vec()
    }

    /// The chain as PEM.
    pub fn chain_pem(&self) -> String {
        self.chain
            .iter()
            .map(|der| pem("CERTIFICATE", der))
            .collect()
    }

    /// The key as PEM.
    pub fn key_pem(&self) -> String {
        pem("PRIVATE KEY", self.key.secret_pkcs8_der())
    }

    /// Changes the leaf's bytes.
    fn edit(mut self, change: impl FnOnce(&mut Vec<u8>)) -> Self {
        let mut der = self.chain[0].to_vec();
        change(&mut der);
        self.chain[0] = der.into();
        self
    }
}

/// Serial number of a certificate.
pub fn serial(certificate: &CertificateDer<'_>) -> Vec<u8> {
    use x509_parser::prelude::{FromDer, X509Certificate};
    let (_, certificate) = X509Certificate::from_der(certificate).unwrap();
    certificate.raw_serial().to_vec()
}

/// A revocation list as PEM.
pub fn crl_pem(list: &CertificateRevocationListDer<'_>) -> String {
    pem("X509 CRL", list)
}

fn pem(label: &str, der: &[u8]) -> String {
    pem::encode(&pem::Pem::new(label, der))
}

/// Makes a certificate that was valid until a minute ago.
pub fn expire(params: &mut CertificateParams) {
    params.not_after = OffsetDateTime::now_utc() - Duration::minutes(1);
}
