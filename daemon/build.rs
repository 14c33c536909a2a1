//! Builds the programs in `ebpf/` for the kernel's machine and leaves the object in `OUT_DIR`,
//! where `src/datapath` embeds it.
//!
//! The nested build has a target folder of its own, so that it neither waits for the outer
//! build's lock nor is rebuilt by it. Nothing in the object tells where it was built.

#[path = "build/stack.rs"]
mod stack;

use object::{
    build::elf::{Builder, SectionData},
    elf::{SHT_STRTAB, STB_LOCAL, STT_FUNC},
};
use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

/// Environment variable that names a bpf-linker elsewhere.
const LINKER_VARIABLE: &str = "REEVE_BPF_LINKER";

/// Name of the program that `ebpf/Cargo.toml` builds, and of the object in `OUT_DIR`.
const OBJECT: &str = "reeve-ebpf";

/// What the outer cargo, clippy or rust-analyzer sets for the outer build only. What configures
/// cargo itself (its home, its registries, its proxies, the toolchain) stays.
const OUTER_VARIABLES: [&str; 11] = [
    "CARGO_BUILD_",
    "CARGO_CFG_",
    "CARGO_ENCODED_",
    "CARGO_FEATURE_",
    "CARGO_MANIFEST_",
    "CARGO_PKG_",
    "CARGO_PROFILE_",
    "CARGO_TARGET_",
    "CARGO_UNSTABLE_",
    "RUSTC",
    "RUSTFLAGS",
];

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build() -> Result<(), String> {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let root = manifest
        .parent()
        .ok_or("the daemon's folder has no parent")?;
    for input in [
        "ebpf/src",
        "ebpf/Cargo.toml",
        "ebpf/Cargo.lock",
        "common/src",
        "common/Cargo.toml",
    ] {
        println!("cargo::rerun-if-changed={}", root.join(input).display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=build");
    println!("cargo::rerun-if-env-changed={LINKER_VARIABLE}");

    let linker = find_linker(root, &out)?;
    println!("cargo::rerun-if-changed={}", linker.display());
    require_rust_src()?;

    let triple = match variable("CARGO_CFG_TARGET_ENDIAN")?.to_str() {
        Some("big") => "bpfeb-unknown-none",
        _ => "bpfel-unknown-none",
    };
    let target = out.join("ebpf");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(root.join("ebpf"))
        .args(["build", "--release", "--locked", "--quiet"])
        .args(["--target", triple, "-Z", "build-std=core", "--target-dir"])
        .arg(&target);
    if env::var_os("CARGO_FEATURE_OTHER_LAYOUT").is_some() {
        cargo.args(["--features", "other-layout"]);
    }
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_outer) {
            cargo.env_remove(name);
        }
    }
    let mut linker_flag = OsString::from("linker=");
    linker_flag.push(&linker);
    let separator = "\u{1f}";
    let mut flags = OsString::from("-Cpanic=abort");
    for flag in ["-Clink-arg=--btf", "-C"] {
        flags.push(separator);
        flags.push(flag);
    }
    flags.push(separator);
    flags.push(linker_flag);
    for (folder, name) in places(root)? {
        flags.push(format!("{separator}--remap-path-prefix="));
        flags.push(folder);
        flags.push(format!("={name}"));
    }
    cargo.env("CARGO_ENCODED_RUSTFLAGS", flags);
    // The stable compiler then takes `-Z build-std`, so that no nightly is needed.
    cargo.env("RUSTC_BOOTSTRAP", "1");

    let status = cargo
        .status()
        .map_err(|error| format!("could not start cargo for ebpf/: {error}"))?;
    if !status.success() {
        return Err(format!(
            "building ebpf/ failed ({status}); its messages are above. \
             If a tool is missing, run `cargo xtask setup`"
        ));
    }
    let object = target.join(triple).join("release").join(OBJECT);
    let built = fs::read(&object)
        .map_err(|error| format!("could not read {}: {error}", object.display()))?;
    // To be read with `cargo build -vv`.
    print!("{}", stack::check(&built)?);
    let destination = out.join(OBJECT);
    fs::write(&destination, strip(&built)?)
        .map_err(|error| format!("could not write {}: {error}", destination.display()))
}

