//! The life of a CA: intermediates, rotation of the root, revocation. What is signed before, between
//! and after is shown to real verifiers.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rustls_pki_types::{CertificateDer, pem::PemObject};
use tempfile::TempDir;

use super::{
    ca::{self, ROOT_LIFETIME, Revocation, Role},
    handshake::OURS,
    *,
};

const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// A root and two nodes below it, each with an intermediate.
struct Fleet {
    folder: TempDir,
}

impl Fleet {
    fn new() -> Self {
        let fleet = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        ca::init_root(&fleet.root(), &domain(), ROOT_LIFETIME).unwrap();
        for node in ["a", "b"] {
            ca::init_intermediate(&fleet.root(), &fleet.at(node), YEAR).unwrap();
        }
        fleet
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn root(&self) -> PathBuf {
        self.at("root")
    }

    fn node(&self, name: &str) -> EmbeddedCa {
        open(&self.at(name)).unwrap()
    }

    /// Brings a public file from the root to a node, as an operator does.
    fn bring(&self, file: &str, node: &str) {
        fs::copy(self.root().join(file), self.at(node).join(file)).unwrap();
    }

    fn revoke(&self, at: &str, file: &str) -> Result<usize, CaError> {
        let certificate = Revocation::Certificate(self.at(file));
        ca::revoke(&self.at(at), &[certificate], None)
    }
}

fn domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id() -> SpiffeId {
    SpiffeId::parse(OURS).unwrap()
}

fn open(folder: &Path) -> Result<EmbeddedCa, CaError> {
    EmbeddedCa::open(folder, &domain(), HOUR)
}

/// How `verifier`'s node finds what `signer`'s node has issued.
fn judged(verifier: &EmbeddedCa, material: &Material) -> Result<(), RejectReason> {
    let mut bundles = TrustBundles::default();
    bundles.insert(domain(), verifier.bundle());
    let (leaf, above) = material.chain.split_first().unwrap();
    verify_chain(&bundles, leaf, above, SystemTime::now()).map(drop)
}

#[test]
fn nodes_below_one_root_believe_each_other() {
    let fleet = Fleet::new();
    let (a, b) = (fleet.node("a"), fleet.node("b"));
    let (from_a, from_b) = (a.issue(&id()).unwrap(), b.issue(&id()).unwrap());
    assert_eq!(from_a.chain.len(), 2, "the leaf and its intermediate");
    for (verifier, material) in [(&a, &from_a), (&a, &from_b), (&b, &from_a)] {
        assert_eq!(judged(verifier, material), Ok(()));
    }
    // The root's key is not where the node is, and the intermediate's is nobody else's.
    assert!(!fleet.at("a").join("root.key").exists());
    let key = fs::metadata(fleet.at("a").join("intermediate.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o7777, 0o600);
}

#[test]
fn an_intermediate_signs_no_further_intermediate_and_lives_no_longer_than_the_root() {
    let fleet = Fleet::new();
    let error = ca::init_intermediate(&fleet.at("a"), &fleet.at("c"), YEAR).unwrap_err();
    assert!(matches!(error, CaError::NotARoot { .. }), "{error}");
    // Nor would anybody believe it: the length of the path is limited.
    let pem = fs::read(fleet.at("a").join("intermediate.pem")).unwrap();
    let der = CertificateDer::from_pem_slice(&pem).unwrap();
    let parsed = svid_rules::parse(&der).unwrap();
    let constraints = parsed.basic_constraints().unwrap().unwrap().value;
    assert_eq!(constraints.path_len_constraint, Some(0));

    ca::init_intermediate(&fleet.root(), &fleet.at("c"), 20 * YEAR).unwrap();
    let (_, end) = fleet.node("c").validity();
    assert!(end <= SystemTime::now() + ROOT_LIFETIME);
}

#[test]
fn a_node_with_an_intermediate_needs_its_roots_and_no_root_key() {
    let fleet = Fleet::new();
    let bundle = fleet.at("a").join("bundle.pem");
    let kept = fs::read(&bundle).unwrap();
    fs::remove_file(&bundle).unwrap();
    let error = open(&fleet.at("a")).unwrap_err().to_string();
    assert!(error.contains("bundle.pem is missing"), "{error}");
    fs::write(&bundle, kept).unwrap();

    for file in ["root.key", "root.pem"] {
        fs::copy(fleet.root().join(file), fleet.at("a").join(file)).unwrap();
    }
    let error = open(&fleet.at("a")).unwrap_err().to_string();
    assert!(error.contains("keep the root's key elsewhere"), "{error}");
}

#[test]
fn an_intermediate_of_another_root_is_refused_before_it_is_used() {
    let fleet = Fleet::new();
    let other = Fleet::new();
    let roots = other.root().join("bundle.pem");
    fs::copy(roots, fleet.at("a").join("bundle.pem")).unwrap();
    let error = open(&fleet.at("a")).unwrap_err();
    let CaError::Useless { reason, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(reason, RejectReason::UntrustedChain);
}

#[test]
fn what_is_there_is_never_made_anew() {
    let fleet = Fleet::new();
    let before = fs::read(fleet.root().join("root.pem")).unwrap();
    let error = ca::init_root(&fleet.root(), &domain(), YEAR).unwrap_err();
    assert!(matches!(error, CaError::Exists { .. }), "{error}");
    let error = ca::init_intermediate(&fleet.root(), &fleet.at("a"), YEAR).unwrap_err();
    assert!(matches!(error, CaError::Exists { .. }), "{error}");
    assert_eq!(fs::read(fleet.root().join("root.pem")).unwrap(), before);
}

#[test]
fn a_root_is_rotated_without_a_moment_in_which_somebody_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    ca::init_root(&one, &domain(), YEAR).unwrap();
    let a = open(&one).unwrap();
    // A node with a copy, which learns of each step later.
    let copy = || {
        fs::create_dir_all(&two).unwrap();
        fs::set_permissions(&two, fs::Permissions::from_mode(0o700)).unwrap();
        for entry in fs::read_dir(&two).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for entry in fs::read_dir(&one).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, two.join(path.file_name().unwrap())).unwrap();
        }
    };
    copy();
    let b = open(&two).unwrap();
    let mut old = vec![a.issue(&id()).unwrap(), b.issue(&id()).unwrap()];
    let believe_each_other = |old: &[Material]| {
        for material in old
            .iter()
            .chain(&[a.issue(&id()).unwrap(), b.issue(&id()).unwrap()])
        {
            assert_eq!(judged(&a, material), Ok(()));
            assert_eq!(judged(&b, material), Ok(()));
        }
    };

    assert!(matches!(
        ca::switch_root(&one),
        Err(CaError::NoNextRoot { .. })
    ));
    assert!(matches!(
        ca::drop_old_roots(&one),
        Err(CaError::NothingOld { .. })
    ));
    ca::prepare_root(&one, YEAR).unwrap();
    ca::prepare_root(&one, YEAR).unwrap();
    assert!(matches!(
        ca::drop_old_roots(&one),
        Err(CaError::NotSwitched { .. })
    ));
    assert!(a.reload().unwrap());
    believe_each_other(&old);
    copy();
    assert!(b.reload().unwrap());
    assert!(!b.reload().unwrap(), "nothing is new");
    assert_eq!(
        a.bundle().certificates().len(),
        2,
        "repeated, it makes no third"
    );

    let old_key = fs::read(one.join("root.key")).unwrap();
    ca::switch_root(&one).unwrap();
    assert_ne!(fs::read(one.join("root.key")).unwrap(), old_key);
    assert!(a.reload().unwrap());
    believe_each_other(&old);
    copy();
    assert!(b.reload().unwrap());
    old.push(b.issue(&id()).unwrap());
    believe_each_other(&old);

    assert_eq!(ca::drop_old_roots(&one).unwrap(), 1);
    assert!(a.reload().unwrap());
    assert_eq!(judged(&a, &old[0]), Err(RejectReason::UntrustedChain));
    assert_eq!(judged(&a, &old[2]), Ok(()));
    assert_eq!(judged(&b, &old[0]), Ok(()), "which has not been told yet");
}

#[test]
fn a_switch_that_was_interrupted_is_finished() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ca");
    ca::init_root(&path, &domain(), YEAR).unwrap();
    ca::prepare_root(&path, YEAR).unwrap();
    let next = fs::read(path.join("next.pem")).unwrap();
    fs::rename(path.join("next.key"), path.join("root.key")).unwrap();

