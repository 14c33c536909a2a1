//! One identity's certificate as it goes from one daemon to another: a message that says what there is,
//! and a file in memory that holds it. The key is in the file alone.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::fd::OwnedFd,
    sync::Arc,
};

use nix::{
    errno::Errno,
    sys::memfd::{MFdFlags, memfd_create},
};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::identity::{Denied, Material, Passed, SpiffeId, TrustBundle, TrustDomain};

/// Name of the file, which `/proc` shows.
const NAME: &str = "reeve-certificate";
/// Most bytes of one identity: as much as is taken of an agent's answer.
const MOST: usize = 16 << 20;

/// What a daemon passes of one identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Pass {
    pub(super) identity: SpiffeId,
    what: What,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum What {
    /// A file comes along.
    Material(Layout),
    /// The source denies it: the kind of denial by its name, and what the source said.
    Denied { kind: String, why: String },
    /// The daemon does not look after the identity.
    Unknown,
}

/// Lengths of what is in the file, in this order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    key: usize,
    chain: Vec<usize>,
    bundles: Vec<BundleLayout>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BundleLayout {
    trust_domain: TrustDomain,
    certificates: Vec<usize>,
    lists: Vec<usize>,
}

// === impl Pass ===

impl Pass {
    /// The message, and the file where one goes with it.
    pub(super) fn pack(
        identity: &SpiffeId,
        passed: &Passed,
    ) -> io::Result<(Self, Option<OwnedFd>)> {
        let (what, file) = match passed {
            Passed::Material(material) => {
                (What::Material(Layout::of(material)), Some(write(material)?))
            }
            Passed::Denied(denied) => {
                let (kind, why) = (denied.as_str().to_owned(), denied.why().to_owned());
                (What::Denied { kind, why }, None)
            }
            Passed::Unknown => (What::Unknown, None),
        };
        let identity = identity.clone();
        Ok((Self { identity, what }, file))
    }

    /// What was passed, of which nothing is checked but that it can be read.
    pub(super) fn unpack(self, file: Option<OwnedFd>) -> io::Result<Passed> {
        match self.what {
            What::Material(layout) => {
                let file = file.ok_or_else(|| invalid("no file came along"))?;
                let material = layout.read(file.into())?;
                Ok(Passed::Material(Arc::new(material)))
            }
            What::Denied { kind, why } => Ok(Passed::Denied(Denied::named(&kind, why))),
            What::Unknown => Ok(Passed::Unknown),
        }
    }
}

// === impl Layout ===

impl Layout {
    fn of(material: &Material) -> Self {
        Self {
            key: material.key.secret_der().len(),
            chain: lengths(&material.chain),
            bundles: material
                .bundles
                .iter()
                .map(|bundle| BundleLayout {
                    trust_domain: bundle.trust_domain().clone(),
                    certificates: lengths(bundle.certificates()),
                    lists: bundle.lists().iter().map(|it| it.der().len()).collect(),
                })
                .collect(),
        }
    }

    fn read(self, file: File) -> io::Result<Material> {
        let mut file = Parts { file, left: MOST };
        let key = Zeroizing::new(file.next(self.key)?);
        let key = PrivateKeyDer::try_from(key.as_slice()).map_err(invalid)?;
        let key = Zeroizing::new(key.clone_key());
        let chain = file.all(self.chain, CertificateDer::from)?;
        let mut bundles = Vec::new();
        for bundle in self.bundles {
            let certificates = file.all(bundle.certificates, CertificateDer::from)?;
            let lists = file.all(bundle.lists, CertificateRevocationListDer::from)?;
            let bundle = TrustBundle::new(bundle.trust_domain, certificates, lists);
            bundles.push(Arc::new(bundle.map_err(invalid)?));
        }
        Ok(Material {
            chain,
            key,
            bundles,
        })
    }
}

