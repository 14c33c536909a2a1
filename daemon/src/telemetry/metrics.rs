//! The metrics, one method for each thing that is counted.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus::{
    HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry,
    TextEncoder,
};
use reeve_common::{Direction, DryRun, Reason};

use super::{
    labels::{ConnectionLabels, HandshakeReason, Limit, NamePairs, Role, direction_name},
    readings::{Readings, ReadingsCollector, Shared},
};

/// Pairs of source and destination with series of their own. Each makes about ten series.
const NAME_PAIRS: usize = 1000;

/// Rules with series of their own, where nothing else is configured. Each makes two to four.
pub(super) const RULES: usize = 1000;

/// Upper bounds of the handshake histogram in seconds: a handshake within a data centre takes
/// some milliseconds, and the default time-out is 5 s.
const HANDSHAKE_BUCKETS: [f64; 11] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0,
];

/// One finished handshake.
#[derive(Clone, Copy, Debug)]
pub struct Handshake {
    /// Which end we were.
    pub role: Role,
    /// How it ended.
    pub reason: HandshakeReason,
    /// From the first byte to the end.
    pub duration: Duration,
}

/// The registry and the handles of every metric. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    readings: Arc<ReadingsCollector>,
    names: NamePairs,
    rules: NamePairs,
    opened: IntCounterVec,
    closed: IntCounterVec,
    failed: IntCounterVec,
    bytes: IntCounterVec,
    handshakes: IntCounterVec,
    handshake_seconds: HistogramVec,
    tunnels: IntGaugeVec,
    tunnels_closed: IntCounterVec,
    tunnel_proofs: IntCounterVec,
    limits: IntCounterVec,
    streams: IntGaugeVec,
    suppressed: IntCounter,
    policy_reloads: IntCounterVec,
    rule_verdicts: IntCounterVec,
}

// === impl Metrics ===