    let ca = open(&path).unwrap();
    let issued = ca.issue(&id()).unwrap();
    assert_eq!(judged(&ca, &issued), Ok(()));
    ca::switch_root(&path).unwrap();
    assert_eq!(fs::read(path.join("root.pem")).unwrap(), next);
    assert!(!path.join("next.pem").exists());
    assert!(!ca.reload().unwrap());
    assert_eq!(ca::drop_old_roots(&path).unwrap(), 1);
}

#[test]
fn intermediates_follow_a_rotated_root() {
    let fleet = Fleet::new();
    let (a, b) = (fleet.node("a"), fleet.node("b"));
    ca::prepare_root(&fleet.root(), ROOT_LIFETIME).unwrap();
    for (node, ca) in [("a", &a), ("b", &b)] {
        fleet.bring("bundle.pem", node);
        assert!(ca.reload().unwrap());
    }
    ca::switch_root(&fleet.root()).unwrap();
    ca::renew_intermediate(&fleet.root(), &fleet.at("a"), YEAR).unwrap();
    assert!(a.reload().unwrap());
    let (from_a, from_b) = (a.issue(&id()).unwrap(), b.issue(&id()).unwrap());
    for (verifier, material) in [(&a, &from_a), (&a, &from_b), (&b, &from_a)] {
        assert_eq!(judged(verifier, material), Ok(()));
    }
    ca::drop_old_roots(&fleet.root()).unwrap();
    fleet.bring("bundle.pem", "a");
    a.reload().unwrap();
    assert_eq!(judged(&a, &from_b), Err(RejectReason::UntrustedChain));
    // A node that was forgotten keeps what it has: it is the others who refuse it.
    fleet.bring("bundle.pem", "b");
    assert!(matches!(b.reload(), Err(CaError::Useless { .. })));
    assert_eq!(judged(&b, &from_b), Ok(()));
}

