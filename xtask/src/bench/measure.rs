//! What is measured of a way.

use harness::{Place, Process};
use serde_json::Value;

use super::{
    report::Report,
    scene::{Scene, Way, processor_seconds},
};

/// A measurement, in the order in which a round makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Measurement {
    /// One stream of bulk data.
    BulkOne,
    /// Eight streams of bulk data.
    BulkEight,
    /// New connections.
    Connections,
    /// Keep-alive requests.
    Requests,
    /// Keep-alive requests beside one stream of bulk data.
    Mixed,
    /// What 250 workloads and 10,000 rules cost; only where it is named.
    Scale,
}

impl Measurement {
    /// Makes it of one way, for some seconds.
    pub(crate) fn make(self, scene: &Scene, way: Way, seconds: u32, report: &mut Report) {
        match self {
            Self::BulkOne => bulk_one(scene, way, seconds, report),
            Self::BulkEight => bulk_eight(scene, way, seconds, report),
            Self::Connections => connections(scene, way, seconds, report),
            Self::Requests => requests(scene, way, seconds, report),
            Self::Mixed => mixed(scene, way, seconds, report),
            // It has a scene of its own.
            Self::Scale => {}
        }
    }
}

/// Connections of the load of small requests.
const REQUESTERS: u32 = 32;

fn bulk_one(scene: &Scene, way: Way, seconds: u32, report: &mut Report) {
    let before = (started_seconds(), daemons_seconds(scene));
    let bulk = Bulk::measure(scene, way, 1, seconds);
    let all = started_seconds() - before.0;
    let daemons = daemons_seconds(scene) - before.1;
    report.add("bulk_1_gbit_per_second", way, bulk.gbit_per_second);
    report.add("cpu_seconds_per_gb", way, all / bulk.gigabytes);
    if way == Way::Tunnel {
        report.add(
            "cpu_seconds_per_gb_of_both_daemons",
            way,
            daemons / bulk.gigabytes,
        );
    }
}

fn bulk_eight(scene: &Scene, way: Way, seconds: u32, report: &mut Report) {
    report.add(
        "bulk_8_gbit_per_second",
        way,
        Bulk::measure(scene, way, 8, seconds).gbit_per_second,
    );
}

fn connections(scene: &Scene, way: Way, seconds: u32, report: &mut Report) {
    let (server, ports) = scene.server(way);
    let before = daemons_seconds(scene);
    let measured = connect_rate(scene.client(way), &server, ports.answer, seconds);
    if way == Way::Tunnel {
        // Says more than the rate where the machine does much else.
        report.add(
            "cpu_us_per_connection_of_both_daemons",
            way,
            (daemons_seconds(scene) - before) * 1e6 / number(&measured["connections"]),
        );
    }
    report.add(
        "connections_per_second",
        way,
        number(&measured["per_second"]),
    );
    report.add("connections_failed", way, number(&measured["failed"]));
}

fn requests(scene: &Scene, way: Way, seconds: u32, report: &mut Report) {
    let measured = start_requests(scene, way, seconds).finish();
    report.add("requests_per_second", way, measured.per_second);
    report.add("requests_p50_ms", way, measured.p50_ms);
    report.add("requests_p99_ms", way, measured.p99_ms);
}

fn mixed(scene: &Scene, way: Way, seconds: u32, report: &mut Report) {
    // The bulk stream begins first and ends last.
    let bulk = Bulk::start(scene, way, 1, seconds + 2);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let measured = start_requests(scene, way, seconds).finish();
    let bulk = bulk.finish();
    report.add("mixed_requests_per_second", way, measured.per_second);
    report.add("mixed_requests_p50_ms", way, measured.p50_ms);
    report.add("mixed_requests_p99_ms", way, measured.p99_ms);
    report.add("mixed_bulk_gbit_per_second", way, bulk.gbit_per_second);
}

/// New connections at a server of mode `answer`.
pub(crate) fn connect_rate(client: &Place, server: &str, port: u16, seconds: u32) -> Value {
    client
        .peer([
            "connect-rate",
            &format!("{server}:{port}"),
            "--seconds",
            &seconds.to_string(),
        ])
        .json()
}

/// Throughput of one stream in Gbit/s.
pub(crate) fn throughput(client: &Place, server: &str, port: u16, seconds: u32) -> f64 {
    Running {
        process: iperf3(client, server, port, 1, seconds),
        seconds,
    }
    .finish()
    .gbit_per_second
}

