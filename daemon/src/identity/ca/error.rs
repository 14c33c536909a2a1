//! Why a CA folder cannot be used, or not for what was asked of it.

use std::path::PathBuf;

use crate::identity::{BundleError, RejectReason, SpiffeId, TrustDomain};

/// Why the embedded CA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Something could not be done to a file or folder.
    #[error("cannot {action} {path}: {error}", path = path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// What the operating system says.
        error: std::io::Error,
    },
    /// Others than the owner may get at the CA's key.
    #[error(
        "{path} has mode {mode:04o}: whoever can read it can forge every identity. \
         If nobody else had access to it, `chmod {wanted:04o} {path}`; otherwise make a new CA",
        path = path.display()
    )]
    Permissions {
        /// File or folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
        /// The widest that is accepted.
        wanted: u32,
    },
    /// The folder or the key belongs to somebody else.
    #[error(
        "{path} belongs to user {owner}, and this process runs as user {user}: \
         make it this user's own", path = path.display()
    )]
    Owner {
        /// File or folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Effective user of this process.
        user: u32,
    },
    /// Only one of key and certificate is there.
    #[error(
        "{missing} is missing and {present} is there: put back the one that belongs to it, \
         or remove the other to have a new CA made",
        missing = missing.display(), present = present.display()
    )]
    Half {
        /// The file that is there.
        present: PathBuf,
        /// The file that is not.
        missing: PathBuf,
    },
    /// A root's key lies beside an intermediate's.
    #[error(
        "{folder} holds the keys of a root and of an intermediate: \
         a node needs only the intermediate, keep the root's key elsewhere",
        folder = folder.display()
    )]
    TwoKeys {
        /// The folder.
        folder: PathBuf,
    },
    /// An intermediate is there, and nothing that it leads to.
    #[error("{path} is missing: the roots that the intermediate leads to belong there", path = path.display())]
    NoRoots {
        /// The file of the roots.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no usable {what}: {error}", path = path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
        /// What is wrong.
        error: String,
    },
    /// The certificates in the folder may not be trusted, or its revocation lists not be read.
    #[error("{folder} cannot be used: {error}", folder = folder.display())]
    Bundle {
        /// The folder.
        folder: PathBuf,
        /// Which rule is broken.
        error: BundleError,
    },
    /// Nobody would accept what this CA issues.
    #[error(
        "what {path} signs would be refused by everybody: {reason} ({})", reason.as_str(),
        path = path.display()
    )]
    Useless {
        /// The file of the CA's certificate.
        path: PathBuf,
        /// For this reason.
        reason: RejectReason,
    },
    /// The certificate is another trust domain's.
    #[error(
        "{path} is of {found}, and the trust domain is {wanted}: \
         give this trust domain a CA folder of its own", path = path.display(),
        found = found.as_deref().unwrap_or("no SPIFFE trust domain")
    )]
    TrustDomain {
        /// The file.
        path: PathBuf,
        /// The trust domain's ID that the certificate holds.
        found: Option<String>,
        /// The one that it should be.
        wanted: TrustDomain,
    },
    /// The key is another certificate's.
    #[error(
        "the key in {key} does not fit the certificate in {certificate}: \
         put back the one that belongs to the other",
        key = key.display(), certificate = certificate.display()
    )]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's file.
        certificate: PathBuf,
    },
    /// There is no CA to work on.
    #[error("{folder} holds no CA: `reeve ca init` makes one", folder = folder.display())]
    Missing {
        /// The folder.
        folder: PathBuf,
    },
    /// There is a CA where one should be made.
    #[error(
        "{folder} holds a CA already, which is left alone: what it issued would be worth nothing. \
         `reeve ca rotate` replaces it without an outage",
        folder = folder.display()
    )]
    Exists {
        /// The folder.
        folder: PathBuf,
    },
    /// What was asked for needs a root's key.
    #[error("{folder} has no root's key: do this in the folder where the root is", folder = folder.display())]
    NotARoot {
        /// The folder.
        folder: PathBuf,
    },
    /// There is no intermediate to renew.
    #[error(
        "{folder} holds no intermediate: `reeve ca init --root-dir … --intermediate …` makes one",
        folder = folder.display()
    )]
    NotAnIntermediate {
        /// The folder.
        folder: PathBuf,
    },
    /// A root is to be put to use that was not made, and so not trusted, before.
    #[error(
        "{folder} has no next root: `reeve ca rotate` makes one, which every node has to trust \
         before `reeve ca rotate --switch` begins to sign with it",
        folder = folder.display()
    )]
    NoNextRoot {
        /// The folder.
        folder: PathBuf,
    },
    /// Old roots cannot be removed before the new one is in use.
    #[error(
        "{folder} has a next root that does not sign yet: `reeve ca rotate --switch` comes first",
        folder = folder.display()
    )]
    NotSwitched {
        /// The folder.
        folder: PathBuf,
    },
    /// There are no old roots to remove.
    #[error("{folder} trusts no root but the one that signs", folder = folder.display())]
    NothingOld {
        /// The folder.
        folder: PathBuf,
    },
    /// A certificate of another CA cannot be revoked here.
    #[error(
        "{certificate} was issued by {issuer}, not by {subject}: \
         revoke it in the folder of the CA that issued it",
        certificate = certificate.display()
    )]
    IssuedElsewhere {
        /// The certificate's file.
        certificate: PathBuf,
        /// Who issued it.
        issuer: String,
        /// Who is asked to revoke it.
        subject: String,
    },
    /// Revocation would be checked without the lists that it takes.
    #[error(
        "with this list, everything that {path} signs would be refused: {reason} ({}). Every CA \
         needs a list once one has: put those of the root's folder into `crl.pem` beside it first",
        reason.as_str(), path = path.display()
    )]
    ListsIncomplete {
        /// The file of the CA's certificate.
        path: PathBuf,
        /// Why.
        reason: RejectReason,
    },
    /// No identity of this trust domain.
    #[error("this CA issues for trust domain {trust_domain} only, not for {id}")]
    OtherTrustDomain {
        /// Whose CA it is.
        trust_domain: TrustDomain,
        /// Who was asked for.
        id: SpiffeId,
    },
    /// No key or certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// No random numbers.
    #[error("cannot make a certificate: the operating system gives no random numbers")]
    Random,
}
