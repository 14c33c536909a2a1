use std::path::Path;

use serde::Deserialize;

use super::{Located, Mistakes, nearest, parse, read, shown};

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
#[expect(dead_code, reason = "only its reading is tested")]
struct Farm {
    #[serde(default)]
    field_count: Option<u8>,
    #[serde(default)]
    animals: Vec<Located<Animal>>,
    #[serde(default)]
    fence: Option<Fence>,
}

#[derive(Debug, Deserialize)]
struct Animal {
    name: String,
    legs: u8,
}

#[derive(Debug, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum Fence {
    Open,
    Wire { height: u8 },
}

fn farm(text: &str) -> (Option<Farm>, Vec<String>) {
    let (documents, mut mistakes) = parse(Path::new("farm.yaml"), text);
    let farm = documents
        .first()
        .and_then(|document| read(document, &mut mistakes));
    let mut lines: Vec<_> = mistakes.iter().map(ToString::to_string).collect();
    lines.sort();
    (farm, lines)
}

#[test]
fn every_mistake_is_found_in_one_go() {
    let (farm, mistakes) = farm(
        "\
fieldcount: 3
animals:
  - name: 5
    legs: four
  - name: ox
    legs: 4
    horns: 2
  - legs: 400
  - [cow, 4]
  - name: hen
    legs: 2
fence: wall
",
    );
    assert_eq!(
        mistakes,
        [
            "farm.yaml:12:8: fence: `wall` is not known here; expected `open` or `wire`",
            "farm.yaml:1:1: fieldcount: there is no such field; did you mean `fieldCount`?",
            "farm.yaml:3:11: animals[0].name: `5` is not a text; write it in quotes: \"5\"",
            "farm.yaml:4:11: animals[0].legs: found the text `four`; expected u8",
            "farm.yaml:7:5: animals[1].horns: there is no such field; expected one of name, legs",
            "farm.yaml:8:11: animals[2].legs: found the number 400; expected u8",
            "farm.yaml:9:5: animals[3]: found a list; expected a mapping (`key: value`)",
        ]
    );
    let names: Vec<_> = farm
        .unwrap()
        .animals
        .into_iter()
        .map(|a| a.value.name)
        .collect();
    assert_eq!(names, ["ox", "hen"]);
}

#[test]
fn a_value_knows_where_it_was_written() {
    let text = "animals:\n- {name: ox, legs: 4}\n- {name: hen, legs: 2}\n";
    let (documents, mut mistakes) = parse(Path::new("farm.yaml"), text);
    let farm: Farm = read(&documents[0], &mut mistakes).unwrap();
    let hen = &farm.animals[1];
    assert_eq!(documents[0].line(hen.node), 3);
    assert_eq!(documents[0].path(hen.node), "animals[1]");
    assert_eq!(hen.legs, 2);
    let mistake = documents[0].mistake(hen.node, "is a bird");
    assert_eq!(mistake.to_string(), "farm.yaml:3:3: animals[1]: is a bird");
}

#[test]
fn a_missing_field_is_named_at_its_mapping() {
    let (_, mistakes) = farm("animals:\n- name: ox\n");
    assert_eq!(
        mistakes,
        ["farm.yaml:2:3: animals[0]: `legs` is missing; add it"]
    );
}

#[test]
fn variants_are_written_as_a_name_or_as_a_mapping() {
    assert_eq!(farm("fence: open").0.unwrap().fence, Some(Fence::Open));
    assert_eq!(
        farm("fence: {wire: {height: 2}}").0.unwrap().fence,
        Some(Fence::Wire { height: 2 })
    );
    for (text, what) in [
        ("fence: wire", "`wire` has settings; write `wire: {}`"),
        (
            "fence: {open: 1}",
            "`open` has no settings; write the name alone",
        ),
        ("fence: {}", "expected exactly one of open, wire"),
        ("fence: [open]", "found a list; expected one of open, wire"),
        (
            "fence: {wire: {heigth: 1, height: 1}}",
            "there is no such field; did you mean `height`?",
        ),
    ] {
        let (_, mistakes) = farm(text);
        assert_eq!(mistakes.len(), 1, "{mistakes:?}");
        assert!(mistakes[0].contains(what), "{mistakes:?}");
    }
}