#[test]
fn a_node_is_cut_off_by_revoking_its_intermediate_and_others_are_not() {
    let fleet = Fleet::new();
    ca::init_intermediate(&fleet.root(), &fleet.at("c"), YEAR).unwrap();
    let (a, b, c) = (fleet.node("a"), fleet.node("b"), fleet.node("c"));
    assert_eq!(fleet.revoke("root", "b/intermediate.pem").unwrap(), 1);
    assert_eq!(
        fleet.revoke("root", "b/intermediate.pem").unwrap(),
        1,
        "once"
    );
    for (node, ca) in [("a", &a), ("c", &c)] {
        fleet.bring("crl.pem", node);
        assert!(ca.reload().unwrap());
        assert_eq!(
            judged(ca, &b.issue(&id()).unwrap()),
            Err(RejectReason::Revoked)
        );
    }
    assert_eq!(judged(&a, &c.issue(&id()).unwrap()), Ok(()));
    assert_eq!(judged(&c, &a.issue(&id()).unwrap()), Ok(()));

    // The root is rotated meanwhile, and the lists go on to be complete.
    ca::prepare_root(&fleet.root(), ROOT_LIFETIME).unwrap();
    ca::switch_root(&fleet.root()).unwrap();
    ca::renew_intermediate(&fleet.root(), &fleet.at("a"), YEAR).unwrap();
    a.reload().unwrap();
    assert_eq!(judged(&a, &a.issue(&id()).unwrap()), Ok(()));
    assert_eq!(
        judged(&a, &b.issue(&id()).unwrap()),
        Err(RejectReason::Revoked)
    );
    assert_eq!(judged(&a, &c.issue(&id()).unwrap()), Ok(()));
    ca::drop_old_roots(&fleet.root()).unwrap();
    assert!(ca::show(&fleet.root()).unwrap().problem.is_none());
}

