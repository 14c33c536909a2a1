use std::time::{Duration, SystemTime};

use super::{super::*, *};
use crate::{
    datapath::MapUsage,
    identity::{
        BundleStatus, CertificateStatus, IdentityStatus, ReloadCounts, ReloadError, ReloadResult,
        Remark, SpiffeId, TrustDomain,
    },
};

#[test]
fn a_closed_connection_is_counted_with_its_bytes() {
    let metrics = Metrics::default();
    let labels = ConnectionLabels {
        direction: Direction::Egress,
        transport: Transport::Tunnel,
        source: "web",
        destination: "db",
    };
    metrics.connection_opened(labels);
    metrics.connection_bytes(labels, 1, 2);
    metrics.connection_closed(labels, Reason::Closed, 9, 18);
    let text = metrics.render().unwrap();
    for line in [
        r#"reeve_connections_opened_total{destination="db",direction="egress",source="web",transport="tunnel"} 1"#,
        r#"reeve_connections_closed_total{destination="db",direction="egress",reason="closed",source="web",transport="tunnel"} 1"#,
        r#"reeve_connection_bytes_total{destination="db",direction="egress",flow="sent",source="web",transport="tunnel"} 10"#,
        r#"reeve_connection_bytes_total{destination="db",direction="egress",flow="received",source="web",transport="tunnel"} 20"#,
    ] {
        assert!(text.contains(line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn the_tunnels_verdicts_are_counted_and_the_usual_ones_from_the_start() {
    let metrics = Metrics::default();
    metrics.verdict(Direction::Ingress, false, Reason::NoPolicy);
    metrics.verdict(Direction::Ingress, false, Reason::NoPolicy);
    let text = metrics.render().unwrap();
    assert!(text.contains(
        r#"reeve_verdicts_total{direction="ingress",reason="no_policy",verdict="deny"} 2"#
    ));
    assert!(
        text.contains(
            r#"reeve_verdicts_total{direction="egress",reason="policy",verdict="allow"} 0"#
        )
    );
}

#[test]
fn verdicts_are_counted_by_rule_within_a_bound() {
    let metrics = Metrics::new(2);
    let count = |allowed, rule| metrics.rule_verdict(Direction::Egress, allowed, rule);
    count(true, "shop/cart/egress[0]");
    count(true, "shop/cart/egress[0]");
    count(false, "default deny");
    count(true, "shop/cart/egress[1]");
    count(true, "other/rule/egress[7]");
    let text = metrics.render().unwrap();
    for line in [
        r#"reeve_rule_verdicts_total{direction="egress",policy="shop/cart",rule="egress[0]",verdict="allow"} 2"#,
        r#"reeve_rule_verdicts_total{direction="egress",policy="",rule="default deny",verdict="deny"} 1"#,
        r#"reeve_rule_verdicts_total{direction="egress",policy="other",rule="other",verdict="allow"} 2"#,
    ] {
        assert!(text.contains(line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn ends_of_connections_have_series_of_their_own_within_a_bound() {
    let metrics = Metrics::default();
    for number in 0..NAME_PAIRS + 500 {
        metrics.connection_opened(ConnectionLabels {
            direction: Direction::Egress,
            transport: Transport::Tunnel,
            source: "web",
            destination: &format!("db-{number}"),
        });
    }
    let text = metrics.render().unwrap();
    let series = text
        .lines()
        .filter(|line| line.starts_with("reeve_connections_opened_total{"));
    assert_eq!(series.count(), NAME_PAIRS + 1);
    assert!(text.contains(
        r#"reeve_connections_opened_total{destination="other",direction="egress",source="other",transport="tunnel"} 500"#
    ));
}

fn identity(at: impl Fn(u64) -> SystemTime) -> IdentityStatus {
    let certificate = CertificateStatus {
        serial: "1".into(),
        issuer: String::new(),
        not_before: at(1000),
        not_after: at(4600),
        signer: crate::identity::Validity {
            not_before: SystemTime::UNIX_EPOCH,
            not_after: SystemTime::UNIX_EPOCH,
        },
        generation: 1,
    };
    IdentityStatus {
        spiffe_id: SpiffeId::parse("spiffe://example.org/ns/shop/sa/cart").unwrap(),
        source: "files".into(),
        certificate: Some(certificate.clone()),
        newest: Some(certificate),
        renewal_left: 0.25,
        refused_bundles: Vec::new(),
        next_attempt: Some(at(2800)),
        last_attempt: Some(at(1002)),
        last_success: Some(at(1001)),
        last_result: Some(ReloadResult::Rejected),
        last_error: Some(ReloadError::Timeout),
        remarks: vec![Remark::Polled],
    }
}

fn bundle(not_after: u64, next_update: Option<u64>) -> BundleStatus {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    BundleStatus {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        certificates: 1,
        earliest_not_after: Some(at(not_after)),
        revocation_checked: next_update.is_some(),
        newest: Some(crate::identity::Validity {
            not_before: at(500),
            not_after: at(not_after + 1000),
        }),
        next_update: next_update.map(at),
        this_update: next_update.map(|_| at(1500)),
    }
}

#[test]
fn an_expired_certificate_keeps_its_series() {
    let metrics = Metrics::default();
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    metrics.read_from(move || Readings {
        identities: vec![IdentityStatus {
            certificate: None,
            ..identity(at)
        }],
        ..Readings::default()
    });
    let text = metrics.render().unwrap();
    for line in [
        r#"reeve_certificate_valid{identity="spiffe://example.org/ns/shop/sa/cart"} 0"#,
        r#"reeve_certificate_not_after_timestamp_seconds{identity="spiffe://example.org/ns/shop/sa/cart"} 4600"#,
    ] {
        assert!(text.contains(line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn the_largest_difference_of_clocks_counts_for_a_while() {
    let metrics = Metrics::default();
    let told = || {
        let text = metrics.render().unwrap();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("reeve_clock_skew_seconds "));
        line.unwrap().parse::<f64>().unwrap()
    };
    assert_eq!(told(), 0.0);
    metrics.clock_skew(Duration::from_secs(300));
    metrics.clock_skew(Duration::from_secs(20));
    assert_eq!(told(), 300.0);
    let readings = &metrics.inner.readings;
    let long_ago = Instant::now().checked_sub(Duration::from_secs(16 * 60));
    readings.clock_skew(Duration::from_secs(400), long_ago.unwrap());
    assert_eq!(told(), 0.0);
    metrics.clock_skew(Duration::from_secs(20));
    assert_eq!(told(), 20.0);
}

#[test]
fn what_is_kept_elsewhere_is_read_at_each_scrape() {
    let metrics = Metrics::default();
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    metrics.read_from(move || Readings {
        maps: vec![MapUsage {
            name: "VERDICTS",
            entries: 3,
            capacity: 65536,
            missing: 2,
        }],
        namespace_source: Some("kernel_memory"),
        identities: vec![identity(at)],
        bundles: vec![bundle(2000, None), bundle(3000, Some(2500))],
        reloads: [(
            "files".to_owned(),
            ReloadCounts {
                accepted: 2,
                unchanged: 3,
                rejected: [("expired", 4)].into(),
            },
        )]
        .into(),
        ready: true,
        ..Readings::default()
    });
    let text = metrics.render().unwrap();
    for line in [
        r#"reeve_map_entries{map="VERDICTS"} 3"#,
        r#"reeve_map_capacity{map="VERDICTS"} 65536"#,
        r#"reeve_map_missing_entries{map="VERDICTS"} 2"#,
        r#"reeve_packet_namespace_source{source="kernel_memory"} 1"#,
        r#"reeve_certificate_not_before_timestamp_seconds{identity="spiffe://example.org/ns/shop/sa/cart"} 1000"#,
        r#"reeve_certificate_not_after_timestamp_seconds{identity="spiffe://example.org/ns/shop/sa/cart"} 4600"#,
        r#"reeve_certificate_valid{identity="spiffe://example.org/ns/shop/sa/cart"} 1"#,
        r#"reeve_certificate_renewal_left_ratio{identity="spiffe://example.org/ns/shop/sa/cart"} 0.25"#,
        r#"reeve_trust_bundle_newest_not_before_timestamp_seconds{trust_domain="example.org"} 500"#,
        r#"reeve_trust_bundle_newest_not_after_timestamp_seconds{trust_domain="example.org"} 3000"#,
        r#"reeve_revocation_list_this_update_timestamp_seconds{trust_domain="example.org"} 1500"#,
        r#"reeve_certificate_renewal_due_timestamp_seconds{identity="spiffe://example.org/ns/shop/sa/cart"} 2800"#,
        r#"reeve_certificate_last_success_timestamp_seconds{identity="spiffe://example.org/ns/shop/sa/cart"} 1001"#,
        r#"reeve_certificate_remark{identity="spiffe://example.org/ns/shop/sa/cart",remark="polled"} 1"#,
        r#"reeve_certificate_reloads_total{result="accepted",source="files"} 2"#,
        r#"reeve_certificate_reloads_total{result="unchanged",source="files"} 3"#,
        r#"reeve_certificate_reloads_total{result="rejected",source="files"} 4"#,
        r#"reeve_certificate_rejections_total{reason="expired",source="files"} 4"#,
        r#"reeve_certificate_source_up{source="files"} 0"#,
        r#"reeve_trust_bundle_earliest_not_after_timestamp_seconds{trust_domain="example.org"} 2000"#,
        r#"reeve_revocation_checked{trust_domain="example.org"} 0"#,
        r#"reeve_revocation_list_next_update_timestamp_seconds{trust_domain="example.org"} 2500"#,
        "reeve_ready 1",
    ] {
        assert!(text.contains(line), "{line}\nis not in\n{text}");
    }
}

#[test]
fn a_handshake_has_its_reason_and_duration() {
    let metrics = Metrics::default();
    metrics.handshake(Handshake {
        role: Role::Server,
        reason: HandshakeReason::UntrustedChain,
        duration: Duration::from_millis(3),
    });
    let text = metrics.render().unwrap();
    assert!(text.contains(
        r#"reeve_tls_handshakes_total{reason="untrusted_chain",result="failed",role="server"} 1"#
    ));
    assert!(
        text.contains(r#"reeve_tls_handshake_duration_seconds_bucket{role="server",le="0.005"} 1"#)
    );
}
