//! What `cargo xtask dist` makes, with the binary linked as a release's is: everything that belongs to
//! it, checksums that fit, a manual that can be read, a list of what is inside, and the same bytes
//! each time.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::OnceLock,
};

use harness::{Network, Node};
use serde_json::Value;

use crate::{
    deploy::beside_target,
    documents::{blocks, root},
};

/// Seconds since 1970 that these releases carry.
const EPOCH: &str = "1750000000";

#[test]
fn a_release_has_all_that_belongs_to_it() {
    let release = Release::get();
    for file in [
        "bin/reeve",
        "deploy/reeve.service",
        "deploy/reeve-guard.service",
        "deploy/Containerfile",
        "deploy/kubernetes/reeve.yaml",
        "deploy/prometheus/alerts.yaml",
        "deploy/grafana/reeve.json",
        "docs/deploy.md",
        "examples/minimal.yaml",
        "share/completions/_reeve",
        "share/completions/reeve.bash",
        "share/completions/reeve.fish",
        "share/man/man1/reeve.1",
        "share/man/man1/reeve-ca-issue.1",
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "THIRD-PARTY.md",
        "reeve.cdx.json",
        "SHA256SUMS",
    ] {
        assert!(release.folder.join(file).is_file(), "{file}");
    }
    // Whom a unit's `Documentation=` sends to a manual finds it.
    for unit in ["reeve.service", "reeve-guard.service"] {
        let text = fs::read_to_string(release.folder.join("deploy").join(unit)).unwrap();
        let (_, page) = text.split_once("Documentation=man:").unwrap();
        let (name, _) = page.split_once("(1)").unwrap();
        let page = release.folder.join(format!("share/man/man1/{name}.1"));
        assert!(page.is_file(), "{unit}: {name}");
    }
    let reeve = release.folder.join("bin/reeve");
    let version = run(Command::new(reeve).arg("--version"));
    assert!(version.starts_with("reeve "), "{version}");
}

#[test]
fn the_documented_installation_puts_everything_where_it_is_looked_for() {
    let release = Release::get();
    let page = blocks(&release.folder.join("docs/deploy.md"));
    let block = page.iter().find(|block| block.text.contains("install -D"));
    let root = release_folder("installed");
    // In a folder instead of this machine's own.
    let mut script = block.unwrap().text.clone();
    for top in ["/usr/local/", "/etc/"] {
        script = script.replace(&format!(" {top}"), &format!(" {}{top}", root.display()));
    }
    run(Command::new("sh")
        .args(["-euc", &script])
        .current_dir(&release.folder));
    for unit in ["reeve.service", "reeve-guard.service"] {
        let unit = root.join("etc/systemd/system").join(unit);
        let text = fs::read_to_string(unit).unwrap();
        let (_, command) = text.split_once("ExecStart=/").unwrap();
        let program = root.join(command.split(' ').next().unwrap());
        run(Command::new(program).arg("--version"));
    }
    let manual = root.join("usr/local/share/man");
    let found = Command::new("man")
        .arg("--manpath")
        .arg(manual)
        .args(["--where", "reeve-ca-issue"])
        .output();
    assert!(found.unwrap().status.success());
    for (shell, file) in [
        ("bash", "bash-completion/completions/reeve"),
        ("zsh", "zsh/site-functions/_reeve"),
        ("fish", "fish/vendor_completions.d/reeve.fish"),
    ] {
        let made = run(Command::new(root.join("usr/local/bin/reeve")).args(["completions", shell]));
        let installed = fs::read_to_string(root.join("usr/local/share").join(file));
        assert_eq!(installed.unwrap(), made, "{shell}");
    }
}

#[test]
fn the_checksums_fit_and_nothing_is_left_out() {
    let release = Release::get();
    let checked = run(Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(&release.folder));
    let packed = run(Command::new("tar").arg("-tf").arg(&release.tarball));
    // All but the list itself.
    assert_eq!(checked.lines().count(), packed.lines().count() - 1);
    let beside = run(Command::new("sha256sum")
        .args(["--check", "--strict", "SHA256SUMS"])
        .current_dir(release.tarball.parent().unwrap()));
    for kind in ["tar.gz: OK", "cdx.json: OK", "oci.tar: OK"] {
        assert!(beside.contains(kind), "{beside}");
    }
}

