//! Answers of agents, taken apart.

use std::collections::HashMap;

use super::{
    answer::{Answer, AnswerError, bundles},
    messages::{
        BundlesResponse, DelegatedResponse, IdMessage, SvidChain, SvidWithKey, X509Svid,
        X509SvidResponse,
    },
};
use crate::identity::{
    Denied, SourceError, SpiffeId, TrustDomain,
    tests::certs::{Authority, Issued},
};

const CART: &str = "spiffe://example.org/ns/shop/sa/cart";
const STOCK: &str = "spiffe://example.org/ns/shop/sa/stock";
const OTHER: &str = "other.example";

fn id(text: &str) -> SpiffeId {
    SpiffeId::parse(text).unwrap()
}

fn svid(root: &Authority, id: &str, issued: &Issued) -> X509Svid {
    X509Svid {
        spiffe_id: id.to_owned(),
        x509_svid: issued.chain.iter().flat_map(|der| der.to_vec()).collect(),
        x509_svid_key: issued.key.secret_pkcs8_der().to_vec(),
        bundle: root.certificate().to_vec(),
    }
}

fn response(svids: Vec<X509Svid>) -> X509SvidResponse {
    X509SvidResponse {
        svids,
        ..X509SvidResponse::default()
    }
}

fn federated(mut response: X509SvidResponse, name: &str, bundle: Vec<u8>) -> X509SvidResponse {
    response.federated_bundles.insert(name.to_owned(), bundle);
    response
}

#[test]
fn each_identity_gets_its_own_certificate_and_of_two_the_first() {
    let root = Authority::root("example.org");
    let intermediate = root.intermediate(|_| {});
    let (cart, again, stock) = (intermediate.leaf(CART), root.leaf(CART), root.leaf(STOCK));
    let answer = Answer::whole(response(vec![
        svid(&root, CART, &cart),
        svid(&root, STOCK, &stock),
        svid(&root, CART, &again),
    ]))
    .unwrap();
    let material = answer.material(&id(CART)).unwrap();
    assert_eq!(material.chain, cart.chain);
    assert_eq!(material.chain.len(), 2);
    assert_eq!(material.bundles.len(), 1);
    assert_eq!(answer.material(&id(STOCK)).unwrap().chain, stock.chain);
    let error = answer.material(&id("spiffe://example.org/x")).unwrap_err();
    let SourceError::Denied(Denied::NeverGranted(why)) = error else {
        panic!("{error}");
    };
    assert!(why.contains(CART) && why.contains(STOCK), "{why}");
    assert!(Answer::whole(response(Vec::new())).unwrap().is_empty());
}

#[test]
fn what_is_no_answer_is_refused_whole() {
    let root = Authority::root("example.org");
    let good = svid(&root, CART, &root.leaf(CART));
    let refused = |change: &dyn Fn(&mut X509Svid)| {
        let mut bad = good.clone();
        change(&mut bad);
        Answer::whole(response(vec![good.clone(), bad])).unwrap_err()
    };
    let certificates = |error| matches!(error, AnswerError::Certificates(_));
    assert!(certificates(refused(&|bad| bad.x509_svid.push(0))));
    assert!(certificates(refused(&|bad| {
        bad.x509_svid.pop();
    })));
    assert!(certificates(refused(&|bad| bad.bundle.push(0x30))));
    let is_id = |error| matches!(error, AnswerError::Id(..));
    assert!(is_id(refused(&|bad| bad.spiffe_id.clear())));
    assert!(is_id(refused(&|bad| bad.spiffe_id.push('/'))));
    // A leaf is no authority.
    let leaf = root.leaf(CART).chain[0].to_vec();
    let mut bad = good.clone();
    bad.bundle = leaf;
    let error = Answer::whole(response(vec![bad])).unwrap_err();
    assert!(matches!(error, AnswerError::Bundle(_)), "{error}");
    let mut bad = response(vec![good.clone()]);
    bad.crl.push(b"no list".to_vec());
    assert_eq!(Answer::whole(bad).unwrap_err(), AnswerError::RevocationList);
}

