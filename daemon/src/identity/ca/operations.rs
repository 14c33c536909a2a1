//! What `reeve ca` does to a folder. A daemon that uses it notices.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{Issuer, KeyPair};
use rustls_pki_types::CertificateDer;

use super::{
    CaError,
    authority::{Authority, CaKey, Signer},
    changes::Changes,
    folder::{self, Contents, Folder, INTERMEDIATE, NEXT, ROOT, pem_of},
    lists::{self, Crl, Split},
    template,
};
use crate::identity::{SpiffeId, TrustDomain, pem_file, svid_rules};

/// Ten years: replacing a root means visiting every node.
pub const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A certificate to be revoked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Revocation {
    /// By its serial number.
    Serial(Vec<u8>),
    /// The first one in a PEM file.
    Certificate(PathBuf),
}

/// Makes a new root in a folder that has none.
///
/// # Errors
/// When there is a CA already, or something cannot be written.
pub fn init_root(
    path: &Path,
    trust_domain: &TrustDomain,
    lifetime: Duration,
) -> Result<(), CaError> {
    let folder = Folder::create(path)?;
    refuse_existing(&folder)?;
    make_root(&folder, trust_domain, lifetime)
}

pub(super) fn make_root(
    folder: &Folder,
    trust_domain: &TrustDomain,
    lifetime: Duration,
) -> Result<(), CaError> {
    let key = CaKey::new(KeyPair::generate()?);
    let root = template::root(trust_domain, lifetime)?.self_signed(&key)?;
    let root = [root.into()];
    folder.write(
        Changes::default()
            .bundle(&root)
            .pair(ROOT, key.pair(), &root),
    )
}

/// Makes an intermediate, signed by the root in another folder, in a folder that has no CA. It
/// never lives longer than the root.
///
/// # Errors
/// When there is a CA already, there is no root's key to sign it with, or something cannot be
/// written.
pub fn init_intermediate(root: &Path, path: &Path, lifetime: Duration) -> Result<(), CaError> {
    let root = Folder::open(root)?;
    let folder = Folder::create(path)?;
    refuse_existing(&folder)?;
    make_intermediate(&root, &folder, lifetime, Vec::new())
}

/// Replaces an intermediate by a new one, and the roots that it comes with by those that the root's
/// folder trusts now. Revocation lists are brought up to date where there are any.
///
/// # Errors
/// When there is no intermediate, there is no root's key to sign it with, or something cannot be
/// written.
pub fn renew_intermediate(root: &Path, path: &Path, lifetime: Duration) -> Result<(), CaError> {
    let root = Folder::open(root)?;
    let folder = Folder::open(path)?;
    let contents = folder.contents()?;
    if !contents.is_intermediate {
        return Err(CaError::NotAnIntermediate {
            folder: path.to_owned(),
        });
    }
    make_intermediate(&root, &folder, lifetime, contents.lists)
}

fn make_intermediate(
    root: &Folder,
    folder: &Folder,
    lifetime: Duration,
    old_lists: Vec<Crl>,
) -> Result<(), CaError> {
    let contents = root_contents(root)?;
    let trusted = contents.trusted;
    let signer = Signer::check(contents.signer, None)?;
    let key = CaKey::new(KeyPair::generate()?);
    let not_after = (SystemTime::now() + lifetime).min(signer.not_after);
    let params = template::intermediate(&signer.trust_domain, not_after)?;
    let certificate: CertificateDer<'static> = params.signed_by(&key, &signer.issuer)?.into();

    // Once anything is revoked, every CA needs a list: this one gets an empty one for its lifetime,
    // kept where the root is until it is needed.
    let issuer = Issuer::from_ca_cert_der(&certificate, key)?;
    let own = lists::sign(&issuer, &[], not_after)?;
    let mut all = with_own_list(contents.lists, &signer, root)?;
    all.push(own);
    root.write(Changes::default().lists(&all))?;

    let mut changes = Changes::default().bundle(&trusted);
    if !old_lists.is_empty() {
        let mut merged = all.clone();
        for list in old_lists {
            // What the node itself has revoked stays so: the root's folder knows nothing of it.
            let is_known = lists::contain(&merged, &list);
            if !is_known.map_err(|error| lists_unreadable(folder, error))? {
                merged.push(list);
            }
        }
        changes = changes.lists(&merged);
    }
    folder.write(changes.pair(INTERMEDIATE, issuer.key().pair(), &[certificate]))
}

