//! `reeve status` for people.

use std::{
    fmt::{self, Write},
    net::IpAddr,
    time::Duration,
};

use super::table::Table;
use crate::{admin::Status, workload::CgroupSelector};

/// The whole page.
pub(super) fn render(status: &Status) -> String {
    let mut page = String::new();
    // Writing to a string does not fail.
    let _ = write(&mut page, status);
    page
}

fn write(page: &mut String, status: &Status) -> fmt::Result {
    writeln!(
        page,
        "reeve {} on {}, trust domain {}, up {}",
        status.version,
        status.node,
        status.trust_domain,
        duration(status.uptime_seconds)
    )?;
    if status.ready {
        writeln!(page, "ready")?;
    } else {
        writeln!(page, "NOT READY")?;
        for missing in &status.not_ready {
            writeln!(page, "  - {missing}")?;
        }
    }
    if !status.restart_needed.is_empty() {
        let settings = status.restart_needed.join(", ");
        writeln!(
            page,
            "a restart is needed for what has changed of: {settings}"
        )?;
    }
    if let Some(left) = &status.draining {
        writeln!(page, "shutting down: {left}")?;
    }
    for predecessor in &status.predecessors {
        writeln!(page, "a daemon before still drains: {predecessor}")?;
    }
    writeln!(page)?;
    workloads(page, status)?;
    certificates(page, status)?;
    tunnels(page, status)?;
    policies(page, status)?;
    kernel(page, status)
}

fn workloads(page: &mut String, status: &Status) -> fmt::Result {
    writeln!(page, "Workloads")?;
    let mut table = Table::new([
        "NAME",
        "STATE",
        "LISTENING",
        "CERTIFICATE",
        "NETNS",
        "ADDRESSES",
        "FOUND BY",
        "IDENTITY",
    ]);
    for workload in &status.workloads {
        let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
        table.push([
            workload.name.clone(),
            workload.state.as_str().to_owned(),
            yes(workload.listening),
            yes(workload.certificate),
            workload.netns.map_or_else(dash, |inode| {
                let shared = if workload.owns_netns { "" } else { " shared" };
                format!("{inode}{shared}")
            }),
            first_of(&workload.addresses),
            match &workload.selector {
                CgroupSelector::Cgroup(path) => path.clone(),
                CgroupSelector::Unit(name) => name.clone(),
            },
            workload.spiffe_id.clone(),
        ]);
    }
    write!(page, "{table}")?;
    for workload in &status.workloads {
        for remark in &workload.remarks {
            writeln!(page, "  {}: {remark}", workload.name)?;
        }
    }
    writeln!(page)
}

fn certificates(page: &mut String, status: &Status) -> fmt::Result {
    writeln!(page, "Certificates")?;
    let mut table = Table::new(["IDENTITY", "VALID FOR", "UNTIL", "SOURCE", "REMARKS"]);
    for certificate in &status.certificates {
        table.push([
            certificate.spiffe_id.clone(),
            certificate.seconds_left.map_or_else(dash, duration),
            certificate.not_after.clone().unwrap_or_else(dash),
            certificate.source.clone(),
            match (&certificate.last_error, &certificate.remarks[..]) {
                (Some(error), _) => error.clone(),
                (None, []) => dash(),
                (None, remarks) => remarks.join(", "),
            },
        ]);
    }
    write!(page, "{table}")?;
    for certificate in &status.certificates {
        for bundle in &certificate.refused_bundles {
            writeln!(
                page,
                "  {}: the trust bundle of {} is refused: {}",
                certificate.spiffe_id, bundle.trust_domain, bundle.reason
            )?;
        }
    }
    writeln!(page)?;
    writeln!(page, "Trust bundles")?;
    let mut table = Table::new([
        "TRUST DOMAIN",
        "CERTIFICATES",
        "FIRST EXPIRES",
        "REVOCATION",
    ]);
    for bundle in &status.bundles {
        table.push([
            bundle.trust_domain.clone(),
            bundle.certificates.to_string(),
            bundle.earliest_not_after.clone().unwrap_or_else(dash),
            match &bundle.next_update {
                Some(time) => format!("checked until {time}"),
                None => "not checked".to_owned(),
            },
        ]);
    }
    writeln!(page, "{table}")?;
    bundle_endpoints(page, status)
}

