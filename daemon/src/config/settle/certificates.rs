//! Sources of certificates: each has a name and is of one kind, and workloads name those there are.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::Duration,
};

use super::Report;
use crate::{
    config::{
        Broker, Certificates, DelegatedIdentity, EmbeddedCa, Source, WorkloadApi,
        file::{
            Pattern, RawBroker, RawCertificates, RawDelegatedIdentity, RawEmbeddedCa, RawFiles,
            RawSource, RawWorkload, RawWorkloadApi,
        },
    },
    identity::{BrokerPeers, FilesLayout, PathPattern, SpiffeId, TrustDomain},
    workload::Workload,
    yaml::{Located, nearest},
};

const LEAF_LIFETIME: Duration = Duration::from_secs(3600);

/// The kinds of sources, each of which is the name of a source without one.
const EMBEDDED: &str = "embedded";
const FILES: &str = "files";
const WORKLOAD_API: &str = "workloadApi";
const DELEGATED_IDENTITY: &str = "delegatedIdentity";
const BROKER: &str = "broker";
const KINDS: [&str; 5] = [EMBEDDED, FILES, WORKLOAD_API, DELEGATED_IDENTITY, BROKER];

/// What cert-manager and the kubelet call the files.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";

// === impl Report ===

impl Report<'_> {
    pub(super) fn certificates(
        &mut self,
        raw: RawCertificates,
        folder: &Path,
        state_dir: &Path,
        trust_domain: &TrustDomain,
    ) -> Certificates {
        let mut lines = HashMap::new();
        let mut sources: Vec<(String, Source)> = Vec::new();
        for source in &raw.sources {
            let Some((kind, settled)) = self.source(source, folder, state_dir) else {
                continue;
            };
            let name = source.name.as_ref();
            let name = name.map_or_else(|| kind.to_owned(), |name| name.as_str().to_owned());
            let line = self.document.line(source.node);
            if let Some(first) = lines.insert(name.clone(), line) {
                self.mistake(
                    source.node,
                    format!(
                        "has the name `{name}`, as the source on line {first} does; give each \
                         source a `name` of its own"
                    ),
                );
            }
            sources.push((name, settled));
        }
        if raw.sources.is_empty() {
            let embedded = embedded(&RawEmbeddedCa::default(), folder, state_dir);
            sources.push((EMBEDDED.to_owned(), Source::Embedded(embedded)));
        }
        Certificates {
            bundle_endpoints: self.bundle_endpoints(&raw, folder, trust_domain),
            sources,
            trust_bundles: by_domain(raw.trust_bundles, |path| folder.join(path.0)),
            revocation_lists: by_domain(raw.revocation_lists, |paths| {
                paths.into_iter().map(|path| folder.join(path.0)).collect()
            }),
        }
    }

    fn source(
        &mut self,
        raw: &Located<RawSource>,
        folder: &Path,
        state_dir: &Path,
    ) -> Option<(&'static str, Source)> {
        // One that is written and could not be read is a mistake already.
        let written: Vec<_> = KINDS
            .into_iter()
            .filter(|kind| self.has(raw.node, kind))
            .collect();
        if let [_, _, ..] = written[..] {
            let what = format!("is several things, {}; keep one", written.join(" and "));
            self.mistake(raw.node, what);
        }
        if let Some(ca) = &raw.embedded {
            return Some((EMBEDDED, Source::Embedded(embedded(ca, folder, state_dir))));
        }
        if let Some(files) = &raw.files {
            return Some((FILES, Source::Files(self.files(files, folder)?)));
        }
        if let Some(api) = &raw.workload_api {
            return Some((WORKLOAD_API, self.workload_api(api, folder)?));
        }
        if let Some(api) = &raw.delegated_identity {
            return Some((DELEGATED_IDENTITY, self.delegated_identity(api, folder)?));
        }
        if let Some(broker) = &raw.broker {
            return Some((BROKER, self.broker(broker, folder)?));
        }
        if written.is_empty() {
            let what = "does not say what it is; add `embedded: {}`, `files`, `workloadApi`, \
                        `delegatedIdentity` or `broker`";
            self.mistake(raw.node, what);
        }
        None
    }

    fn files(&mut self, raw: &Located<RawFiles>, folder: &Path) -> Option<FilesLayout> {
        let place = self.require(raw.node, "folder", raw.folder.as_ref())?;
        let name = |pattern: &Option<Pattern>, default| match pattern {
            Some(pattern) => Some(pattern.0.clone()),
            None => PathPattern::parse(default).ok(),
        };
        let optional = |pattern: &Option<Pattern>| pattern.as_ref().map(|it| it.0.clone());
        Some(FilesLayout {
            folder: place.0.below(folder),
            certificate: name(&raw.certificate, CERTIFICATE)?,
            key: name(&raw.key, KEY)?,
            bundle: optional(&raw.bundle),
            revocation_lists: optional(&raw.revocation_lists),
        })
    }

    fn workload_api(&mut self, raw: &Located<RawWorkloadApi>, folder: &Path) -> Option<Source> {
        let socket = self.require(raw.node, "socket", raw.socket.as_ref())?;
        Some(Source::WorkloadApi(WorkloadApi {
            socket: folder.join(&socket.0),
        }))
    }

    fn delegated_identity(
        &mut self,
        raw: &Located<RawDelegatedIdentity>,
        folder: &Path,
    ) -> Option<Source> {
        let socket = self.require(raw.node, "socket", raw.socket.as_ref())?;
        let selectors = raw.selectors.iter().map(|(workload, texts)| {
            let selectors = texts.iter().map(|text| text.0.clone());
            (workload.clone(), selectors.collect())
        });
        Some(Source::DelegatedIdentity(DelegatedIdentity {
            socket: folder.join(&socket.0),
            selectors: selectors.collect(),
        }))
    }

    fn broker(&mut self, raw: &Located<RawBroker>, folder: &Path) -> Option<Source> {
        let socket = self.require(raw.node, "socket", raw.socket.as_ref());
        let agent = self.require(raw.node, "agent", raw.agent.clone());
        let own = self.require(raw.node, "identity", raw.identity.clone());
        let workload_api = self.require(raw.node, "workloadApi", raw.workload_api.as_ref());
        Some(Source::Broker(Broker {
            socket: folder.join(&socket?.0),
            peers: BrokerPeers {
                own: own?,
                workload_api: folder.join(&workload_api?.0),
                agent: agent?,
            },
        }))
    }

    /// Notes selectors of a workload that there is none of.
    pub(super) fn selected_workloads(&mut self, raw: &RawCertificates, names: &[&str]) {
        for source in &raw.sources {
            let Some(api) = &source.delegated_identity else {
                continue;
            };
            for name in api.selectors.keys() {
                if names.contains(&name.as_str()) {
                    continue;
                }
                let hint = match nearest(name, names.iter().copied()) {
                    Some(near) => format!("; did you mean `{near}`?"),
                    None => String::new(),
                };
                let what = format!("has selectors of `{name}`, which is no workload{hint}");
                self.mistake(api.node, what);
            }
        }
    }

    /// Notes a source that there is none of.
    pub(super) fn chosen_source(
        &mut self,
        raw: &Located<RawWorkload>,
        certificates: &Certificates,
    ) {
        let Some(chosen) = &raw.certificates else {
            return;
        };
        let names = || certificates.sources.iter().map(|(name, _)| name.as_str());
        if names().any(|name| name == chosen.as_str()) {
            return;
        }
        let there = match nearest(chosen.as_str(), names()) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("there are {}", names().collect::<Vec<_>>().join(", ")),
        };
        let what = format!(
            "`{}` is no source of `certificates.sources`; {there}",
            chosen.as_str()
        );
        self.mistake(chosen.node, what);
    }

    /// Notes an identity that two workloads would get from different sources. `seen` is what each
    /// identity was to come from, and on which line.
    pub(super) fn one_source(
        &mut self,
        raw: &Located<RawWorkload>,
        workload: &Workload,
        certificates: &Certificates,
        seen: &mut HashMap<SpiffeId, (String, usize)>,
    ) {
        let id = &workload.attributes.spiffe_id;
        let source = certificates.source_of(workload);
        let line = self.document.line(raw.node);
        let (first, first_line) = seen
            .entry(id.clone())
            .or_insert_with(|| (source.to_owned(), line));
        if first != source {
            let what = format!(
                "gets the identity `{id}` from `{source}`, and the workload on line {first_line} \
                 gets it from `{first}`; give both the same `certificates`"
            );
            self.mistake(raw.node, what);
        }
    }
}

fn embedded(raw: &RawEmbeddedCa, folder: &Path, state_dir: &Path) -> EmbeddedCa {
    let ca_dir = raw.ca_dir.as_ref();
    EmbeddedCa {
        ca_dir: ca_dir.map_or_else(|| state_dir.join("ca"), |path| folder.join(&path.0)),
        leaf_lifetime: raw
            .leaf_lifetime
            .map_or(LEAF_LIFETIME, |lifetime| lifetime.0),
    }
}

fn by_domain<T, U>(
    written: BTreeMap<TrustDomain, T>,
    settle: impl Fn(T) -> U,
) -> BTreeMap<TrustDomain, U> {
    written
        .into_iter()
        .map(|(domain, value)| (domain, settle(value)))
        .collect()
}