/// Leaves what the kernel and its loader read. BTF has the types and the lines; DWARF, which it was
/// made from, goes. Both DWARF and the names of functions hold a number that the compiler makes of
/// the folder of the build.
fn strip(object: &[u8]) -> Result<Vec<u8>, String> {
    let failed = |error| format!("could not strip the kernel programs: {error}");
    let mut builder = Builder::read(object).map_err(failed)?;
    for section in &mut builder.sections {
        let name = section.name.as_slice();
        section.delete = name.starts_with(b".debug_") || name.starts_with(b".rel.debug_");
    }
    for symbol in &mut builder.symbols {
        if symbol.st_bind() == STB_LOCAL && symbol.st_type() == STT_FUNC {
            let name = String::from_utf8_lossy(symbol.name.as_slice());
            symbol.name = without_numbers(&name).into_bytes().into();
        }
    }
    builder.delete_orphans();
    // LLVM has one table for the names of sections and symbols, and the library writes two.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped).map_err(failed)?;
    Ok(stripped)
}

/// Takes the numbers out of a mangled name: of `Cs55TGUcKArcU_10reeve_ebpf` stays `C10reeve_ebpf`.
fn without_numbers(name: &str) -> String {
    let mut parts = name.split("Cs");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let after = part
            .split_once('_')
            .map(|(_, after)| after)
            .filter(|after| after.starts_with(|first: char| first.is_ascii_digit()));
        plain.push('C');
        match after {
            Some(after) => plain.push_str(after),
            None => {
                plain.push('s');
                plain.push_str(part);
            }
        }
    }
    plain
}

fn is_outer(name: &str) -> bool {
    OUTER_VARIABLES
        .iter()
        .any(|prefix| name.starts_with(prefix))
        && name != "RUSTC_BOOTSTRAP"
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("cargo did not set {name}"))
}

/// bpf-linker: where `cargo xtask setup` put it, else where the environment says, else on PATH.
fn find_linker(root: &Path, out: &Path) -> Result<PathBuf, String> {
    // OUT_DIR lies below the target folder, however that is named and wherever it is.
    let in_target = out
        .ancestors()
        .map(Path::to_owned)
        .chain([root.join("target")])
        .map(|folder| folder.join("tools/bin/bpf-linker"));
    let from_variable = env::var_os(LINKER_VARIABLE).map(PathBuf::from);
    let on_path = env::var_os("PATH").into_iter().flat_map(|path| {
        env::split_paths(&path)
            .map(|folder| folder.join("bpf-linker"))
            .collect::<Vec<_>>()
    });
    in_target
        .chain(from_variable)
        .chain(on_path)
        .find(|path| path.is_file())
        .ok_or_else(|| {
            format!(
                "bpf-linker is missing: looked in the target folder's tools/bin, in \
                 {LINKER_VARIABLE} and on PATH. Run `cargo xtask setup`, which installs it"
            )
        })
}

/// The folders that sources are in, and what the programs' debug information calls them: the same
/// wherever they are built.
fn places(root: &Path) -> Result<Vec<(PathBuf, &'static str)>, String> {
    let cargo_home = match env::var_os("CARGO_HOME") {
        Some(folder) => PathBuf::from(folder),
        None => PathBuf::from(variable("HOME")?).join(".cargo"),
    };
    Ok(vec![
        (cargo_home, "/cargo"),
        (library_sources()?, "/rustc/library"),
        (root.to_owned(), "/reeve"),
    ])
}

/// The sources of `core`, which is compiled for the kernel's machine.
fn require_rust_src() -> Result<(), String> {
    let sources = library_sources()?.join("core");
    if sources.is_dir() {
        return Ok(());
    }
    Err(format!(
        "the compiler's own sources (rust-src) are missing at {}. \
         Run `cargo xtask setup`, which installs them",
        sources.display()
    ))
}

fn library_sources() -> Result<PathBuf, String> {
    let output = Command::new(variable("RUSTC")?)
        .args(["--print", "sysroot"])
        .output()
        .map_err(|error| format!("could not ask rustc for its folder: {error}"))?;
    let sysroot = String::from_utf8_lossy(&output.stdout);
    Ok(Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library"))
}