fn bundle_endpoints(page: &mut String, status: &Status) -> fmt::Result {
    if status.bundle_endpoints.is_empty() {
        return Ok(());
    }
    writeln!(page, "Bundle endpoints")?;
    let mut table = Table::new([
        "TRUST DOMAIN",
        "IN FORCE",
        "SEQUENCE",
        "LAST SUCCESS",
        "REMARKS",
    ]);
    for endpoint in &status.bundle_endpoints {
        table.push([
            endpoint.trust_domain.clone(),
            endpoint
                .origin
                .clone()
                .unwrap_or_else(|| "NOTHING".to_owned()),
            endpoint.sequence.map_or_else(dash, |it| it.to_string()),
            endpoint.last_success.clone().unwrap_or_else(dash),
            endpoint.last_error.clone().unwrap_or_else(dash),
        ]);
    }
    writeln!(page, "{table}")
}

fn tunnels(page: &mut String, status: &Status) -> fmt::Result {
    let tunnels = &status.tunnels;
    writeln!(
        page,
        "Tunnels: {} open, {} connections",
        tunnels.open, tunnels.connections
    )?;
    if !tunnels.tunnels.is_empty() {
        let mut table = Table::new([
            "ROLE", "OWN", "PEER", "ADDRESS", "STREAMS", "AGE", "PROVEN", "PROOFS", "",
        ]);
        for tunnel in &tunnels.tunnels {
            table.push([
                tunnel.role.clone(),
                tunnel.local.clone(),
                tunnel.peer.clone(),
                tunnel.address.clone(),
                tunnel.streams.to_string(),
                duration(tunnel.age_seconds),
                duration(tunnel.proven_seconds),
                match tunnel.proof.as_str() {
                    "none" => "none".to_owned(),
                    _ => tunnel.proofs.to_string(),
                },
                match (tunnel.retired, tunnel.silent) {
                    (_, true) => "silent",
                    (true, false) => "retired",
                    (false, false) => "",
                }
                .to_owned(),
            ]);
        }
        write!(page, "{table}")?;
        for tunnel in &tunnels.tunnels {
            if let Some(error) = &tunnel.proof_error {
                writeln!(
                    page,
                    "  {} {} with {}: {} proofs in succession have failed: {error}",
                    tunnel.role, tunnel.local, tunnel.peer, tunnel.proofs_failed
                )?;
            }
        }
        if tunnels.open > tunnels.tunnels.len() {
            writeln!(page, "  and {} more", tunnels.open - tunnels.tunnels.len())?;
        }
    }
    writeln!(page)
}

fn policies(page: &mut String, status: &Status) -> fmt::Result {
    let policies = &status.policies;
    writeln!(
        page,
        "Policies: {} in force, from {}",
        policies.policies,
        list(policies.sources.iter().cloned())
    )?;
    if let Some(reason) = &policies.refused {
        writeln!(
            page,
            "  THE NEWEST FILES WERE REFUSED, the ones before are in force:"
        )?;
        for line in reason.lines() {
            writeln!(page, "  {line}")?;
        }
    }
    writeln!(page)
}

fn kernel(page: &mut String, status: &Status) -> fmt::Result {
    writeln!(
        page,
        "Kernel: generation {}, {} events lost",
        status.generation, status.lost_events
    )?;
    let mut table = Table::new(["MAP", "ENTRIES", "CAPACITY", "USED", "NO ROOM FOR"]);
    for map in &status.maps {
        let percent = map
            .entries
            .saturating_mul(100)
            .checked_div(map.capacity)
            .unwrap_or(0);
        table.push([
            map.map.clone(),
            map.entries.to_string(),
            map.capacity.to_string(),
            format!("{percent} %"),
            map.missing.to_string(),
        ]);
    }
    write!(page, "{table}")
}

