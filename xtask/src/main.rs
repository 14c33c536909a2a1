//! What plain cargo cannot do. `cargo xtask help` lists it; one module per subcommand.

#![cfg_attr(
    test,
    allow(clippy::unwrap_used, reason = "a test that fails shall say where")
)]

mod bench;
mod build;
mod demo;
mod dist;
mod duration;
mod faults;
mod fuzz;
mod kernels;
mod licences;
mod lint;
mod peers;
mod run;
mod setup;
mod soak;
mod storm;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Set-up, build, demo, test and bench of reeve. Each does the set-up that it lacks first.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make this machine ready, and say what is done; nothing the second time
    Setup,
    /// Build the daemon with its kernel programs
    Build(build::Options),
    /// Show what reeve does, on two node-like namespaces of this machine
    Demo(demo::Options),
    /// Run the unit tests and the end-to-end tests
    Test(test::Options),
    /// Measure the tunnel against plain TCP
    Bench(bench::Options),
    /// Rotate certificates every second under load, and fail if anything else does
    Storm(storm::Options),
    /// Upgrade, cut and re-key two nodes under traffic, and fail if anything fails or grows
    Soak(soak::Options),
    /// Cut the network for minutes, and fail if anything happens but what docs/faults.md promises
    Faults(faults::Options),
    /// Boot the kernels that reeve supports, and run its tests in them
    Kernels(kernels::Options),
    /// Run the tests with a real SPIRE, which is built first and takes minutes
    Peers(peers::Options),
    /// Fuzz the parsers that meet others' bytes
    Fuzz(fuzz::Options),
    /// Make what is released: a tarball with the static binary, and the container image
    Dist(dist::Options),
    /// Run clippy on the workspace and on the kernel programs, warnings being errors
    Lint,
    /// Check the dependencies' licences and the banned crates against deny.toml
    Licences,
}

fn main() -> ExitCode {
    match dispatch(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Setup => setup::everything(),
        Command::Build(options) => build::run(&options),
        Command::Demo(options) => demo::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bench(options) => bench::run(&options),
        Command::Storm(options) => storm::run(&options),
        Command::Soak(options) => soak::run(&options),
        Command::Faults(options) => faults::run(&options),
        Command::Kernels(options) => kernels::run(&options),
        Command::Peers(options) => peers::run(&options),
        Command::Fuzz(options) => fuzz::run(&options),
        Command::Dist(options) => dist::run(&options),
        Command::Lint => lint::run(),
        Command::Licences => licences::check(),
    }
}
