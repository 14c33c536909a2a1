//! `cargo xtask fuzz`: libFuzzer on what reads others' bytes, see `tests/fuzz/src/targets.rs`.

use std::{fs, process::Command};

use anyhow::{Context, Result, bail};

use crate::{run, setup, workspace::Workspace};

/// Coverage as libFuzzer wants it, without any sanitizer: what is fuzzed is safe Rust. All of it is
/// stable, so that no nightly compiler is needed.
const FLAGS: &str = "--cfg fuzzing \
    -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";

/// What to fuzz, and for how long.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Options {
    /// One of the folders of tests/fuzz/corpus; all of them, one after the other, if not given
    target: Option<String>,
    /// How long each runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

/// Builds the fuzzer and runs one target or all.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = Workspace::find()?;
    setup::for_building(&workspace)?;
    if run::find("g++").is_none() {
        bail!("libFuzzer is built with g++, which is missing: `apt-get install g++`");
    }
    let folder = workspace.root.join("tests/fuzz");
    let corpus = folder.join("corpus");
    let mut targets = Vec::new();
    for entry in fs::read_dir(&corpus).context("reading tests/fuzz/corpus")? {
        targets.push(entry?.file_name().to_string_lossy().into_owned());
    }
    targets.sort();
    if let Some(wanted) = &options.target {
        if !targets.contains(wanted) {
            bail!(
                "there is no target `{wanted}`; there are {}",
                targets.join(", ")
            );
        }
        targets.retain(|target| target == wanted);
    }

    let host = run::output(Command::new("rustc").arg("-vV"))?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: "));
    let host = host.context("`rustc -vV` says no host")?;
    let output = workspace.target.join("fuzz");
    // With a target, so that build scripts and macros are built without the flags; not `--locked`,
    // since the daemon's dependencies change without a look at this lock file.
    run::run(
        workspace
            .cargo()?
            .args(["build", "--release", "--target", host])
            .arg("--manifest-path")
            .arg(folder.join("Cargo.toml"))
            .env("CARGO_TARGET_DIR", &output)
            .env("RUSTFLAGS", FLAGS),
    )?;
    let program = output.join(host).join("release/fuzz");
    for target in targets {
        println!("fuzz: {target} for {} s", options.seconds);
        // What is found on the way is kept here, and begun with the next time.
        let grown = output.join("corpus").join(&target);
        let found = output.join("found").join(&target);
        for folder in [&grown, &found] {
            fs::create_dir_all(folder)?;
        }
        run::run(
            Command::new(&program)
                .env("REEVE_FUZZ_TARGET", &target)
                .arg(format!("-max_total_time={}", options.seconds))
                .arg(format!("-artifact_prefix={}/", found.display()))
                .args(["-timeout=10", "-max_len=16384", "-print_final_stats=1"])
                .arg(&grown)
                .arg(corpus.join(&target)),
        )
        .with_context(|| {
            format!(
                "{target}: an input is in {}; put it into tests/fuzz/corpus/{target} with the fix",
                found.display()
            )
        })?;
    }
    Ok(())
}