impl Default for Metrics {
    fn default() -> Self {
        Self::new(RULES)
    }
}

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Nothing counted yet. At most `rules` rules of policies get series of their own.
    #[must_use]
    pub fn new(rules: usize) -> Self {
        #[expect(
            clippy::expect_used,
            reason = "fails only for a malformed or repeated name, and every name is a constant that each test run registers"
        )]
        let inner = Inner::new(rules).expect("names of metrics are valid and unique");
        Self {
            inner: Arc::new(inner),
        }
    }

    /// A connection stands.
    pub fn connection_opened(&self, labels: ConnectionLabels<'_>) {
        let (source, destination) = self.names(labels);
        self.inner
            .opened
            .with_label_values(&[
                direction_name(labels.direction),
                labels.transport.as_str(),
                source,
                destination,
            ])
            .inc();
    }

    /// A connection that stood has ended. `sent` and `received` are the application bytes of the
    /// local workload that [`Metrics::connection_bytes`] has not been told of.
    pub fn connection_closed(
        &self,
        labels: ConnectionLabels<'_>,
        reason: Reason,
        sent: u64,
        received: u64,
    ) {
        self.connection_bytes(labels, sent, received);
        self.ended(&self.inner.closed, labels, reason);
    }

    /// Application bytes that the local workload sent and received, for connections that live so
    /// long that their end is too late to count them.
    pub fn connection_bytes(&self, labels: ConnectionLabels<'_>, sent: u64, received: u64) {
        let (source, destination) = self.names(labels);
        for (flow, bytes) in [("sent", sent), ("received", received)] {
            self.inner
                .bytes
                .with_label_values(&[
                    flow,
                    direction_name(labels.direction),
                    labels.transport.as_str(),
                    source,
                    destination,
                ])
                .inc_by(bytes);
        }
    }

    /// A connection was refused or could not be made.
    pub fn connection_failed(&self, labels: ConnectionLabels<'_>, reason: Reason) {
        self.ended(&self.inner.failed, labels, reason);
    }

    /// The tunnel gave a verdict (the kernel's are read from its counters).
    pub fn verdict(&self, direction: Direction, allowed: bool, reason: Reason) {
        self.inner.readings.verdict(direction, allowed, reason);
    }

    /// A rule, named as `policy/rule`, gave a verdict.
    pub fn rule_verdict(&self, direction: Direction, allowed: bool, rule: &str) {
        // What no policy holds, as the default deny, is of no policy.
        let (policy, rule) = rule.rsplit_once('/').unwrap_or(("", rule));
        let (policy, rule) = self.inner.rules.bounded(policy, rule);
        let verdict = if allowed { "allow" } else { "deny" };
        self.inner
            .rule_verdicts
            .with_label_values(&[policy, rule, direction_name(direction), verdict])
            .inc();
    }

    /// The tunnel gave a verdict that policies in dry run would change.
    pub fn dry_run(&self, direction: Direction, would: DryRun) {
        self.inner.readings.dry_run(direction, would);
    }

    /// A handshake ended.
    pub fn handshake(&self, handshake: Handshake) {
        let role = handshake.role.as_str();
        let result = if handshake.reason == HandshakeReason::Ok {
            "ok"
        } else {
            "failed"
        };
        self.inner
            .handshakes
            .with_label_values(&[role, result, handshake.reason.as_str()])
            .inc();
        self.inner
            .handshake_seconds
            .with_label_values(&[role])
            .observe(handshake.duration.as_secs_f64());
    }

    /// A failed handshake shows that this node's clock and a peer's differ by at least this.
    pub fn clock_skew(&self, least: Duration) {
        self.inner.readings.clock_skew(least, Instant::now());
    }

    /// Tunnels open now: adds `change`.
    pub fn tunnels_open(&self, role: Role, change: i64) {
        self.inner
            .tunnels
            .with_label_values(&[role.as_str()])
            .add(change);
    }

    /// A tunnel has ended.
    pub fn tunnel_closed(&self, role: Role, reason: Reason) {
        self.inner
            .tunnels_closed
            .with_label_values(&[role.as_str(), reason.as_str()])
            .inc();
    }

    /// An attempt to prove a tunnel again has ended; `result` is one of a closed set.
    pub fn tunnel_proof(&self, role: Role, result: &str) {
        self.inner
            .tunnel_proofs
            .with_label_values(&[role.as_str(), result])
            .inc();
    }

    /// Somebody was refused since a limit was reached.
    pub fn limit_reached(&self, limit: Limit) {
        self.inner.limits.with_label_values(&[limit.as_str()]).inc();
    }

    /// Streams open now: adds `change`.
    pub fn streams_open(&self, role: Role, change: i64) {
        self.inner
            .streams
            .with_label_values(&[role.as_str()])
            .add(change);
    }

    /// Tunnels open now.
    #[must_use]
    pub fn tunnels(&self, role: Role) -> i64 {
        self.inner.tunnels.with_label_values(&[role.as_str()]).get()
    }

    /// Streams open now.
    #[must_use]
    pub fn streams(&self, role: Role) -> i64 {
        self.inner.streams.with_label_values(&[role.as_str()]).get()
    }

    /// Log lines were left out because a workload made too many.
    pub fn log_lines_suppressed(&self, lines: u64) {
        self.inner.suppressed.inc_by(lines);
    }

    /// The configuration (`what` = `config`) or the policy files (`policy`) were read again.
    pub fn reload(&self, what: &'static str, accepted: bool) {
        let result = if accepted { "accepted" } else { "refused" };
        self.inner
            .policy_reloads
            .with_label_values(&[what, result])
            .inc();
    }

    /// From now on, what is kept elsewhere is read from `source` at every scrape. Called once.
    pub fn read_from(&self, source: impl Fn() -> Readings + Send + Sync + 'static) {
        self.inner.readings.read_from(source);
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Errors
    /// When a family is inconsistent.
    pub fn render(&self) -> prometheus::Result<String> {
        TextEncoder::new().encode_to_string(&self.inner.registry.gather())
    }

    fn ended(&self, family: &IntCounterVec, labels: ConnectionLabels<'_>, reason: Reason) {
        let (source, destination) = self.names(labels);
        family
            .with_label_values(&[
                direction_name(labels.direction),
                labels.transport.as_str(),
                reason.as_str(),
                source,
                destination,
            ])
            .inc();
    }

    fn names<'a>(&self, labels: ConnectionLabels<'a>) -> (&'a str, &'a str) {
        self.inner.names.bounded(labels.source, labels.destination)
    }
}

// === impl Inner ===

