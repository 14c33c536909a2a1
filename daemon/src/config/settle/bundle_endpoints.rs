//! Bundle endpoints: one for each trust domain, and each with what its profile needs.

use std::{collections::HashMap, path::Path};

use super::Report;
use crate::{
    config::file::{RawBundleEndpoint, RawCertificates, RawProfile},
    identity::{BundleEndpoint, EndpointProfile, TrustDomain},
    yaml::Located,
};

// === impl Report ===

impl Report<'_> {
    pub(super) fn bundle_endpoints(
        &mut self,
        raw: &RawCertificates,
        folder: &Path,
        own: &TrustDomain,
    ) -> Vec<BundleEndpoint> {
        let mut lines = HashMap::new();
        let mut endpoints = Vec::new();
        for written in &raw.bundle_endpoints {
            let domain = self.require(written.node, "trustDomain", written.trust_domain.as_ref());
            if let Some(domain) = domain {
                let line = self.document.line(domain.node);
                if let Some(first) = lines.insert(domain.value.clone(), line) {
                    self.mistake(
                        domain.node,
                        format!(
                            "`{}` has an endpoint already, on line {first}",
                            domain.value
                        ),
                    );
                }
                if domain.value == *own {
                    self.mistake(
                        domain.node,
                        "is this node's own trust domain, whose bundle comes with its certificates",
                    );
                }
                if raw.trust_bundles.contains_key(&domain.value) {
                    self.mistake(
                        domain.node,
                        "has a file in `trustBundles`, which would always count instead; keep \
                         one, and name the file as `bootstrap` if it is to begin with",
                    );
                }
            }
            endpoints.extend(self.bundle_endpoint(written, raw, folder));
        }
        endpoints
    }

    fn bundle_endpoint(
        &mut self,
        raw: &Located<RawBundleEndpoint>,
        all: &RawCertificates,
        folder: &Path,
    ) -> Option<BundleEndpoint> {
        let url = self.require(raw.node, "url", raw.url.as_ref());
        let profile = self.require(raw.node, "profile", raw.profile)?;
        let path = |path: &crate::config::file::PathText| folder.join(&path.0);
        let foreign: &[&str] = match profile {
            RawProfile::HttpsWeb => &["spiffeId", "bootstrap"],
            RawProfile::HttpsSpiffe => &["authorities"],
        };
        for field in foreign {
            if self.has(raw.node, field) {
                let name = match profile {
                    RawProfile::HttpsWeb => "https_web",
                    RawProfile::HttpsSpiffe => "https_spiffe",
                };
                let what = format!("has `{field}`, which the profile `{name}` has no use for");
                self.mistake(raw.node, what);
            }
        }
        let profile = match profile {
            RawProfile::HttpsWeb => EndpointProfile::Web {
                authorities: raw.authorities.as_ref().map(path),
            },
            RawProfile::HttpsSpiffe => {
                let id = self.require(raw.node, "spiffeId", raw.spiffe_id.clone())?;
                let elsewhere = |domain: &TrustDomain| {
                    let other = |it: &Located<RawBundleEndpoint>| {
                        it.node != raw.node
                            && it.trust_domain.as_ref().map(|it| &it.value) == Some(domain)
                    };
                    all.trust_bundles.contains_key(domain) || all.bundle_endpoints.iter().any(other)
                };
                if raw.bootstrap.is_none()
                    && !self.has(raw.node, "bootstrap")
                    && !elsewhere(id.trust_domain())
                {
                    let what = format!(
                        "has no bundle of `{}` to check its first answer with; add `bootstrap`, a \
                         file with that trust domain's bundle",
                        id.trust_domain()
                    );
                    self.mistake(raw.node, what);
                }
                EndpointProfile::Spiffe {
                    id,
                    bootstrap: raw.bootstrap.as_ref().map(path),
                }
            }
        };
        Some(BundleEndpoint {
            trust_domain: raw.trust_domain.as_ref()?.value.clone(),
            url: url?.0.clone(),
            profile,
        })
    }
}
