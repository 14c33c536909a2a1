//! The reference describes what the code reads, and nothing else.

use std::path::Path;

use super::{Config, file::RawConfig};
use crate::yaml::reference::{compare, example, rows};

const REFERENCE: &str = include_str!("../../../docs/configuration.md");

fn load(text: &str) -> Config {
    Config::parse(Path::new("/c.yaml"), text).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

#[test]
fn every_field_is_described_and_every_description_has_a_field() {
    compare::<RawConfig>(REFERENCE);
}

#[test]
fn the_example_with_every_field_is_valid() {
    let config = load(example(REFERENCE));
    assert_eq!(config.workloads.len(), 2);
    assert_eq!(config.peers.len(), 1);
}

#[test]
fn every_default_is_what_leaving_the_field_out_means() {
    const LISTS: [(&str, &str); 3] = [
        ("workloads", "name: w, cgroup: /w"),
        ("namespaces", "name: n"),
        ("peers", "name: p, addresses: [10.0.0.1], serviceAccount: p"),
    ];
    let mut compared = 0;
    for row in rows(REFERENCE) {
        let plain = row.default.strip_prefix('`');
        let Some(default) = plain.and_then(|default| default.strip_suffix('`')) else {
            continue;
        };
        let (with, without) = match row.field.split_once("[].") {
            Some((list, field)) => {
                let (_, item) = LISTS.iter().find(|(name, _)| *name == list).unwrap();
                let with = format!("{list}: [{{{item}, {field}: {default}}}]");
                (with, format!("{list}: [{{{item}}}]"))
            }
            None => {
                let mut fields = row.field.rsplit('.');
                let mut with = format!("{}: {default}", fields.next().unwrap());
                for field in fields {
                    with = format!("{field}: {{{with}}}");
                }
                (with, String::new())
            }
        };
        let with = load(&format!("trustDomain: a\n{with}\n"));
        let without = load(&format!("trustDomain: a\n{without}\n"));
        assert_eq!(with, without, "{}", row.field);
        compared += 1;
    }
    assert!(compared > 40, "{compared}");
}
