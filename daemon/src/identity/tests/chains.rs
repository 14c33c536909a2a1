//! How long a chain is good: as long as the certificate on its path that expires first.

use std::time::{Duration, SystemTime};

use time::OffsetDateTime;

use super::{
    certs::{Authority, Issued},
    handshake::{PEERS, bundle, bundles},
    *,
};

/// A whole second, as times in certificates are.
fn in_seconds(seconds: i64) -> OffsetDateTime {
    let now = OffsetDateTime::now_utc().replace_nanosecond(0).unwrap();
    now + time::Duration::seconds(seconds)
}

fn judged(issued: &Issued, roots: &[&Authority], at: SystemTime) -> Result<Verified, RejectReason> {
    let bundles = bundles([bundle("example.org", roots)]);
    let (leaf, above) = issued.chain.split_first().unwrap();
    verify_chain(&bundles, leaf, above, at)
}

#[test]
fn each_certificate_of_a_path_counts_to_its_end_and_not_a_moment_longer() {
    let end = in_seconds(600);
    let ends = |params: &mut rcgen::CertificateParams| params.not_after = end;
    let root = Authority::root("example.org");
    let ending = Authority::root_with("example.org", ends);
    for (issued, root, reason) in [
        (root.leaf_with(PEERS, ends), &root, RejectReason::Expired),
        (
            root.intermediate(ends).leaf(PEERS),
            &root,
            RejectReason::Expired,
        ),
        (ending.leaf(PEERS), &ending, RejectReason::AnchorValidity),
        (
            ending.intermediate(|_| {}).leaf(PEERS),
            &ending,
            RejectReason::AnchorValidity,
        ),
    ] {
        let end = SystemTime::from(end);
        let verified = judged(&issued, &[root], end).unwrap();
        assert_eq!(verified.not_after, end);
        let later = end + Duration::from_millis(1);
        assert_eq!(judged(&issued, &[root], later), Err(reason));
    }
}

#[test]
fn each_certificate_of_a_path_counts_from_its_start_on() {
    let start = in_seconds(600);
    let starts = |params: &mut rcgen::CertificateParams| params.not_before = start;
    let root = Authority::root("example.org");
    let starting = Authority::root_with("example.org", starts);
    for (issued, root, reason) in [
        (
            root.leaf_with(PEERS, starts),
            &root,
            RejectReason::NotYetValid,
        ),
        (
            root.intermediate(starts).leaf(PEERS),
            &root,
            RejectReason::NotYetValid,
        ),
        (
            starting.leaf(PEERS),
            &starting,
            RejectReason::AnchorValidity,
        ),
    ] {
        let start = SystemTime::from(start);
        assert!(judged(&issued, &[root], start).is_ok());
        let earlier = start - Duration::from_millis(1);
        assert_eq!(judged(&issued, &[root], earlier), Err(reason));
    }
}

#[test]
fn of_several_paths_the_one_that_lasts_longest_counts() {
    let (soon, late) = (in_seconds(60), in_seconds(1800));
    let old = Authority::root_with("example.org", |params| params.not_after = soon);
    let new = old.reissued(|params| params.not_after = late);
    let issued = old.leaf_with(PEERS, |params| params.not_after = in_seconds(3000));
    let now = SystemTime::now();
    for roots in [[&old, &new], [&new, &old]] {
        let verified = judged(&issued, &roots, now).unwrap();
        assert_eq!(verified.not_after, SystemTime::from(late));
        assert_eq!(verified.signer.not_after, SystemTime::from(late));
    }
    // A certificate that is presented and not needed shortens nothing.
    let mut more = issued;
    let spare = old.intermediate(|params| params.not_after = in_seconds(-60));
    more.chain.push(spare.certificate());
    let verified = judged(&more, &[&new], now).unwrap();
    assert_eq!(verified.not_after, SystemTime::from(late));
    assert!(verified.intermediates.is_empty());
}
