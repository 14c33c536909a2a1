//! Metrics of certificates, trust and their reload, as they are at the moment of a scrape.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, core::Collector};

use super::readings::Readings;

/// The families of one scrape.
pub(super) struct CertificateFamilies {
    valid: IntGaugeVec,
    not_before: GaugeVec,
    not_after: GaugeVec,
    renewal_left: GaugeVec,
    renewal_due: GaugeVec,
    last_success: GaugeVec,
    remarks: IntGaugeVec,
    reloads: IntCounterVec,
    rejections: IntCounterVec,
    source_up: IntGaugeVec,
    signer_not_before: GaugeVec,
    signer_not_after: GaugeVec,
    bundle: GaugeVec,
    newest_not_before: GaugeVec,
    newest_not_after: GaugeVec,
    revocation_checked: IntGaugeVec,
    this_update: GaugeVec,
    next_update: GaugeVec,
    endpoint_up: IntGaugeVec,
    endpoint_success: GaugeVec,
    endpoint_refreshes: IntCounterVec,
    endpoint_rejections: IntCounterVec,
}

// === impl CertificateFamilies ===

impl CertificateFamilies {
    pub(super) fn new() -> prometheus::Result<Self> {
        let times = |name: &str, help: &str, label| GaugeVec::new(Opts::new(name, help), &[label]);
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            IntGaugeVec::new(Opts::new(name, help), labels)
        };
        let counters = |name: &str, help: &str, labels: &[&str]| {
            IntCounterVec::new(Opts::new(name, help), labels)
        };
        Ok(Self {
            valid: gauges(
                "reeve_certificate_valid",
                "1 when an identity has a certificate that is valid now, else 0.",
                &["identity"],
            )?,
            not_before: times(
                "reeve_certificate_not_before_timestamp_seconds",
                "Start of the validity of an identity's newest certificate.",
                "identity",
            )?,
            not_after: times(
                "reeve_certificate_not_after_timestamp_seconds",
                "Expiry of an identity's newest certificate, or of the CA above it that expires earlier; stays when it has expired.",
                "identity",
            )?,
            renewal_left: times(
                "reeve_certificate_renewal_left_ratio",
                "Share of its lifetime that a certificate has left when its successor usually arrives: at the last renewal; before one was seen, 0.4 of a CA that reeve runs and 0.1 of other sources.",
                "identity",
            )?,
            renewal_due: times(
                "reeve_certificate_renewal_due_timestamp_seconds",
                "When the source is asked for an identity's next certificate; none of agents, which tell by themselves.",
                "identity",
            )?,
            last_success: times(
                "reeve_certificate_last_success_timestamp_seconds",
                "When the source last gave a certificate for an identity that could be used.",
                "identity",
            )?,
            remarks: gauges(
                "reeve_certificate_remark",
                "1 for each condition of an identity that is no failure (`remark` says which).",
                &["identity", "remark"],
            )?,
            reloads: counters(
                "reeve_certificate_reloads_total",
                "Times that a source was asked for a certificate, by what came of it.",
                &["source", "result"],
            )?,
            rejections: counters(
                "reeve_certificate_rejections_total",
                "Times that a source had nothing that could be used, by the reason.",
                &["source", "reason"],
            )?,
            source_up: gauges(
                "reeve_certificate_source_up",
                "1 when the source answered the last time for each of its identities, else 0.",
                &["source"],
            )?,
            signer_not_before: times(
                "reeve_certificate_signer_not_before_timestamp_seconds",
                "Start of the validity of the CA above an identity's certificate that expires first.",
                "identity",
            )?,
            signer_not_after: times(
                "reeve_certificate_signer_not_after_timestamp_seconds",
                "End of the validity of the CA above an identity's certificate that expires first.",
                "identity",
            )?,
            bundle: times(
                "reeve_trust_bundle_earliest_not_after_timestamp_seconds",
                "End of the validity of the authority in a trust bundle that expires first.",
                "trust_domain",
            )?,
            newest_not_before: times(
                "reeve_trust_bundle_newest_not_before_timestamp_seconds",
                "Start of the validity of the authority in a trust bundle that expires last.",
                "trust_domain",
            )?,
            newest_not_after: times(
                "reeve_trust_bundle_newest_not_after_timestamp_seconds",
                "End of the validity of the authority in a trust bundle that expires last: its successor, once there is one.",
                "trust_domain",
            )?,
            revocation_checked: gauges(
                "reeve_revocation_checked",
                "1 when there are revocation lists for a trust domain, 0 when nothing is checked.",
                &["trust_domain"],
            )?,
            next_update: times(
                "reeve_revocation_list_next_update_timestamp_seconds",
                "Earliest expiry of any revocation list of a trust domain.",
                "trust_domain",
            )?,
            this_update: times(
                "reeve_revocation_list_this_update_timestamp_seconds",
                "When that revocation list was issued.",
                "trust_domain",
            )?,
            endpoint_up: gauges(
                "reeve_bundle_endpoint_up",
                "1 when a bundle endpoint gave a bundle that could be used the last time, else 0.",
                &["trust_domain"],
            )?,
            endpoint_success: times(
                "reeve_bundle_endpoint_last_success_timestamp_seconds",
                "When a bundle endpoint last gave a bundle that could be used.",
                "trust_domain",
            )?,
            endpoint_refreshes: counters(
                "reeve_bundle_endpoint_refreshes_total",
                "Times that a bundle endpoint was asked, by what came of it.",
                &["trust_domain", "result"],
            )?,
            endpoint_rejections: counters(
                "reeve_bundle_endpoint_rejections_total",
                "Times that a bundle endpoint gave nothing that could be used, by the reason.",
                &["trust_domain", "reason"],
            )?,
        })
    }

    pub(super) fn set(&self, readings: &Readings) {
        self.set_identities(readings);
        self.set_sources(readings);
        self.set_bundles(readings);
        self.set_endpoints(readings);
    }

    fn set_identities(&self, readings: &Readings) {
        for status in &readings.identities {
            let identity = status.spiffe_id.as_str();
            let valid = i64::from(status.certificate.is_some());
            self.valid.with_label_values(&[identity]).set(valid);
            let left = self.renewal_left.with_label_values(&[identity]);
            left.set(status.renewal_left);
            // The newest that there has been: an alert about its end stays when it has expired.
            let certificate = status.newest.as_ref();
            for (family, time) in [
                (&self.not_before, certificate.map(|found| found.not_before)),
                (&self.not_after, certificate.map(|found| found.not_after)),
                (
                    &self.signer_not_before,
                    certificate.map(|found| found.signer.not_before),
                ),
                (
                    &self.signer_not_after,
                    certificate.map(|found| found.signer.not_after),
                ),
                (&self.renewal_due, status.next_attempt),
                (&self.last_success, status.last_success),
            ] {
                if let Some(time) = time {
                    let gauge = family.with_label_values(&[identity]);
                    gauge.set(unix_seconds(time));
                }
            }
            for remark in &status.remarks {
                let labels = [identity, remark.as_str()];
                self.remarks.with_label_values(&labels).set(1);
            }
        }
    }

    fn set_sources(&self, readings: &Readings) {
        for (source, counts) in &readings.reloads {
            for (result, count) in counts.by_result() {
                let labels = [source.as_str(), result];
                self.reloads.with_label_values(&labels).inc_by(count);
            }
            for (reason, count) in &counts.rejected {
                let labels = [source.as_str(), *reason];
                self.rejections.with_label_values(&labels).inc_by(*count);
            }
            let down = readings.identities.iter().any(|status| {
                let error = status.last_error.as_ref();
                status.source == *source && error.is_some_and(|error| error.is_unreachable())
            });
            let gauge = self.source_up.with_label_values(&[source]);
            gauge.set(i64::from(!down));
        }
    }

    /// Where identities trust different bundles of one trust domain, the worst counts.
    fn set_bundles(&self, readings: &Readings) {
        for bundle in &readings.bundles {
            let domain = [bundle.trust_domain.as_str()];
            let same = || {
                let all = readings.bundles.iter();
                all.filter(|other| other.trust_domain == bundle.trust_domain)
            };
            let newest = same().filter_map(|other| other.newest);
            let newest = newest.min_by_key(|newest| newest.not_after);
            let list = same().min_by_key(|other| {
                let end = other.next_update;
                (end.is_none(), end)
            });
            for (family, time) in [
                (
                    &self.bundle,
                    same().filter_map(|other| other.earliest_not_after).min(),
                ),
                (&self.newest_not_before, newest.map(|it| it.not_before)),
                (&self.newest_not_after, newest.map(|it| it.not_after)),
                (&self.next_update, list.and_then(|it| it.next_update)),
                (&self.this_update, list.and_then(|it| it.this_update)),
            ] {
                if let Some(time) = time {
                    family.with_label_values(&domain).set(unix_seconds(time));
                }
            }
            let checked = same().all(|other| other.revocation_checked);
            let gauge = self.revocation_checked.with_label_values(&domain);
            gauge.set(i64::from(checked));
        }
    }

    fn set_endpoints(&self, readings: &Readings) {
        for endpoint in &readings.bundle_endpoints {
            let domain = endpoint.trust_domain.as_str();
            let answered = endpoint.last_attempt.is_some() && endpoint.last_error.is_none();
            let gauge = self.endpoint_up.with_label_values(&[domain]);
            gauge.set(i64::from(answered));
            if let Some(time) = endpoint.last_success {
                let gauge = self.endpoint_success.with_label_values(&[domain]);
                gauge.set(unix_seconds(time));
            }
            let counts = &endpoint.counts;
            for (result, count) in counts.by_result() {
                let labels = [domain, result];
                let counter = self.endpoint_refreshes.with_label_values(&labels);
                counter.inc_by(count);
            }
            for (reason, count) in &counts.rejected {
                let labels = [domain, *reason];
                let counter = self.endpoint_rejections.with_label_values(&labels);
                counter.inc_by(*count);
            }
        }
    }

    pub(super) fn collectors(&self) -> [&dyn Collector; 22] {
        [
            &self.valid,
            &self.not_before,
            &self.not_after,
            &self.renewal_left,
            &self.renewal_due,
            &self.last_success,
            &self.remarks,
            &self.reloads,
            &self.rejections,
            &self.source_up,
            &self.signer_not_before,
            &self.signer_not_after,
            &self.bundle,
            &self.newest_not_before,
            &self.newest_not_after,
            &self.revocation_checked,
            &self.next_update,
            &self.this_update,
            &self.endpoint_up,
            &self.endpoint_success,
            &self.endpoint_refreshes,
            &self.endpoint_rejections,
        ]
    }
}

fn unix_seconds(time: SystemTime) -> f64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => after.as_secs_f64(),
        Err(before) => -before.duration().as_secs_f64(),
    }
}