#[test]
fn a_federated_bundle_counts_unless_it_is_bad_or_speaks_for_ones_own_domain() {
    let (root, other) = (Authority::root("example.org"), Authority::root(OTHER));
    let whole = response(vec![svid(&root, CART, &root.leaf(CART))]);
    let domains = |response| {
        let answer = Answer::whole(response).unwrap();
        let bundles = answer.material(&id(CART)).unwrap().bundles;
        let named = |bundle: &std::sync::Arc<crate::identity::TrustBundle>| {
            (
                bundle.trust_domain().to_string(),
                bundle.certificates()[0].to_vec(),
            )
        };
        bundles.iter().map(named).collect::<HashMap<_, _>>()
    };
    let good = domains(federated(
        whole.clone(),
        "spiffe://other.example",
        other.certificate().to_vec(),
    ));
    assert_eq!(good[OTHER], other.certificate().to_vec());
    // The other trust domain's mistake is not ours.
    let leaf = other.leaf("spiffe://other.example/x").chain[0].to_vec();
    let bad = domains(federated(whole.clone(), OTHER, leaf));
    assert_eq!(bad.len(), 1);
    let forged = domains(federated(
        whole,
        "spiffe://example.org",
        other.certificate().to_vec(),
    ));
    assert_eq!(forged["example.org"], root.certificate().to_vec());
}

#[test]
fn a_revocation_list_goes_to_whoever_has_its_issuer() {
    let (root, other) = (Authority::root("example.org"), Authority::root(OTHER));
    let intermediate = root.intermediate(|_| {});
    let hour = time::Duration::hours(1);
    let lists = |of: &Authority| {
        let mut response = federated(
            response(vec![svid(&root, CART, &root.leaf(CART))]),
            OTHER,
            other.certificate().to_vec(),
        );
        response.crl.push(of.revocation_list(&[], hour).to_vec());
        let answer = Answer::whole(response).unwrap();
        let bundles = answer.material(&id(CART)).unwrap().bundles;
        let of = |domain: &str| {
            let found = bundles
                .iter()
                .find(|bundle| bundle.trust_domain().as_str() == domain);
            found.unwrap().revocation_lists()
        };
        (of("example.org"), of(OTHER))
    };
    assert_eq!(lists(&root), (1, 0));
    assert_eq!(lists(&other), (0, 1));
    // Of an authority that no bundle has: it may be one below ours.
    assert_eq!(lists(&intermediate), (1, 0));
}

#[test]
fn of_the_agents_bundles_a_delegated_identity_gets_those_that_are_its_own() {
    let (root, other) = (Authority::root("example.org"), Authority::root(OTHER));
    let all = BundlesResponse {
        ca_certificates: [
            (
                "spiffe://example.org".to_owned(),
                root.certificate().to_vec(),
            ),
            (OTHER.to_owned(), other.certificate().to_vec()),
        ]
        .into(),
    };
    let all = bundles(all).unwrap();
    let leaf = root.leaf(CART);
    let mut response = DelegatedResponse {
        x509_svids: vec![SvidWithKey {
            x509_svid: Some(SvidChain {
                cert_chain: leaf.chain.iter().map(|der| der.to_vec()).collect(),
                id: Some(IdMessage {
                    trust_domain: "example.org".to_owned(),
                    path: "/ns/shop/sa/cart".to_owned(),
                }),
            }),
            x509_svid_key: leaf.key.secret_pkcs8_der().to_vec(),
        }],
        federates_with: Vec::new(),
    };
    let domains = |response: &DelegatedResponse| {
        let answer = Answer::delegated(response, &all).unwrap();
        let material = answer.material(&id(CART)).unwrap();
        assert_eq!(material.chain, leaf.chain);
        let domains = material.bundles.iter();
        domains
            .map(|bundle| bundle.trust_domain().clone())
            .collect::<Vec<_>>()
    };
    let domain = |name: &str| TrustDomain::parse(name).unwrap();
    assert_eq!(domains(&response), [domain("example.org")]);
    response.federates_with.push(OTHER.to_owned());
    assert_eq!(domains(&response), [domain("example.org"), domain(OTHER)]);
}
