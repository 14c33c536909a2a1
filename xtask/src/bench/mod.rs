//! `cargo xtask bench`: plain TCP against the tunnel, in one run, on the same network.
//!
//! Every measurement is made for plain TCP and for the tunnel in turn, several rounds of it, and
//! the medians are compared: what else the machine does then hurts both alike. Plain TCP runs
//! between two namespaces that are joined to the same bridge in the same way and that no daemon
//! knows: in the workloads' own, reeve's programs would be part of what is compared with.

mod hooks;
mod measure;
mod memory;
mod reload;
mod report;
mod scale;
mod scene;

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use measure::Measurement;
use report::Report;
use scene::{Scene, Way};

use crate::{build, workspace::Workspace};

/// What to measure, and how long.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Seconds of one measurement
    #[arg(long, default_value_t = 4)]
    seconds: u32,
    /// Rounds of each measurement, for plain TCP and for the tunnel
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Where to write the result as JSON; in the target folder otherwise
    #[arg(long)]
    json: Option<PathBuf>,
    /// Fail if a ratio or a limit is not reached
    #[arg(long)]
    check: bool,
    /// Measure only these, memory and the hooks' cost left out; `scale` is measured only where it is named
    #[arg(long, value_delimiter = ',', value_enum)]
    only: Vec<Measurement>,
    /// Measure what certificates in files and their reload cost, and nothing else
    #[arg(long, conflicts_with = "only")]
    reload: bool,
}

/// Sets up, builds with optimisation, measures, and prints.
pub(crate) fn run(options: &Options) -> Result<()> {
    let workspace = build::for_scenes(true)?;

    let mut report = Report::default();
    if options.reload {
        reload::measure(&mut report);
        return finish(options, &workspace, &report);
    }
    if options.only.contains(&Measurement::Scale) {
        scale::measure(options.rounds, &mut report);
    }
    if options.only == [Measurement::Scale] {
        return finish(options, &workspace, &report);
    }
    let scene = Scene::set();
    let everything = options.only.is_empty();
    if everything {
        memory::idle(&scene, &mut report);
        memory::connections(&scene, &mut report);
    }
    for round in 1..=options.rounds {
        eprintln!("round {round} of {}", options.rounds);
        for measurement in Measurement::value_variants() {
            if !everything && !options.only.contains(measurement) {
                continue;
            }
            // Turn and turn about, so that neither way is always the first.
            let ways = if round % 2 == 1 {
                [Way::Plain, Way::Tunnel]
            } else {
                [Way::Tunnel, Way::Plain]
            };
            for way in ways {
                measurement.make(&scene, way, options.seconds, &mut report);
            }
        }
        if everything {
            hooks::measure(&scene, options.seconds, &mut report);
        }
    }
    if everything {
        memory::after(&scene, &mut report);
    }
    drop(scene);
    finish(options, &workspace, &report)
}

fn finish(options: &Options, workspace: &Workspace, report: &Report) -> Result<()> {
    report.print();
    let file = options
        .json
        .clone()
        .unwrap_or_else(|| workspace.target.join("bench.json"));
    fs::write(&file, report.json()).with_context(|| format!("writing {}", file.display()))?;
    println!("also as JSON in {}", file.display());
    if options.check {
        report.check()
    } else {
        Ok(())
    }
}
