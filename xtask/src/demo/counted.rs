//! The last act: what was shown is also what is counted.

use harness::Daemon;

use super::{scene::Scene, stage::Stage};

pub(crate) const HANDSHAKES: &str = "reeve_tls_handshakes_total";
const VERDICTS: &str = "reeve_verdicts_total";
const OPENED: &str = "reeve_connections_opened_total";
const FAILED: &str = "reeve_connections_failed_total";

type Labels = &'static [(&'static str, &'static str)];

/// A handshake that was refused for its trust domain.
pub(crate) const FOREIGN: Labels = &[
    ("role", "server"),
    ("result", "failed"),
    ("reason", "unknown_trust_domain"),
];

/// What is counted, on which node, under which name and labels.
const COUNTED: [(&str, Node, &str, Labels); 9] = [
    (
        "the allowed call, going out",
        Node::Alpha,
        OPENED,
        &[
            ("direction", "egress"),
            ("source", "cart"),
            ("transport", "tunnel"),
        ],
    ),
    (
        "the allowed call, coming in",
        Node::Beta,
        OPENED,
        &[
            ("direction", "ingress"),
            ("source", "cart"),
            ("transport", "tunnel"),
        ],
    ),
    (
        "cart refused by egress",
        Node::Alpha,
        VERDICTS,
        &[
            ("direction", "egress"),
            ("verdict", "deny"),
            ("reason", "no_policy"),
        ],
    ),
    (
        "report refused, as alpha saw it",
        Node::Alpha,
        FAILED,
        &[
            ("direction", "egress"),
            ("source", "report"),
            ("reason", "peer_denied"),
        ],
    ),
    (
        "report refused by ingress",
        Node::Beta,
        FAILED,
        &[
            ("direction", "ingress"),
            ("source", "report"),
            ("reason", "no_policy"),
        ],
    ),
    (
        "the intruder refused",
        Node::Beta,
        VERDICTS,
        &[
            ("direction", "ingress"),
            ("verdict", "deny"),
            ("reason", "no_policy"),
        ],
    ),
    (
        "the impostor refused",
        Node::Beta,
        VERDICTS,
        &[
            ("direction", "ingress"),
            ("verdict", "deny"),
            ("reason", "plaintext_refused"),
        ],
    ),
    (
        "mutual TLS, both ends verified",
        Node::Beta,
        HANDSHAKES,
        &[("role", "server"), ("result", "ok")],
    ),
    ("the forged certificate", Node::Beta, HANDSHAKES, FOREIGN),
];

#[derive(Clone, Copy)]
enum Node {
    Alpha,
    Beta,
}

impl Node {
    fn daemon(self, scene: &Scene) -> (&'static str, &Daemon) {
        match self {
            Self::Alpha => ("alpha", &scene.alpha_daemon),
            Self::Beta => ("beta", &scene.beta_daemon),
        }
    }
}

pub(crate) fn counted(stage: &mut Stage, scene: &Scene) {
    stage.act(
        "All of it counted",
        "What Prometheus reads from the two daemons about the acts above:",
    );
    for (what, node, name, labels) in COUNTED {
        let (node, daemon) = node.daemon(scene);
        let value = daemon.metrics().sum(name, labels);
        stage.claim(&format!("{what}: {value} on {node}"), value >= 1.0);
        let labels: Vec<_> = labels
            .iter()
            .map(|(label, value)| format!("{label}={value:?}"))
            .collect();
        stage.aside(&format!("{name}{{{}}}", labels.join(",")));
    }
}