#[test]
fn the_tarball_tells_nothing_of_who_packed_it_and_when() {
    let release = Release::get();
    let listed = run(Command::new("tar")
        .args(["--verbose", "--numeric-owner", "--utc", "-tf"])
        .arg(&release.tarball));
    let mut paths = Vec::new();
    for line in listed.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        let path = words[5];
        let mode = match path.contains("/bin/") {
            true => "-rwxr-xr-x",
            false => "-rw-r--r--",
        };
        assert_eq!(words[..2], [mode, "0/0"], "{line}");
        assert_eq!(words[3..5], ["2025-06-15", "15:06"], "{line}");
        paths.push(path.to_owned());
    }
    let mut sorted = paths.clone();
    sorted.sort();
    assert_eq!(paths, sorted);
    // Of gzip's header: no flags, so no name, and no time.
    let bytes = fs::read(&release.tarball).unwrap();
    assert_eq!(bytes[3..8], [0; 5]);

    let again = Release::make("again");
    let sums = |release: &Release| {
        fs::read_to_string(release.tarball.with_file_name("SHA256SUMS")).unwrap()
    };
    let image_of = |release: &Release| index(release)["manifests"][0]["digest"].clone();
    let of_files = |sums: String| {
        let lines = sums.lines().filter(|line| !line.contains(".oci.tar"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(of_files(sums(release)), of_files(sums(&again)));
    assert_eq!(image_of(release), image_of(&again));
}

#[test]
fn the_manual_can_be_read() {
    let release = Release::get();
    let pages: Vec<_> = fs::read_dir(release.folder.join("share/man/man1"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(pages.len() > 15, "{pages:?}");
    for page in pages {
        let mut man = Command::new("man");
        man.args(["--warnings=w", "--local-file"])
            .arg(&page)
            .envs([("LC_ALL", "C.UTF-8"), ("MANWIDTH", "100")]);
        let shown = man.output().unwrap();
        let errors = String::from_utf8_lossy(&shown.stderr);
        assert!(shown.status.success(), "{}: {errors}", page.display());
        assert_eq!(errors, "", "{}", page.display());
        let text = String::from_utf8_lossy(&shown.stdout);
        for part in ["NAME", "SYNOPSIS", "DESCRIPTION"] {
            assert!(text.contains(part), "{}: {part}", page.display());
        }
    }
    let run_page = release.folder.join("share/man/man1/reeve-run.1");
    let text = fs::read_to_string(run_page).unwrap();
    assert!(text.contains("\nreeve run \\-\\-takeover\n"), "{text}");
}

#[test]
fn the_bill_of_materials_has_all_that_is_in_the_binary() {
    let release = Release::get();
    let file = release.folder.join("reeve.cdx.json");
    let check = "import sys\n\
        from cyclonedx.schema import SchemaVersion\n\
        from cyclonedx.validation.json import JsonStrictValidator\n\
        error = JsonStrictValidator(SchemaVersion.V1_5).validate_str(open(sys.argv[1]).read())\n\
        sys.exit(None if error is None else str(error))";
    run(Command::new("python3")
        .args(["-c", check])
        .arg(&file)
        .env("PYTHONPATH", beside_target("cyclonedx-python-lib")));

    let bill: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let components = bill["components"].as_array().unwrap();
    let mut listed = BTreeSet::new();
    for component in components {
        let licence = component["licenses"][0]["expression"].as_str();
        assert!(
            licence.is_some_and(|licence| !licence.is_empty()),
            "{component}"
        );
        listed.insert(format!(
            "{}-{}",
            component["name"].as_str().unwrap(),
            component["version"].as_str().unwrap()
        ));
    }
    // The binary itself tells: a crate's paths are in the messages of its panics.
    let binary = fs::read(release.folder.join("bin/reeve")).unwrap();
    let binary = String::from_utf8_lossy(&binary);
    let found: BTreeSet<_> = binary
        .split("registry/src/")
        .skip(1)
        .filter_map(|rest| rest.split('/').nth(1))
        .filter_map(|name| name.split('\0').next())
        .collect();
    assert!(found.len() > 20, "{found:?}");
    for package in found {
        assert!(listed.contains(package), "{package} is not listed");
    }

    // And so does cargo, licence by licence.
    let metadata = run(Command::new("cargo")
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .current_dir(root()));
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    for package in metadata["packages"].as_array().unwrap() {
        let Some(component) = components.iter().find(|component| {
            component["name"] == package["name"] && component["version"] == package["version"]
        }) else {
            continue;
        };
        let plain = |licence: &Value| licence.as_str().unwrap().replace('/', " OR ");
        let licence = &component["licenses"][0]["expression"];
        assert_eq!(
            plain(licence).replace("  OR  ", " OR "),
            plain(&package["license"]).replace("  OR  ", " OR "),
            "{component}"
        );
    }

    let terms = fs::read_to_string(release.folder.join("THIRD-PARTY.md")).unwrap();
    for component in components {
        let name = component["name"].as_str().unwrap();
        if name.starts_with("reeve") {
            continue;
        }
        let version = component["version"].as_str().unwrap();
        let row = format!("| {name} | {version} |");
        assert!(terms.contains(&row), "{row}");
        let is_headed = terms.lines().any(|line| {
            line.strip_prefix("## ").is_some_and(|parts| {
                parts
                    .split(", ")
                    .any(|part| part == format!("{name} {version}"))
            })
        });
        assert!(is_headed, "{name} {version} has no text");
    }
}

#[test]
fn a_dynamic_binary_is_not_packaged() {
    let dynamic = Path::new("/usr/bin/env");
    let refused = dist(&release_folder("dynamic"), dynamic);
    assert!(!refused.status.success());
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("is linked dynamically"), "{said}");
}

// === a release ===

/// A release that was made.
pub(crate) struct Release {
    /// Its files.
    pub(crate) folder: PathBuf,
    /// The same, packed.
    pub(crate) tarball: PathBuf,
    /// The container image.
    pub(crate) image: PathBuf,
}

impl Release {
    /// The one that tests share.
    pub(crate) fn get() -> &'static Self {
        static RELEASE: OnceLock<Release> = OnceLock::new();
        RELEASE.get_or_init(|| Self::make("release"))
    }

    fn make(name: &str) -> Self {
        let out = release_folder(name);
        let made = dist(&out, &static_reeve());
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let is_tarball = |path: &PathBuf| path.to_string_lossy().ends_with(".tar.gz");
        let mut paths = fs::read_dir(&out)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let tarball = paths.find(is_tarball).unwrap();
        let stem = tarball.with_extension("").with_extension("");
        let unpacked = out.join("unpacked");
        fs::create_dir(&unpacked).unwrap();
        run(Command::new("tar")
            .arg("-xf")
            .arg(&tarball)
            .arg("-C")
            .arg(&unpacked));
        Self {
            folder: unpacked.join(stem.file_name().unwrap()),
            image: tarball.with_extension("").with_extension("oci.tar"),
            tarball,
        }
    }
}

fn release_folder(name: &str) -> PathBuf {
    // Of a node, whose folder goes when the tests end.
    Node::new(&Network::new(), name).folder().to_owned()
}

fn dist(out: &Path, binary: &Path) -> Output {
    Command::new(beside("xtask"))
        .args(["dist", "--image", "--out"])
        .arg(out)
        .arg("--binary")
        .arg(binary)
        .env("SOURCE_DATE_EPOCH", EPOCH)
        .output()
        .unwrap()
}

/// The index of an image's archive.
fn index(release: &Release) -> Value {
    let index = run(Command::new("tar")
        .args(["--to-stdout", "-xf"])
        .arg(&release.image)
        .arg("index.json"));
    serde_json::from_str(&index).unwrap()
}

/// The daemon, linked as a release's is.
fn static_reeve() -> PathBuf {
    env::var_os("REEVE_STATIC").map_or_else(|| beside("static/reeve"), PathBuf::from)
}

/// What `cargo xtask test` has built.
fn beside(name: &str) -> PathBuf {
    let program = env::current_exe().unwrap();
    let mut folders = program.ancestors().skip(1).take(2);
    let found = folders.find_map(|folder| Some(folder.join(name)).filter(|file| file.is_file()));
    found.unwrap_or_else(|| panic!("{name} is not built: run `cargo xtask test`"))
}

/// What a program prints; it must succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{command:?}: {stdout}{stderr}");
    stdout
}