#[test]
fn what_a_configuration_does_not_need_is_refused() {
    for (text, what) in [
        (
            "fieldCount: 1\nfieldCount: 2\n",
            "farm.yaml:2:1: `fieldCount` stands here a second time, first on line 1",
        ),
        (
            "animals: &a []\nfence: *a\n",
            "an alias (`*name`) is not supported",
        ),
        ("fieldCount: !!int 3\n", "a tag (`!name`) is not supported"),
        ("? [a, b]\n: 1\n", "a list or a mapping cannot be a key"),
        ("fieldCount: [\n", "is not YAML"),
        ("fieldCount: 'a\n", "is not YAML"),
        ("a: b: c\n", "is not YAML"),
    ] {
        let (_, mistakes) = farm(text);
        assert!(
            mistakes.iter().any(|m| m.contains(what)),
            "{text}: {mistakes:?}"
        );
    }
}

#[test]
fn deep_nesting_is_refused_and_not_followed() {
    for text in [
        "[".repeat(100_000),
        "- ".repeat(100_000),
        "{a: ".repeat(100_000),
    ] {
        let (_, mistakes) = farm(&text);
        assert!(!mistakes.is_empty());
    }
}

#[test]
fn a_file_of_mistakes_ends_early() {
    let text = format!("animals:\n{}", "- 1\n".repeat(10_000));
    let (_, mistakes) = farm(&text);
    assert_eq!(mistakes.len(), 100);
}

#[test]
fn documents_are_told_apart_and_empty_ones_left_out() {
    let (documents, mistakes) = parse(
        Path::new("x"),
        "---\n# nothing\n---\na: 1\n---\n---\nb: 2\n...\n",
    );
    assert!(mistakes.is_empty());
    assert_eq!(documents.len(), 2);
    assert_eq!(documents[1].line(documents[1].root()), 7);
}

#[test]
fn a_likely_name_is_proposed_and_no_other() {
    let fields = ["trustDomain", "stateDir", "serviceAccount", "ports"];
    for (name, near) in [
        ("trustdomain", Some("trustDomain")),
        ("trust_domain", Some("trustDomain")),
        ("port", Some("ports")),
        ("serviceAcount", Some("serviceAccount")),
        ("colour", None),
        ("", None),
    ] {
        assert_eq!(nearest(name, fields), near, "{name}");
    }
}

#[test]
fn text_in_a_message_stays_short_and_on_its_line() {
    assert_eq!(shown("a\nb\u{1b}[0m"), "a\\nb\\u{1b}[0m");
    assert_eq!(shown(&"x".repeat(100)).chars().count(), 61);
}

#[test]
fn no_text_makes_the_reader_panic() {
    use proptest::prelude::*;
    // Pieces of YAML's own grammar find more than random letters do.
    let piece = prop::sample::select(vec![
        "a",
        "b: ",
        ": ",
        "- ",
        "? ",
        "\n",
        "\n  ",
        "\n    ",
        "[",
        "]",
        "{",
        "}",
        ",",
        "'",
        "\"",
        "|\n",
        ">-\n",
        "&a ",
        "*a",
        "!t ",
        "!!str ",
        "# c\n",
        "---\n",
        "...\n",
        "%YAML 1.2\n",
        "%TAG ! x\n",
        "\t",
        "~",
        "1",
        "\\x",
        "\\u12",
        "é",
        "\u{feff}",
        "\u{85}",
        "\r\n",
        "\r",
        "<<: ",
        "@",
        "`",
        "0x",
        "\0",
        "animals:",
        "fence: ",
        "name: ",
        "|2\n",
        "|+9\n",
        "%",
        "\"\\\n",
    ]);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 20_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&prop::collection::vec(piece, 0..24), |pieces| {
            let (_, mistakes) = farm(&pieces.concat());
            let mut all = Mistakes::default();
            all.file(Path::new("x"), mistakes.join(""));
            Ok(())
        })
        .unwrap();
}
