//! Documents: what README.md and docs/ tell people to type exists, what they show is accepted, and
//! where they point to there is something.

use std::{
    fs,
    path::{Path, PathBuf},
};

use harness::{Network, Node};

use crate::program::{Said, reeve};

#[test]
fn commands_that_documents_show_exist() {
    let mut seen = 0;
    for document in documents() {
        for block in blocks(&document)
            .into_iter()
            .filter(|block| block.language == "sh")
        {
            for command in commands(&block.text) {
                let line = format!("{}:{}: {command}", document.display(), block.line);
                let words: Vec<&str> = command.split_whitespace().collect();
                match words[..] {
                    ["cargo", "xtask", subcommand, ..] => assert!(is_xtask(subcommand), "{line}"),
                    ["reeve", ..] => accepts(&words[1..], &line),
                    _ => continue,
                }
                seen += 1;
            }
        }
    }
    assert!(seen >= 2, "README.md alone shows two");
}

#[test]
fn configurations_and_policies_that_documents_show_are_accepted() {
    let node = Node::new(&Network::new(), "documents");
    for document in documents() {
        let examples: Vec<_> = blocks(&document)
            .into_iter()
            .filter(|block| block.language == "yaml")
            .collect();
        let (policies, configurations): (Vec<_>, Vec<_>) = examples
            .iter()
            .partition(|block| block.text.contains("apiVersion:"));
        let name = document.file_stem().unwrap().to_str().unwrap();
        for (number, block) in configurations.iter().enumerate() {
            let folder = node.folder().join(format!("{name}-{number}"));
            fs::create_dir_all(folder.join("policies")).unwrap();
            let config = folder.join("reeve.yaml");
            fs::write(&config, &block.text).unwrap();
            // Policies of a page are those of its first configuration. Where there is none, nobody
            // knows whom they are about, and the daemon's own tests read them.
            if number == 0 {
                for (number, policy) in policies.iter().enumerate() {
                    let file = folder.join("policies").join(format!("{number}.yaml"));
                    fs::write(file, &policy.text).unwrap();
                }
            }
            for file in named_files(&block.text) {
                let file = folder.join(file);
                if !file.exists() {
                    fs::write(file, "").unwrap();
                }
            }
            accepted(&config, &format!("{}:{}", document.display(), block.line));
        }
    }
}

#[test]
fn examples_are_accepted() {
    let mut seen = 0;
    for config in files_below(&root().join("examples"), "yaml") {
        let text = fs::read_to_string(&config).unwrap();
        // Those with a configuration inside are run by a test of their own.
        if text.contains("trustDomain:") && !text.contains("kind: PolicyTest") {
            accepted(&config, &config.display().to_string());
            seen += 1;
        }
    }
    assert!(seen > 0, "there are no examples");
}

#[test]
fn links_lead_somewhere() {
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let target_file = document.parent().unwrap().join(target);
            assert!(target_file.exists(), "{}: {target}", document.display());
        }
    }
}

#[test]
fn folders_that_documents_name_exist() {
    for name in ["README.md", "ARCHITECTURE.md"] {
        let text = fs::read_to_string(root().join(name)).unwrap();
        for row in text.lines().filter(|line| line.starts_with("| `")) {
            let folder = row.split('`').nth(1).unwrap();
            if folder.ends_with('/') {
                assert!(root().join(folder).is_dir(), "{name}: {folder}");
            }
        }
        for file in text.split('`').skip(1).step_by(2) {
            let is_file = file.contains('/') && file.ends_with(".rs") && !file.contains(' ');
            assert!(!is_file || root().join(file).is_file(), "{name}: {file}");
        }
    }
}