/// Makes the root that is to come, which is trusted from now on and signs nothing yet. Does nothing
/// where there is one already.
///
/// # Errors
/// When there is no root's key in the folder, or something cannot be written.
pub fn prepare_root(path: &Path, lifetime: Duration) -> Result<(), CaError> {
    let folder = Folder::open(path)?;
    let mut contents = root_contents(&folder)?;
    let mut changes = Changes::default();
    if contents.next.is_none() {
        let trust_domain = Signer::check(root_contents(&folder)?.signer, None)?.trust_domain;
        let key = KeyPair::generate()?;
        let next = template::root(&trust_domain, lifetime)?.self_signed(&key)?;
        let chain = vec![next.into()];
        changes = changes.pair(NEXT, &key, &chain);
        contents.next = Some(folder.new_pair(NEXT, key, chain));
    }
    folder.write(trust_next(&folder, contents, changes)?)
}

/// Begins to sign with the next root. The one before stays trusted, and its key is gone.
///
/// # Errors
/// When there is no next root, or something cannot be written.
pub fn switch_root(path: &Path) -> Result<(), CaError> {
    let folder = Folder::open(path)?;
    let contents = root_contents(&folder)?;
    let was_interrupted = contents.signer.chain_path != path.join("root.pem");
    if contents.next.is_none() && !was_interrupted {
        return Err(CaError::NoNextRoot {
            folder: path.to_owned(),
        });
    }
    folder.write(trust_next(&folder, contents, Changes::default())?)?;
    folder.switch_root()
}

/// Trusts no root any more but the one that signs. Returns how many are gone.
///
/// # Errors
/// When there is a next root, there are no old ones, or something cannot be written.
pub fn drop_old_roots(path: &Path) -> Result<usize, CaError> {
    let folder = Folder::open(path)?;
    let contents = root_contents(&folder)?;
    if contents.next.is_some() {
        return Err(CaError::NotSwitched {
            folder: path.to_owned(),
        });
    }
    let (current, old): (Vec<_>, Vec<_>) = contents
        .trusted
        .into_iter()
        .partition(|root| contents.signer.chain.first() == Some(root));
    if old.is_empty() {
        return Err(CaError::NothingOld {
            folder: path.to_owned(),
        });
    }
    let mut changes = Changes::default().bundle(&current);
    if !contents.lists.is_empty() {
        let mut kept = contents.lists;
        for root in &old {
            if let Ok(root) = svid_rules::parse(root) {
                kept = split(&folder, kept, root.subject().as_raw())?.others;
            }
        }
        changes = changes.lists(&kept);
    }
    folder.write(changes)?;
    Ok(old.len())
}

/// Signs a certificate for another machine and writes `svid.pem`, `svid.key`, `bundle.pem` and,
/// where there are revocation lists, `crl.pem` into `out`, all of them with mode 0600. Returns the
/// certificate, and those above it but the root.
///
/// # Errors
/// When the identity is of another trust domain, or something cannot be written.
pub fn issue(
    path: &Path,
    id: &SpiffeId,
    lifetime: Duration,
    out: &Path,
) -> Result<Vec<CertificateDer<'static>>, CaError> {
    let folder = Folder::open(path)?;
    let contents = folder.contents()?;
    let crls = contents.lists.clone();
    let authority = Authority::check(path, contents, None)?;
    let material = authority.issue(id, lifetime)?;
    let roots = authority.bundle.certificates();
    let mut files = Changes::default()
        .private(
            "svid.key",
            pem_of("PRIVATE KEY", &[material.key.secret_der()]),
        )
        .private("svid.pem", pem_of("CERTIFICATE", &material.chain))
        .private("bundle.pem", pem_of("CERTIFICATE", roots));
    if !crls.is_empty() {
        files = files.private("crl.pem", pem_of("X509 CRL", &crls));
    }
    folder::make(out)?;
    files.write_in(out)?;
    Ok(material.chain)
}

