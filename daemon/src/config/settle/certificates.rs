//! Sources of certificates: each has a name and is of one kind, and workloads name those there are.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
    time::Duration,
};

use super::Report;
use crate::{
    config::{
        Certificates, EmbeddedCa, Source,
        file::{PathText, RawCertificates, RawEmbeddedCa, RawSource, RawWorkload},
    },
    identity::{SpiffeId, TrustDomain},
    workload::Workload,
    yaml::{Located, nearest},
};

const LEAF_LIFETIME: Duration = Duration::from_secs(3600);

/// The kinds of sources, each of which is the name of a source without one.
const EMBEDDED: &str = "embedded";

// === impl Report ===

impl Report<'_> {
    pub(super) fn certificates(
        &mut self,
        raw: RawCertificates,
        folder: &Path,
        state_dir: &Path,
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
            sources,
            trust_bundles: by_domain(raw.trust_bundles, folder),
        }
    }

    fn source(
        &mut self,
        raw: &Located<RawSource>,
        folder: &Path,
        state_dir: &Path,
    ) -> Option<(&'static str, Source)> {
        match &raw.embedded {
            Some(ca) => Some((EMBEDDED, Source::Embedded(embedded(ca, folder, state_dir)))),
            None => {
                // One that is written and could not be read is a mistake already.
                if !self.has(raw.node, EMBEDDED) {
                    self.mistake(
                        raw.node,
                        format!("does not say what it is; add `{EMBEDDED}: {{}}`"),
                    );
                }
                None
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

fn by_domain(
    paths: BTreeMap<TrustDomain, PathText>,
    folder: &Path,
) -> BTreeMap<TrustDomain, PathBuf> {
    paths
        .into_iter()
        .map(|(domain, path)| (domain, folder.join(path.0)))
        .collect()
}
