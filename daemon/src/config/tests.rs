use std::path::Path;

use super::{Config, ConfigErrors};

fn load(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(Path::new("/etc/reeve/reeve.yaml"), text)
}

fn mistakes(text: &str) -> Vec<String> {
    let errors = load(text).expect_err("the text has a mistake");
    errors.iter().map(ToString::to_string).collect()
}

#[test]
fn a_trust_domain_is_enough() {
    let config = load("trustDomain: example.org").unwrap();
    assert_eq!(config.trust_domain.as_str(), "example.org");
    assert_eq!(config.state_dir, Path::new("/var/lib/reeve"));
    assert_eq!(
        config.metrics.address.unwrap().to_string(),
        "127.0.0.1:15020"
    );
    assert_eq!(config.ports, super::Ports::default());
    assert!(config.workloads.is_empty());
}

#[test]
fn there_is_room_for_every_workload_that_is_declared() {
    let text = |room: &str| {
        format!(
            "\
trustDomain: example.org
workloads:
- {{name: web, unit: nginx.service}}
- {{name: cart, cgroup: /shop/cart}}
enforcedParents: [/shop]
{room}"
        )
    };
    load(&text("maps: {workloads: 5}")).unwrap();
    load(&text("")).unwrap();
    assert_eq!(
        mistakes(&text("maps:\n  workloads: 4\n")),
        [
            "/etc/reeve/reeve.yaml:7:14: maps.workloads: `maps.workloads` is 4; the workloads and enforced parents \
          that are declared need room for 5 cgroups, reeve's own among them; raise it"
        ]
    );
}