fn lengths(certificates: &[CertificateDer<'_>]) -> Vec<usize> {
    certificates.iter().map(|der| der.len()).collect()
}

/// Puts what [`Layout::of`] describes into a file that has no name, and that nobody can open.
fn write(material: &Material) -> io::Result<OwnedFd> {
    let mut file = File::from(file_in_memory()?);
    file.write_all(material.key.secret_der())?;
    for der in &material.chain {
        file.write_all(der)?;
    }
    for bundle in &material.bundles {
        for der in bundle.certificates() {
            file.write_all(der)?;
        }
        for list in bundle.lists() {
            file.write_all(list.der())?;
        }
    }
    file.rewind()?;
    Ok(file.into())
}

fn file_in_memory() -> nix::Result<OwnedFd> {
    let closed = MFdFlags::MFD_CLOEXEC;
    let never_run = MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL);
    match memfd_create(NAME, closed | never_run) {
        // Linux before 6.3.
        Err(Errno::EINVAL) => memfd_create(NAME, closed),
        made => made,
    }
}

/// What is in a file, one part after the other.
struct Parts {
    file: File,
    /// Bytes that are still taken.
    left: usize,
}

// === impl Parts ===

impl Parts {
    fn next(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let left = self.left.checked_sub(length);
        self.left = left.ok_or_else(|| invalid(format!("it has more than {MOST} bytes")))?;
        let mut part = vec![0; length];
        self.file.read_exact(&mut part)?;
        Ok(part)
    }

    fn all<T>(&mut self, lengths: Vec<usize>, parse: impl Fn(Vec<u8>) -> T) -> io::Result<Vec<T>> {
        let lengths = lengths.into_iter();
        lengths
            .map(|length| Ok(parse(self.next(length)?)))
            .collect()
    }
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::certs::Authority;

    const ID: &str = "spiffe://example.org/ns/shop/sa/cart";

    fn material() -> Material {
        let root = Authority::root("example.org");
        let issued = root.intermediate(|_| {}).leaf(ID);
        let list = root.revocation_list(&[], time::Duration::hours(1));
        let bundle = |domain: &str, lists| {
            let domain = TrustDomain::parse(domain).unwrap();
            let bundle = TrustBundle::new(domain, vec![root.certificate()], lists);
            Arc::new(bundle.unwrap())
        };
        Material {
            key: Zeroizing::new(issued.private_key()),
            chain: issued.chain,
            bundles: vec![
                bundle("example.org", vec![list]),
                bundle("other.example", Vec::new()),
            ],
        }
    }

    #[test]
    fn what_is_passed_arrives_whole_and_the_message_holds_no_key() {
        let (id, material) = (SpiffeId::parse(ID).unwrap(), Arc::new(material()));
        let (pass, file) = Pass::pack(&id, &Passed::Material(material.clone())).unwrap();
        assert!(serde_json::to_string(&pass).unwrap().len() < 400);
        assert_eq!(pass.identity, id);
        let Passed::Material(arrived) = pass.unpack(file).unwrap() else {
            panic!("it is something else");
        };
        assert!(arrived.same_as(&material));
        assert_eq!(arrived.key.secret_der(), material.key.secret_der());
    }

    #[test]
    fn a_denial_arrives_as_what_it_is() {
        let id = SpiffeId::parse(ID).unwrap();
        for denied in [
            Denied::NeverGranted("no entry".into()),
            Denied::Withdrawn("no entry".into()),
            Denied::NotDelegate("no".into()),
            Denied::NoProcess,
        ] {
            let (pass, file) = Pass::pack(&id, &Passed::Denied(denied.clone())).unwrap();
            let Passed::Denied(arrived) = pass.unpack(file).unwrap() else {
                panic!("it is something else");
            };
            assert_eq!(arrived, denied);
        }
    }

    #[test]
    fn what_is_not_what_the_message_says_is_refused() {
        let id = SpiffeId::parse(ID).unwrap();
        let packed = || Pass::pack(&id, &Passed::Material(Arc::new(material()))).unwrap();
        let refused = |change: fn(&mut Layout), file: fn(Option<OwnedFd>) -> Option<OwnedFd>| {
            let (mut pass, packed) = packed();
            if let What::Material(layout) = &mut pass.what {
                change(layout);
            }
            pass.unpack(file(packed)).unwrap_err().to_string()
        };
        let same = |file| file;
        assert!(refused(|_| {}, |_| None).contains("no file"));
        assert!(refused(|layout| layout.key = MOST + 1, same).contains("more than"));
        assert!(refused(|layout| layout.key = 0, same).contains("key"));
        assert!(refused(|layout| layout.chain.push(1 << 20), same).contains("fill"));
        assert!(refused(|layout| layout.bundles[0].lists[0] -= 1, same).contains("list"));
    }
}