fn duration(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

fn dash() -> String {
    "-".to_owned()
}

/// Some addresses, and how many more there are.
fn first_of(addresses: &[IpAddr]) -> String {
    /// As many as a node's host usually has.
    const SHOWN: usize = 8;
    let shown = list(addresses.iter().take(SHOWN).map(ToString::to_string));
    match addresses.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() {
        dash()
    } else {
        items.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        admin::{
            CertificateStatus, MapUsage, PolicyStatus, RefusedBundle, WorkloadState, WorkloadStatus,
        },
        handover::{Draining, Left},
    };

    #[test]
    fn of_many_addresses_some_are_shown_and_all_are_counted() {
        let address = |number: u32| IpAddr::from(number.to_be_bytes());
        let many: Vec<IpAddr> = (0..20_000).map(address).collect();
        let shown = first_of(&many);
        assert!(shown.starts_with("0.0.0.0, ") && shown.ends_with("0.0.0.7 and 19992 more"));
        assert_eq!(first_of(&many[..2]), "0.0.0.0, 0.0.0.1");
        assert_eq!(first_of(&[]), "-");
    }

    #[test]
    fn the_page_says_what_is_missing_and_what_is_there() {
        let page = render(&Status {
            version: "0.1.0".into(),
            node: "node1".into(),
            trust_domain: "example.org".into(),
            uptime_seconds: 75,
            not_ready: vec!["workload web has no certificate".into()],
            predecessors: vec![Draining {
                version: "0.0.9".into(),
                process: 4711,
                left: Some(Left {
                    connections: 3,
                    seconds: Some(75),
                    ..Left::default()
                }),
                ..Draining::default()
            }],
            workloads: vec![WorkloadStatus {
                name: "web".into(),
                id: 1,
                spiffe_id: "spiffe://example.org/ns/default/sa/web".into(),
                selector: CgroupSelector::Unit("nginx.service".into()),
                state: WorkloadState::Running,
                cgroups: vec![4711],
                netns: Some(4_026_531_840),
                owns_netns: false,
                addresses: vec!["192.0.2.1".parse().unwrap()],
                listening: true,
                certificate: false,
                remarks: vec!["processes of it are elsewhere".into()],
            }],
            certificates: vec![CertificateStatus {
                spiffe_id: "spiffe://example.org/ns/default/sa/web".into(),
                source: "embedded_ca".into(),
                last_error: Some("the disk is full".into()),
                refused_bundles: vec![RefusedBundle {
                    trust_domain: "bad.example".into(),
                    reason: "it is no bundle".into(),
                }],
                ..CertificateStatus::default()
            }],
            policies: PolicyStatus {
                refused: Some("web.yaml:1:1: is not a policy".into()),
                ..PolicyStatus::default()
            },
            maps: vec![MapUsage {
                map: "VERDICTS".into(),
                entries: 512,
                capacity: 1024,
                missing: 0,
            }],
            ..Status::default()
        });
        for text in [
            "reeve 0.1.0 on node1, trust domain example.org, up 1m 15s",
            "NOT READY\n  - workload web has no certificate",
            "before still drains: reeve 0.0.9, process 4711, for 0s: connections left: 3, for at most 1m 15s",
            "web   running  yes        no           4026531840 shared  192.0.2.1  nginx.service",
            "  web: processes of it are elsewhere",
            "the disk is full",
            "  spiffe://example.org/ns/default/sa/web: the trust bundle of bad.example is refused: it is no bundle",
            "  web.yaml:1:1: is not a policy",
            "VERDICTS  512      1024      50 %",
        ] {
            assert!(page.contains(text), "{text}\nis not in\n{page}");
        }
    }
}