#[test]
fn each_line_of_the_threat_model_names_tests_that_there_are() {
    let text = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let (_, table) = text.split_once("| threat |").unwrap();
    let rows = table
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let mut seen = 0;
    for row in rows {
        let tests = row.trim_end_matches(" |").rsplit("| ").next().unwrap();
        assert!(tests.starts_with('`'), "no test shows it: {row}");
        seen += 1;
    }
    assert!(seen >= 15, "the table has {seen} lines");
    let named = text.split('`').skip(1).step_by(2);
    for test in named.filter(|name| name.contains("::") && !name.contains(' ')) {
        let (file, function) = test.split_once("::").unwrap();
        let source = ["tests/e2e", "daemon/tests/datapath"]
            .iter()
            .filter_map(|folder| {
                fs::read_to_string(root().join(folder).join(format!("{file}.rs"))).ok()
            })
            .collect::<String>();
        let test_there = format!("#[test]\nfn {function}() {{");
        assert!(source.contains(&test_there), "SECURITY.md: {test}");
    }
}

// === documents ===

pub(crate) struct Block {
    pub(crate) language: String,
    line: usize,
    pub(crate) text: String,
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Every page that people read.
fn documents() -> Vec<PathBuf> {
    let mut documents = files_below(&root().join("docs"), "md");
    documents.extend(["README.md", "ARCHITECTURE.md", "SECURITY.md"].map(|name| root().join(name)));
    documents
}

fn files_below(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|found| found == extension) {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// The fenced blocks of a page.
pub(crate) fn blocks(document: &Path) -> Vec<Block> {
    let text = fs::read_to_string(document).unwrap();
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in text.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                open = Some(Block {
                    language: language.trim().to_owned(),
                    line: number + 1,
                    text: String::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => block.text.push_str(&format!("{line}\n")),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "{}: a block has no end", document.display());
    blocks
}

/// The commands of a block for a shell, without what the shell itself does.
fn commands(text: &str) -> Vec<String> {
    let lines = text.replace("\\\n", " ");
    let lines = lines.lines().map(|line| line.split(" #").next().unwrap());
    lines
        .flat_map(|line| line.split(['|', ';', '&']))
        .map(|command| {
            let command = command.split('>').next().unwrap().trim();
            let command = command.strip_prefix("sudo ").unwrap_or(command);
            command.trim_start_matches("$ ").to_owned()
        })
        .filter(|command| !command.is_empty() && !command.starts_with('#'))
        .collect()
}

/// The subcommands are modules, and some are only names.
fn is_xtask(subcommand: &str) -> bool {
    let source = fs::read_to_string(root().join("xtask/src/main.rs")).unwrap();
    let mut name = subcommand.to_owned();
    name[..1].make_ascii_uppercase();
    let (from, to) = (
        source.find("enum Command").unwrap(),
        source.find("fn main").unwrap(),
    );
    let variants = &source[from..to];
    subcommand == "help"
        || variants.contains(&format!("    {name},"))
        || variants.contains(&format!("    {name}("))
}

/// Fails the test unless `reeve` knows these words; they are not executed.
fn accepts(words: &[&str], line: &str) {
    let (subcommand, mut rest) = words.split_first().unwrap_or((&"--help", &[]));
    let help_of = |words: &[&str]| {
        let help = reeve(&[words, &["--help"]].concat());
        assert!(help.status.success(), "{line}");
        String::from_utf8_lossy(&help.stdout).into_owned()
    };
    let mut help = help_of(&[subcommand]);
    // A command that has commands of its own lists them.
    if let Some((second, after)) = rest.split_first()
        && help.contains(&format!("\n  {second} "))
    {
        (help, rest) = (help_of(&[subcommand, second]), after);
    }
    for flag in rest.iter().filter(|word| word.starts_with('-')) {
        let flag = flag.split('=').next().unwrap();
        assert!(help.contains(flag), "{line}: there is no {flag}");
    }
}

/// Files that a configuration names and that have to be there, relative to itself.
fn named_files(config: &str) -> Vec<&str> {
    let line = config
        .lines()
        .find_map(|line| line.trim().strip_prefix("files: ["));
    let names = line.and_then(|line| line.strip_suffix(']')).unwrap_or("");
    names.split(", ").filter(|name| !name.is_empty()).collect()
}

fn accepted(config: &Path, shown: &str) {
    let checked = reeve(&["check", "--config", config.to_str().unwrap()]);
    assert_eq!(checked.code(), 0, "{shown}: {}", checked.err());
}