#[test]
fn a_workloads_certificate_is_revoked_by_the_ca_that_issued_it() {
    let fleet = Fleet::new();
    let out = fleet.at("out");
    let chain = ca::issue(&fleet.at("a"), &id(), HOUR, &out).unwrap();
    for name in ["svid.pem", "svid.key", "bundle.pem"] {
        let file = fs::metadata(out.join(name)).unwrap();
        assert_eq!(file.permissions().mode() & 0o7777, 0o600, "{name}");
    }
    let error = fleet.revoke("root", "out/svid.pem").unwrap_err();
    assert!(matches!(error, CaError::IssuedElsewhere { .. }), "{error}");
    // Alone, the list would leave everybody without a word about the intermediate.
    let error = fleet.revoke("a", "out/svid.pem").unwrap_err();
    assert!(matches!(error, CaError::ListsIncomplete { .. }), "{error}");
    assert!(!fleet.at("a").join("crl.pem").exists());
    fleet.bring("crl.pem", "a");
    assert_eq!(fleet.revoke("a", "out/svid.pem").unwrap(), 1);

    let a = fleet.node("a");
    let revoked = Material {
        chain,
        ..a.issue(&id()).unwrap()
    };
    assert_eq!(judged(&a, &revoked), Err(RejectReason::Revoked));
    assert_eq!(judged(&a, &a.issue(&id()).unwrap()), Ok(()));
}

#[test]
fn a_list_that_has_ended_refuses_everybody_until_it_is_signed_anew() {
    let fleet = Fleet::new();
    let root = open(&fleet.root()).unwrap();
    let of_root = root.issue(&id()).unwrap();
    let serial = Revocation::Serial(vec![0x7f]);
    ca::revoke(&fleet.root(), &[serial], Some(Duration::from_secs(2))).unwrap();
    root.reload().unwrap();
    assert_eq!(judged(&root, &of_root), Ok(()));
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(
        judged(&root, &of_root),
        Err(RejectReason::RevocationListExpired)
    );
    assert_eq!(
        ca::revoke(&fleet.root(), &[], None).unwrap(),
        1,
        "what was revoked stays so"
    );
    root.reload().unwrap();
    assert_eq!(judged(&root, &of_root), Ok(()));
}

#[test]
fn a_bad_folder_leaves_what_was_in_force() {
    let fleet = Fleet::new();
    let root = open(&fleet.root()).unwrap();
    let file = fleet.root().join("bundle.pem");
    let whole = fs::read(&file).unwrap();
    for torn in [&whole[..whole.len() / 2], b"", b"\xff"] {
        fs::write(&file, torn).unwrap();
        root.reload().unwrap_err();
        assert_eq!(judged(&root, &root.issue(&id()).unwrap()), Ok(()));
    }
    fs::write(&file, whole).unwrap();
    assert!(!root.reload().unwrap());
}

#[test]
fn a_ca_is_shown_with_what_each_root_is_for() {
    let fleet = Fleet::new();
    let roles = || {
        let shown = ca::show(&fleet.root()).unwrap();
        assert_eq!(shown.problem, None);
        let roles: Vec<_> = shown.roots.iter().map(|root| root.role).collect();
        roles
    };
    assert_eq!(roles(), [Role::Signs]);
    ca::prepare_root(&fleet.root(), YEAR).unwrap();
    assert_eq!(roles(), [Role::Signs, Role::Next]);
    ca::switch_root(&fleet.root()).unwrap();
    assert_eq!(roles(), [Role::Signs, Role::Trusted]);
    fleet.revoke("root", "a/intermediate.pem").unwrap_err();
    let shown = ca::show(&fleet.at("a")).unwrap();
    assert_eq!(shown.signer.len(), 1);
    assert_eq!(shown.roots[0].role, Role::Trusted);
    assert!(!format!("{shown:?}").contains("PRIVATE"));
}

#[test]
fn a_renewed_intermediate_leaves_revoked_what_the_node_had_revoked() {
    let fleet = Fleet::new();
    let out = fleet.at("out");
    let leaf = ca::issue(&fleet.at("a"), &id(), HOUR, &out)
        .unwrap()
        .remove(0);
    let serial = svid_rules::parse(&leaf).unwrap().raw_serial().to_vec();
    fleet.revoke("root", "b/intermediate.pem").unwrap();
    fleet.bring("crl.pem", "a");
    fleet.revoke("a", "out/svid.pem").unwrap();
    ca::renew_intermediate(&fleet.root(), &fleet.at("a"), YEAR).unwrap();
    let lists = ca::show(&fleet.at("a")).unwrap().revocation_lists;
    let mut revoked = lists.iter().flat_map(|list| &list.revoked);
    let serial = hex(crate::identity::revocation::without_zeros(&serial));
    assert!(revoked.any(|it| it.serial == serial), "{lists:?}");
    let a = open(&fleet.at("a")).unwrap();
    let chain = a.issue(&id()).unwrap();
    assert_eq!(judged(&a, &chain), Ok(()));
}