/// Adds certificates to the CA's revocation list; with none, signs the list anew. The list counts
/// for `valid_for`, or as long as the CA's own certificate. Returns how many are revoked now.
///
/// # Errors
/// When a certificate is another CA's, the lists of the CAs above are missing, or something cannot
/// be written. What was there before is left as it was.
pub fn revoke(
    path: &Path,
    revocations: &[Revocation],
    valid_for: Option<Duration>,
) -> Result<usize, CaError> {
    let folder = Folder::open(path)?;
    let contents = folder.contents()?;
    let signer = Signer::check(contents.signer, None)?;
    let Split { own, mut others } = split(&folder, contents.lists, &signer.subject()?)?;
    let mut entries = own.unwrap_or_default();
    let now = SystemTime::now();
    for revocation in revocations {
        let serial = match revocation {
            Revocation::Serial(serial) => lists::without_zeros(serial).to_vec(),
            Revocation::Certificate(file) => serial_of(file, &signer)?,
        };
        if !entries.iter().any(|(known, _)| *known == serial) {
            entries.push((serial, now));
        }
    }
    let next_update = valid_for.map_or(signer.not_after, |valid| now + valid);
    others.insert(0, lists::sign(&signer.issuer, &entries, next_update)?);

    // With this list in force, what this CA signs must still be accepted.
    let mut contents = folder.contents()?;
    contents.lists.clone_from(&others);
    match Authority::check(path, contents, None) {
        Ok(_) => {}
        Err(CaError::Useless { path, reason }) => {
            return Err(CaError::ListsIncomplete { path, reason });
        }
        Err(error) => return Err(error),
    }
    folder.write(Changes::default().lists(&others))?;
    Ok(entries.len())
}

/// Has the next root trusted as well, with a revocation list where there are any.
fn trust_next(
    folder: &Folder,
    contents: Contents,
    mut changes: Changes,
) -> Result<Changes, CaError> {
    let Contents {
        signer,
        next,
        mut trusted,
        mut lists,
        ..
    } = contents;
    let Some(next) = next else {
        return Ok(changes);
    };
    for root in &next.chain {
        if !trusted.contains(root) {
            trusted.push(root.clone());
        }
    }
    changes = changes.bundle(&trusted);
    let signers = [Signer::check(signer, None)?, Signer::check(next, None)?];
    if !lists.is_empty() {
        for signer in signers {
            // Lists that are complete are not signed anew: that needs room on the disk.
            if split(folder, lists.clone(), &signer.subject()?)?
                .own
                .is_none()
            {
                lists = with_own_list(lists, &signer, folder)?;
            }
        }
        changes = changes.lists(&lists);
    }
    Ok(changes)
}

/// The lists with one of this signer, which says what it said before.
fn with_own_list(lists: Vec<Crl>, signer: &Signer, folder: &Folder) -> Result<Vec<Crl>, CaError> {
    let Split { own, mut others } = split(folder, lists, &signer.subject()?)?;
    let entries = own.unwrap_or_default();
    others.insert(0, lists::sign(&signer.issuer, &entries, signer.not_after)?);
    Ok(others)
}

fn split(folder: &Folder, lists: Vec<Crl>, issuer: &[u8]) -> Result<Split, CaError> {
    lists::split(lists, issuer).map_err(|error| lists_unreadable(folder, error))
}

fn lists_unreadable(folder: &Folder, error: String) -> CaError {
    CaError::Unreadable {
        path: folder.path().join(folder::LISTS),
        what: "revocation list",
        error,
    }
}

/// Serial number of a certificate that this signer has issued.
fn serial_of(file: &Path, signer: &Signer) -> Result<Vec<u8>, CaError> {
    let unreadable = |error: String| CaError::Unreadable {
        path: file.to_owned(),
        what: "certificate",
        error,
    };
    let pem = fs::read(file).map_err(|error| CaError::Io {
        action: "read",
        path: file.to_owned(),
        error,
    })?;
    let chain = pem_file::certificates(&pem).map_err(|error| unreadable(error.to_string()))?;
    let der = chain.first().map_or(&[][..], |der| der.as_ref());
    let certificate = svid_rules::parse(der).map_err(|reason| unreadable(reason.to_string()))?;
    if certificate.issuer().as_raw() != signer.subject()? {
        return Err(CaError::IssuedElsewhere {
            certificate: file.to_owned(),
            issuer: certificate.issuer().to_string(),
            subject: signer.name()?,
        });
    }
    Ok(lists::without_zeros(certificate.raw_serial()).to_vec())
}

fn root_contents(folder: &Folder) -> Result<Contents, CaError> {
    let contents = folder.contents()?;
    if contents.is_intermediate {
        return Err(CaError::NotARoot {
            folder: folder.path().to_owned(),
        });
    }
    Ok(contents)
}

fn refuse_existing(folder: &Folder) -> Result<(), CaError> {
    match folder.read()? {
        None => Ok(()),
        Some(_) => Err(CaError::Exists {
            folder: folder.path().to_owned(),
        }),
    }
}
