//! `cargo xtask faults`: a network that is cut for minutes, with the time-outs that hold by default but for
//! `timeouts.silent`, after which connections end: a minute.

use std::time::Duration;

use anyhow::{Result, ensure};
use harness::{Cut, CutPlan, Patience};

use crate::{build, duration};

/// For so long connections live through a cut.
const SHORT: Duration = Duration::from_secs(5);
/// By then what is promised of a longer one has happened: connections have ended, and others have
/// been tried and have failed.
const SHORTEST: Duration = Duration::from_secs(90);

/// How long.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// How long the network is cut, after it was cut for seconds; 90 s at least
    #[arg(long, default_value = "3m", value_parser = duration::parse)]
    cut: Duration,
    /// Use the build of the tests, which is not optimised
    #[arg(long)]
    debug: bool,
}

/// Sets up, builds, and fails if anything was not as docs/faults.md promises.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(options.cut >= SHORTEST, "`--cut` is 90 s at least");
    build::for_scenes(!options.debug)?;
    let cut = Cut::run(&CutPlan {
        short: SHORT,
        long: options.cut,
        // A tunnel is given up within the cut; by default it waits for a quarter of an hour.
        patience: Patience {
            silent: 60,
            ..Patience::DEFAULT
        },
    });
    print!("{cut}");
    ensure!(cut.wrong.is_empty(), "{}", cut.wrong.join("; "));
    println!("all as promised");
    Ok(())
}