impl Inner {
    fn new(rules: usize) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            let family = IntCounterVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };
        let gauge = |name: &str, help: &str, labels: &[&str]| {
            let family = IntGaugeVec::new(Opts::new(name, help), labels)?;
            registry.register(Box::new(family.clone()))?;
            Ok::<_, prometheus::Error>(family)
        };

        let opened = counter(
            "reeve_connections_opened_total",
            "Connections that stood, end to end.",
            &["direction", "transport", "source", "destination"],
        )?;
        let ended = ["direction", "transport", "reason", "source", "destination"];
        let closed = counter(
            "reeve_connections_closed_total",
            "Connections that stood and have ended.",
            &ended,
        )?;
        let failed = counter(
            "reeve_connections_failed_total",
            "Connections that were refused or could not be made.",
            &ended,
        )?;
        let bytes = counter(
            "reeve_connection_bytes_total",
            "Application bytes, as the local workload sent and received them.",
            &["flow", "direction", "transport", "source", "destination"],
        )?;
        let handshakes = counter(
            "reeve_tls_handshakes_total",
            "TLS handshakes of tunnels.",
            &["role", "result", "reason"],
        )?;
        let handshake_seconds = HistogramVec::new(
            HistogramOpts::new(
                "reeve_tls_handshake_duration_seconds",
                "Duration of TLS handshakes, failed ones included.",
            )
            .buckets(HANDSHAKE_BUCKETS.to_vec()),
            &["role"],
        )?;
        registry.register(Box::new(handshake_seconds.clone()))?;
        let tunnels = gauge("reeve_tunnels_open", "Tunnels that stand now.", &["role"])?;
        let streams = gauge("reeve_streams_open", "Streams that stand now.", &["role"])?;
        let tunnels_closed = counter(
            "reeve_tunnels_closed_total",
            "Tunnels that stood and have ended.",
            &["role", "reason"],
        )?;
        let tunnel_proofs = counter(
            "reeve_tunnel_proofs_total",
            "Attempts to prove a tunnel again underneath its connections; `ok`, and `same` with an unchanged certificate, succeeded.",
            &["role", "result"],
        )?;
        let limits = counter(
            "reeve_limit_refusals_total",
            "Connections and handshakes refused since a limit of the configuration was reached.",
            &["limit"],
        )?;
        for limit in Limit::ALL {
            limits.with_label_values(&[limit.as_str()]);
        }
        for role in [Role::Client, Role::Server] {
            tunnels.with_label_values(&[role.as_str()]).set(0);
            streams.with_label_values(&[role.as_str()]).set(0);
            handshakes.with_label_values(&[role.as_str(), "ok", HandshakeReason::Ok.as_str()]);
            tunnel_proofs.with_label_values(&[role.as_str(), "ok"]);
        }
        let suppressed = IntCounter::new(
            "reeve_log_lines_suppressed_total",
            "Log lines that were left out because one workload made too many.",
        )?;
        registry.register(Box::new(suppressed.clone()))?;
        let policy_reloads = counter(
            "reeve_reloads_total",
            "Times that the configuration or the policies were read again.",
            &["what", "result"],
        )?;
        // From the start, so that the first one that is refused is an increase.
        for what in ["config", "policy", "trust_bundle"] {
            for result in ["accepted", "refused"] {
                policy_reloads.with_label_values(&[what, result]);
            }
        }
        let rule_verdicts = counter(
            "reeve_rule_verdicts_total",
            "Verdicts by the rule that gave them; rules beyond `metrics.rules` are `other`.",
            &["policy", "rule", "direction", "verdict"],
        )?;
        gauge(
            "reeve_build_info",
            "Always 1; the label says which version runs.",
            &["version"],
        )?
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);

        let readings = ReadingsCollector::new()?;
        registry.register(Box::new(Shared(readings.clone())))?;
        Ok(Self {
            registry,
            readings,
            names: NamePairs::new(NAME_PAIRS),
            rules: NamePairs::new(rules),
            opened,
            closed,
            failed,
            bytes,
            handshakes,
            handshake_seconds,
            tunnels,
            tunnels_closed,
            tunnel_proofs,
            limits,
            streams,
            suppressed,
            policy_reloads,
            rule_verdicts,
        })
    }
}

#[cfg(test)]
mod tests;