#[test]
fn a_workload_has_an_identity_by_its_names() {
    let config = load(
        "\
trustDomain: example.org
workloads:
- {name: web, unit: nginx.service}
- {name: cart, namespace: shop, serviceAccount: basket, cgroup: /shop/cart, labels: {app: cart}}
- {name: pay, spiffeId: spiffe://example.org/ns/money/sa/pay-1, cgroup: /pay}
",
    )
    .unwrap();
    let ids: Vec<_> = config
        .workloads
        .iter()
        .map(|w| {
            (
                w.id,
                w.attributes.namespace.as_str(),
                w.attributes.spiffe_id.as_str(),
            )
        })
        .collect();
    assert_eq!(
        ids,
        [
            (1, "default", "spiffe://example.org/ns/default/sa/web"),
            (2, "shop", "spiffe://example.org/ns/shop/sa/basket"),
            (3, "money", "spiffe://example.org/ns/money/sa/pay-1"),
        ]
    );
}

#[test]
fn a_peer_has_an_identity_only_if_one_is_given() {
    let config = load(
        "\
trustDomain: example.org
ports: {tunnel: 16000}
peers:
- {name: gateway, addresses: [10.0.0.1, 10.9.0.0/16]}
- {name: db, addresses: [10.0.0.2], namespace: shop}
- {name: old, addresses: ['2001:db8::3'], namespace: shop, tunnel: false}
- {name: far, addresses: [10.0.0.4], spiffeId: spiffe://other.org/x, tunnel: 17000}
",
    )
    .unwrap();
    let peers: Vec<_> = config
        .peers
        .iter()
        .map(|p| (p.id, p.attributes.is_some(), p.tunnel_port))
        .collect();
    assert_eq!(
        peers,
        [
            (0x10000, false, None),
            (0x10001, true, Some(16000)),
            (0x10002, true, None),
            (0x10003, true, Some(17000)),
        ]
    );
}

#[test]
fn relative_paths_start_at_the_file() {
    let config =
        load("{trustDomain: example.org, stateDir: state, policies: {folder: ../p}}").unwrap();
    assert_eq!(config.state_dir, Path::new("/etc/reeve/state"));
    assert_eq!(
        config.policies.folder.as_deref(),
        Some(Path::new("/etc/reeve/../p"))
    );
    let [(name, super::Source::Embedded(ca))] = &config.certificates.sources[..] else {
        panic!("there is one source");
    };
    assert_eq!(name, "embedded");
    assert_eq!(ca.ca_dir, Path::new("/etc/reeve/state/ca"));
}

#[test]
fn all_mistakes_are_reported_with_their_places() {
    let found = mistakes(
        "\
trustdomain: example.org
workloads:
- name: web
  cgroup: /web
  unit: web.service
- cgroup: web
- {name: web, unit: x}
- {name: b, cgroup: /b, ports: [0, '80'], addresses: [10.0.0.300]}
peers:
- {name: db, addresses: [10.0.0.1]}
- {name: db2, addresses: [10.0.0.1, 10.0.0.1/8], tunnel: yes}
- {name: empty}
limits: {connections: 0, streamWindow: 4MB, headerList: 4}
timeouts: {connect: 0s, idle: 5}
metrics: {address: localhost}
log: {format: jsn}
certificates: {vault: {}}
",
    );
    let wanted = [
        "1:1: `trustDomain` is missing; add it",
        "1:1: trustdomain: there is no such field; did you mean `trustDomain`?",
        "3:3: workloads[0]: has `cgroup` and `unit`; keep one of them",
        "6:3: workloads[1]: `name` is missing; add it",
        "6:11: workloads[1].cgroup: `web` has no slash at its beginning",
        "7:10: workloads[2].name: `web` is given already on line 3",
        "7:21: workloads[2].unit: `x` is not the name of a unit",
        "8:33: workloads[3].ports[0]: found the number 0; expected a port from 1 to 65535",
        "8:36: workloads[3].ports[1]: \"80\" is a text; write 80 without quotes",
        "8:55: workloads[3].addresses[0]: `10.0.0.300` is not an address",
        "11:27: peers[1].addresses[0]: `10.0.0.1/32` belongs to the peer on line 10 already",
        "11:37: peers[1].addresses[1]: `10.0.0.1/8` has bits set after its prefix",
        "11:58: peers[1].tunnel: found the text `yes`; expected `true`, `false`, or the port",
        "12:3: peers[2]: has no `addresses`",
        "13:23: limits.connections: found the number 0; expected a whole number from 1",
        "13:57: limits.headerList: found the number 4; expected a size from 1024",
        "14:21: timeouts.connect: found a duration of zero",
        "14:31: timeouts.idle: found the number 5; expected a duration, as in `30s`",
        "15:20: metrics.address: `localhost` is not an address with a port",
        "16:15: log.format: `jsn` is not known here; expected `text` or `json`; did you mean `json`?",
        "17:16: certificates.vault: there is no such field; expected one of sources, trustBundles, revocationLists",
    ];
    for (found, wanted) in found.iter().zip(wanted) {
        let line = format!("/etc/reeve/reeve.yaml:{wanted}");
        assert!(found.starts_with(&line), "found:  {found}\nwanted: {line}");
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn a_profile_is_narrowed_and_not_widened() {
    use crate::identity::{CipherSuite, CryptoProfile, CryptoRules};
    let tls = |text: &str| load(&format!("trustDomain: a\ntls: {text}\n")).map(|read| read.tls);
    assert_eq!(tls("{}").unwrap(), CryptoRules::default());
    let fips = CryptoRules::of(CryptoProfile::Fips);
    assert_eq!(tls("{profile: fips}").unwrap(), fips);
    let narrowed = tls("{profile: fips, cipherSuites: [TLS_AES_256_GCM_SHA384]}").unwrap();
    assert_eq!(narrowed.cipher_suites, [CipherSuite::Aes256Gcm]);
    assert_eq!(narrowed.groups, fips.groups);
    for (text, wanted) in [
        (
            "{profile: fips, groups: [x25519]}",
            "2:30: tls.groups: has something that the profile",
        ),
        ("{keyTypes: []}", "2:17: tls.keyTypes: is empty"),
        ("{minRsaBits: 1024}", "2:19: tls.minRsaBits"),
        (
            "{maxLifetime: 0s}",
            "2:20: tls.maxLifetime: found a duration of zero",
        ),
        (
            "{groups: [x448]}",
            "2:16: tls.groups[0]: `x448` is not known here",
        ),
    ] {
        let found = mistakes(&format!("trustDomain: a\ntls: {text}\n"));
        assert!(
            found.len() == 1 && found[0].contains(wanted),
            "{wanted}: {found:?}"
        );
    }
}

#[test]
fn the_file_itself_can_be_wrong() {
    for (text, what) in [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n", "found a list; expected a mapping"),
        (
            "trustDomain: a\n---\ntrustDomain: b\n",
            "is a second document",
        ),
        ("trustDomain: [", "is not YAML"),
    ] {
        let found = mistakes(text);
        assert!(found[0].contains(what), "{text:?}: {found:?}");
    }
    let missing = Config::load(Path::new("/nonexistent/reeve.yaml")).unwrap_err();
    assert!(
        missing
            .to_string()
            .contains("/nonexistent/reeve.yaml: could not be read")
    );
    let folder = Config::load(Path::new("/")).unwrap_err();
    assert!(
        folder.to_string().contains("not a regular file"),
        "{folder}"
    );
}

#[test]
fn peers_share_an_address_by_different_ports_only() {
    let peers = |first: &str, second: &str| {
        load(&format!(
            "{{trustDomain: a, peers: [{{name: a, addresses: [{first}}}, {{name: b, addresses: [{second}}}]}}"
        ))
    };
    assert!(peers("10.0.0.1], ports: [1]", "10.0.0.1], ports: [2]").is_ok());
    assert!(peers("10.0.0.1], ports: [1]", "10.0.0.1]").is_ok());
    assert!(peers("10.0.0.0/8]", "10.0.0.1]").is_ok());
    assert!(peers("10.0.0.1], ports: [1]", "10.0.0.1], ports: [1]").is_err());
    assert!(peers("10.0.0.1]", "10.0.0.1]").is_err());
    assert!(peers("10.0.0.0/8], ports: [1]", "10.0.0.0/8], ports: [2]").is_err());
}

#[test]
fn an_identity_says_one_thing() {
    let workload = |fields: &str| {
        load(&format!(
            "{{trustDomain: a, workloads: [{{name: w, cgroup: /w, {fields}}}]}}"
        ))
    };
    assert!(workload("spiffeId: spiffe://a/any/path, namespace: n").is_ok());
    assert!(workload("spiffeId: spiffe://a/ns/n/sa/s, namespace: n").is_ok());
    assert!(workload("spiffeId: spiffe://a/ns/n/sa/s, namespace: m").is_err());
    assert!(workload("spiffeId: spiffe://b/ns/n/sa/s").is_err());
}

#[test]
fn a_workload_gets_its_certificate_from_the_source_that_it_names_or_the_first() {
    let config = load(
        "\
trustDomain: a
certificates: {sources: [{embedded: {}}, {name: other, embedded: {caDir: /ca}}]}
workloads:
- {name: v, cgroup: /v}
- {name: w, cgroup: /w, certificates: other}
",
    )
    .unwrap();
    let sources: Vec<_> = config
        .workloads
        .iter()
        .map(|workload| config.certificates.source_of(workload))
        .collect();
    assert_eq!(sources, ["embedded", "other"]);
}

#[test]
fn an_agent_as_source_needs_its_socket_and_workloads_that_there_are() {
    let found = mistakes(
        "\
trustDomain: a
certificates:
  sources:
  - {workloadApi: {}}
  - {embedded: {}, broker: {}}
  - {broker: {socket: s, agent: spiffe://a/agent}}
  - delegatedIdentity: {socket: s, selectors: {wbe: [\"unix:uid:0\"]}}
  - {name: x, delegatedIdentity: {socket: s, selectors: {web: [unix]}}}
workloads:
- {name: web, cgroup: /web}
",
    );
    let wanted = [
        "4:19: certificates.sources[0].workloadApi: `socket` is missing; add it",
        "5:5: certificates.sources[1]: is several things, embedded and broker; keep one",
        "6:14: certificates.sources[2].broker: `identity` is missing; add it",
        "6:14: certificates.sources[2].broker: `workloadApi` is missing; add it",
        "7:24: certificates.sources[3].delegatedIdentity: has selectors of `wbe`, which is no \
         workload; did you mean `web`?",
        "8:64: certificates.sources[4].delegatedIdentity.selectors.web[0]: `unix` is no selector; \
         write `TYPE:VALUE`, as in `k8s:ns:shop`",
    ];
    for wanted in wanted {
        let line = format!("/etc/reeve/reeve.yaml:{wanted}");
        assert!(
            found.iter().any(|found| found.starts_with(&line)),
            "{line}\n{found:#?}"
        );
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn sources_that_cannot_be_told_apart_or_are_not_there_are_mistakes() {
    let found = mistakes(
        "\
trustDomain: a
certificates:
  sources:
  - embedded: {}
  - embedded: {}
  - {name: other, embedded: {caDir: ca}}
  - {name: nothing}
workloads:
- {name: v, cgroup: /v, certificates: othr}
- {name: w, cgroup: /w, serviceAccount: s}
- {name: x, cgroup: /x, serviceAccount: s, certificates: other}
",
    );
    let wanted = [
        "5:5: certificates.sources[1]: has the name `embedded`, as the source on line 4 does",
        "7:5: certificates.sources[3]: does not say what it is; add `embedded: {}`, `files`, \
         `workloadApi`, `delegatedIdentity` or `broker`",
        "9:39: workloads[0].certificates: `othr` is no source of `certificates.sources`; did you \
         mean `other`?",
        "11:3: workloads[2]: gets the identity `spiffe://a/ns/default/sa/s` from `other`, and the \
         workload on line 10 gets it from `embedded`",
    ];
    for (found, wanted) in found.iter().zip(wanted) {
        let line = format!("/etc/reeve/reeve.yaml:{wanted}");
        assert!(found.starts_with(&line), "found:  {found}\nwanted: {line}");
    }
    assert_eq!(found.len(), wanted.len(), "{found:#?}");
}

#[test]
fn files_have_the_names_that_cert_manager_gives_them() {
    let config = load(
        "{trustDomain: a, certificates: {sources: [{files: {folder: 'tls/{serviceAccount}'}}]}}",
    )
    .unwrap();
    let [(name, super::Source::Files(files))] = &config.certificates.sources[..] else {
        panic!("there is one source, of files");
    };
    let pattern = |text| crate::identity::PathPattern::parse(text).unwrap();
    assert_eq!(name, "files");
    assert_eq!(files.folder, pattern("/etc/reeve/tls/{serviceAccount}"));
    assert_eq!(files.certificate, pattern("tls.crt"));
    assert_eq!(files.key, pattern("tls.key"));
    assert_eq!(files.bundle, Some(pattern("ca.crt")));
    assert_eq!(files.revocation_lists, None);
    let found = mistakes(
        "{trustDomain: a, certificates: {sources: [{files: {folder: '/{name}'}}, \
         {files: {}, embedded: {}}]}}",
    );
    assert!(found[0].contains("expected one of {namespace}, {serviceAccount}, {path}"));
    assert!(found[1].contains("is several things, embedded and files; keep one"));
}

#[test]
fn other_ids_are_those_of_workloads_and_then_of_peers() {
    let config = load(
        "{trustDomain: a, workloads: [{name: a, cgroup: /a}, {name: b, cgroup: /b}], \
         peers: [{name: c, addresses: [192.0.2.1]}]}",
    );
    let config = config.unwrap().with_ids([7, 9, 8]);
    let workloads: Vec<_> = config.workloads.iter().map(|found| found.id).collect();
    assert_eq!((workloads, config.peers[0].id), (vec![7, 9], 8));
}

#[test]
fn metrics_can_be_switched_off() {
    let config = load("{trustDomain: a, metrics: {address: null}}").unwrap();
    assert_eq!(config.metrics.address, None);
}

#[test]
fn bundle_endpoints_have_what_their_profile_needs_and_nothing_else() {
    let with = |endpoints: &str, more: &str| {
        load(&format!(
            "{{trustDomain: a, certificates: {{bundleEndpoints: [{endpoints}]{more}}}}}"
        ))
    };
    let web = "{trustDomain: b, url: 'https://b/', profile: https_web}";
    let id = "profile: https_spiffe, spiffeId: 'spiffe://c/publisher'";
    let spiffe = format!("{{trustDomain: c, url: 'https://c/', {id}, bootstrap: c.pem}}");
    let config = with(&format!("{web}, {spiffe}"), "").unwrap();
    let endpoints = config.certificates.bundle_endpoints;
    assert_eq!(endpoints[0].url.as_str(), "https://b/");
    assert_eq!(endpoints[0].profile.as_str(), "https_web");
    assert_eq!(
        endpoints[1].bootstrap(),
        Some(&Path::new("/etc/reeve/c.pem").to_owned())
    );
    // Somebody else's bundle may be at hand already.
    let mirror = format!("{{trustDomain: d, url: 'https://d/', {id}}}");
    with(&format!("{spiffe}, {mirror}"), "").unwrap();
    with(&mirror, ", trustBundles: {c: c.pem}").unwrap();

    for (endpoints, more, why) in [
        ("{}", "", "`trustDomain` is missing"),
        (
            "{trustDomain: b, profile: https_web}",
            "",
            "`url` is missing",
        ),
        (
            "{trustDomain: b, url: 'https://b/'}",
            "",
            "`profile` is missing",
        ),
        (
            "{trustDomain: b, url: 'http://b/', profile: https_web}",
            "",
            "not an `https` URL",
        ),
        (
            "{trustDomain: b, url: 'https://b/', profile: web}",
            "",
            "https_web",
        ),
        (
            "{trustDomain: a, url: 'https://a/', profile: https_web}",
            "",
            "own trust domain",
        ),
        (
            &format!("{web}, {web}"),
            "",
            "has an endpoint already, on line 1",
        ),
        (
            web,
            ", trustBundles: {b: b.pem}",
            "has a file in `trustBundles`",
        ),
        (
            "{trustDomain: b, url: 'https://b/', profile: https_web, bootstrap: b.pem}",
            "",
            "has `bootstrap`, which the profile `https_web` has no use for",
        ),
        (
            "{trustDomain: b, url: 'https://b/', profile: https_spiffe}",
            "",
            "`spiffeId` is missing",
        ),
        (
            &mirror,
            "",
            "has no bundle of `c` to check its first answer with",
        ),
    ] {
        let mistakes = with(endpoints, more).unwrap_err().to_string();
        assert!(mistakes.contains(why), "{why}: {mistakes}");
    }
}

/// The examples that stand for a whole node.
const EXAMPLES: [&str; 5] = [
    "federation.yaml",
    "minimal.yaml",
    "two-nodes/node-a.yaml",
    "two-nodes/node-b.yaml",
    "systemd.yaml",
];

fn examples() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples")
}

#[test]
fn every_example_is_valid_and_its_policies_do_something() {
    for name in EXAMPLES {
        let summary = super::check(&examples().join(name)).unwrap_or_else(|m| panic!("{m}"));
        assert_eq!(summary.warnings, [""; 0], "{name}");
        assert!(
            summary.workloads > 0 && summary.rules > 0,
            "{name}: {summary}"
        );
    }
}

#[test]
fn no_example_is_forgotten() {
    let mut found: Vec<_> = ["", "two-nodes"]
        .iter()
        .flat_map(|folder| examples().join(folder).read_dir().unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "yaml"))
        // Policies are read with the configuration that names them.
        .filter(|path| !path.to_string_lossy().ends_with("-policy.yaml"))
        .collect();
    found.sort();
    let mut wanted: Vec<_> = EXAMPLES.iter().map(|name| examples().join(name)).collect();
    wanted.sort();
    assert_eq!(found, wanted);
}

#[test]
fn a_check_reports_the_mistakes_of_all_files() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    };
    let file = write(
        "reeve.yaml",
        "{trustDomain: A, policies: {folder: p, files: [q.yaml]}}",
    );
    write("p/2.yaml", "kind: ConnectionPolicy\n");
    write("p/1.yml", "a: [\n");
    write("p/.hidden.yaml", "a: [\n");
    write("p/notes.txt", "a: [\n");
    let mistakes = super::check(&file).unwrap_err();
    let files: Vec<_> = mistakes
        .iter()
        .map(|m| {
            m.file
                .strip_prefix(folder.path())
                .unwrap()
                .to_str()
                .unwrap()
        })
        .collect();
    assert_eq!(files, ["p/1.yml", "p/2.yaml", "q.yaml", "reeve.yaml"]);
}

#[test]
fn a_check_says_what_will_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("reeve.yaml");
    let text = "{trustDomain: a, maps: {peers: 1}, workloads: [{name: w, cgroup: /w}], \
                peers: [{name: p, addresses: [10.0.0.1, 10.0.0.2]}]}";
    std::fs::write(&file, text).unwrap();
    let mistakes = super::check(&file).unwrap_err().to_string();
    assert!(mistakes.contains("`maps.peers`"), "{mistakes}");
}
