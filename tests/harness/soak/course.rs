//! What daemons hold over a run.

use std::{fmt, time::Duration};

/// Share of a run in which pools, caches and the allocator may still fill.
const WARM_UP: f64 = 0.2;

/// What the daemons held at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Since the beginning.
    pub(super) at: Duration,
    /// The two that serve.
    pub(super) serving: Held,
    /// Entries of the kernel's maps, without those that stay until they are pushed out.
    pub(super) entries: f64,
    /// Tunnels of the two that serve.
    pub(super) tunnels: f64,
    /// Connections in them.
    pub(super) streams: f64,
    /// Old daemons at both nodes.
    pub(super) predecessors: f64,
    /// What they hold in all.
    pub(super) old: Held,
}

/// What processes hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held {
    /// Bytes of resident memory.
    pub(super) resident: f64,
    /// File descriptors.
    pub(super) files: f64,
    /// Threads.
    pub(super) threads: f64,
}

/// How one figure went over a run.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    name: &'static str,
    /// Of the first third, once warm: the median, of map entries the largest.
    first: f64,
    /// The same of the last third.
    last: f64,
    /// Largest of all.
    most: f64,
    /// By how much it grows in an hour, by least squares.
    per_hour: f64,
    /// What the last third may have more than the first; none where it grows by what is done.
    allowed: Option<f64>,
}

/// Share of what was there, and a number besides, by which a figure moves by itself: what goes on at
/// the moment differs.
type Allowed = Option<(f64, f64)>;

/// How each figure went.
pub(super) fn courses(samples: &[Sample]) -> Vec<Course> {
    const MIB: f64 = (1 << 20) as f64;
    let warm = (samples.len() as f64 * WARM_UP) as usize;
    let samples = samples.get(warm..).unwrap_or_default();
    let course =
        |name, allowed: Allowed, of: fn(&[f64]) -> f64, figure: fn(&Sample) -> Option<f64>| {
            let known: Vec<_> = samples
                .iter()
                .filter_map(|sample| Some((sample.at.as_secs_f64(), figure(sample)?)))
                .collect();
            let values: Vec<_> = known.iter().map(|(_, value)| *value).collect();
            let third = values.len() / 3;
            let first = of(&values[..third]);
            Course {
                name,
                first,
                last: of(&values[values.len() - third..]),
                most: largest(&values),
                per_hour: slope(known.iter().map(|(at, _)| *at), &values) * 3600.0,
                allowed: allowed.map(|(share, slack)| first * share + slack),
            }
        };
    /// Of one old daemon, on average.
    fn each(sample: &Sample, figure: f64) -> Option<f64> {
        (sample.predecessors > 0.0).then(|| figure / sample.predecessors)
    }
    vec![
        course("resident bytes", Some((0.05, 4.0 * MIB)), median, |s| {
            Some(s.serving.resident)
        }),
        course("descriptors", Some((0.1, 16.0)), median, |s| {
            Some(s.serving.files)
        }),
        // One hears each old daemon.
        course("threads but for old ones", Some((0.0, 4.0)), median, |s| {
            Some(s.serving.threads - s.predecessors)
        }),
        // A policy comes and goes with its entries: between these two levels a median tells nothing.
        course("map entries", Some((0.05, 16.0)), largest, |s| {
            Some(s.entries)
        }),
        course("tunnels", Some((0.1, 8.0)), median, |s| Some(s.tunnels)),
        course("streams", Some((0.1, 8.0)), median, |s| Some(s.streams)),
        course("old daemons", None, median, |s| Some(s.predecessors)),
        course("bytes of all old ones", None, median, |s| {
            Some(s.old.resident)
        }),
        course("bytes of an old one", Some((0.1, 4.0 * MIB)), median, |s| {
            each(s, s.old.resident)
        }),
        course(
            "descriptors of an old one",
            Some((0.1, 16.0)),
            median,
            |s| each(s, s.old.files),
        ),
        course("threads of an old one", Some((0.0, 4.0)), median, |s| {
            each(s, s.old.threads)
        }),
    ]
}

// === impl Held ===

impl Held {
    /// What a process holds; nothing of one that has ended.
    pub(super) fn of(process: u32) -> Self {
        let count = |folder: &str| {
            let entries = std::fs::read_dir(format!("/proc/{process}/{folder}"));
            entries.map_or(0.0, |entries| entries.count() as f64)
        };
        Self {
            resident: crate::daemon::resident(process).unwrap_or_default() as f64,
            files: count("fd"),
            threads: count("task"),
        }
    }
}

impl std::iter::Sum for Held {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            resident: sum.resident + one.resident,
            files: sum.files + one.files,
            threads: sum.threads + one.threads,
        })
    }
}

// === impl Course ===

impl Course {
    pub(super) fn grows(&self) -> bool {
        let allowed = self.allowed.unwrap_or(f64::INFINITY);
        self.last > self.first + allowed
    }

    pub(super) const HEAD: &str = "held                          first third    last third       at most       an hour  may grow by";
}

impl fmt::Display for Course {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:27} {:13.0} {:13.0} {:13.0} {:+13.0} ",
            self.name, self.first, self.last, self.most, self.per_hour
        )?;
        match self.allowed {
            Some(allowed) => write!(f, "{allowed:12.0}"),
            None => write!(f, "{:>12}", "-"),
        }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or_default()
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

/// Slope of the line that fits best.
fn slope(at: impl Iterator<Item = f64> + Clone, values: &[f64]) -> f64 {
    let number = values.len().max(1) as f64;
    let (mean_at, mean) = (
        at.clone().sum::<f64>() / number,
        values.iter().sum::<f64>() / number,
    );
    let (mut together, mut alone) = (0.0, 0.0);
    for (at, value) in at.zip(values) {
        together += (at - mean_at) * (value - mean);
        alone += (at - mean_at).powi(2);
    }
    if alone == 0.0 { 0.0 } else { together / alone }
}