/// What iperf3 moved.
#[derive(Clone, Copy, Debug)]
struct Bulk {
    gbit_per_second: f64,
    gigabytes: f64,
}

impl Bulk {
    fn measure(scene: &Scene, way: Way, streams: u32, seconds: u32) -> Bulk {
        Self::start(scene, way, streams, seconds).finish()
    }

    fn start(scene: &Scene, way: Way, streams: u32, seconds: u32) -> Running {
        let (server, ports) = scene.server(way);
        Running {
            process: iperf3(scene.client(way), &server, ports.bulk, streams, seconds),
            seconds,
        }
    }
}

fn iperf3(client: &Place, server: &str, port: u16, streams: u32, seconds: u32) -> Process {
    client.spawn([
        "iperf3",
        "--client",
        server,
        "--port",
        &port.to_string(),
        "--parallel",
        &streams.to_string(),
        "--time",
        &seconds.to_string(),
        "--json",
    ])
}

/// An iperf3 under way.
struct Running {
    process: Process,
    seconds: u32,
}

impl Running {
    fn finish(self) -> Bulk {
        let received = &self.process.wait(patience(self.seconds)).json()["end"]["sum_received"];
        Bulk {
            gbit_per_second: number(&received["bits_per_second"]) / 1e9,
            gigabytes: number(&received["bytes"]) / 1e9,
        }
    }
}

fn start_requests(scene: &Scene, way: Way, seconds: u32) -> Requesting {
    let (server, ports) = scene.server(way);
    let process = scene.client(way).spawn([
        "wrk",
        "--threads",
        "1",
        "--connections",
        &REQUESTERS.to_string(),
        "--duration",
        &format!("{seconds}s"),
        "--latency",
        &format!("http://{server}:{}/", ports.web),
    ]);
    Requesting { process, seconds }
}

/// A wrk under way.
struct Requesting {
    process: Process,
    seconds: u32,
}

/// What wrk measured.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Requests {
    per_second: f64,
    p50_ms: f64,
    p99_ms: f64,
}

impl Requesting {
    fn finish(self) -> Requests {
        let said = self.process.wait(patience(self.seconds)).ok();
        let unreadable = f64::NAN;
        let nothing = Requests {
            per_second: unreadable,
            p50_ms: unreadable,
            p99_ms: unreadable,
        };
        Requests::parse(&said).unwrap_or(nothing)
    }
}

impl Requests {
    fn parse(said: &str) -> Option<Self> {
        let after = |label: &str| {
            said.lines()
                .find_map(|line| Some(line.trim().strip_prefix(label)?.trim().to_owned()))
        };
        Some(Self {
            per_second: after("Requests/sec:")?.parse().ok()?,
            p50_ms: milliseconds(&after("50%")?)?,
            p99_ms: milliseconds(&after("99%")?)?,
        })
    }
}

/// Reads a time as wrk prints it: `612.00us`, `1.02ms`, `1.10s`.
fn milliseconds(text: &str) -> Option<f64> {
    let units = [("us", 0.001), ("ms", 1.0), ("s", 1000.0)];
    let (value, unit) = units
        .iter()
        .find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, scale)))?;
    Some(value.parse::<f64>().ok()? * unit)
}

/// Processor time of clients, servers and daemons until now.
fn started_seconds() -> f64 {
    harness::run::Run::this().processor_time().as_secs_f64()
}

fn daemons_seconds(scene: &Scene) -> f64 {
    scene
        .daemons()
        .iter()
        .map(|(_, daemon)| processor_seconds(daemon.id()))
        .sum()
}

/// A number of a result; a program that says none has failed.
pub(crate) fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// For a program that should take some seconds.
fn patience(seconds: u32) -> std::time::Duration {
    std::time::Duration::from_secs(u64::from(seconds) + 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_wrk_prints_is_understood() {
        let said = "Running 4s test @ http://10.0.0.1/\n  1 threads and 32 connections\n  Thread Stats   Avg\n    \
                    Latency   388.00us\n  Latency Distribution\n     50%  612.00us\n     75%    1.00ms\n     \
                    90%    1.10ms\n     99%    1.02s\n  100 requests in 4.00s\nRequests/sec:  51234.50\n";
        let expected = Requests {
            per_second: 51234.5,
            p50_ms: 0.612,
            p99_ms: 1020.0,
        };
        assert_eq!(Requests::parse(said), Some(expected));
    }
}
