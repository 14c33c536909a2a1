//! Policies from files: found, read, checked against the workloads and peers that are declared.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    document::ConnectionPolicy,
    lower::lower,
    population::{Member, Population},
    rule::Rule,
};
use crate::{
    workload::{Peer, Workload},
    yaml::{self, Document, Mistake, Mistakes, nearest, shown},
};

/// Group and version of reeve's own kinds.
const API_VERSION: &str = "reeve.dev/v1alpha1";

/// Where policies are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySources {
    /// Folder of which every file `*.yaml` and `*.yml` is read, subfolders and names that begin
    /// with a dot not. Default none.
    pub folder: Option<PathBuf>,
    /// Files that are read as well. Default none.
    pub files: Vec<PathBuf>,
}

/// Whom policies can name.
#[derive(Clone, Copy, Debug, Default)]
pub struct Known<'a> {
    /// The workloads of this node.
    pub workloads: &'a [Arc<Workload>],
    /// The peers.
    pub peers: &'a [Arc<Peer>],
}

/// Policies without a mistake, in the order of their files' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    pub(crate) rules: Vec<Rule>,
    policies: usize,
    warnings: Vec<Mistake>,
}

/// The kinds of policy documents.
enum Kind {
    ConnectionPolicy,
}

struct Loader<'a> {
    known: Option<&'a Population<'a>>,
    /// Where each policy was found first.
    names: HashMap<String, (Arc<Path>, usize)>,
    mistakes: Mistakes,
    set: PolicySet,
}

// === impl PolicySet ===

impl PolicySet {
    /// Reads and checks all policies.
    ///
    /// # Errors
    /// Every mistake in any of them.
    pub fn load(sources: &PolicySources, known: &Known<'_>) -> Result<Self, Mistakes> {
        let population = known.population();
        let mut loader = Loader::new(Some(&population));
        loader.sources(sources);
        loader.finish()
    }

    /// As [`PolicySet::load`], for one text that was read from `file`.
    ///
    /// # Errors
    /// Every mistake in the text.
    pub fn parse(file: &Path, text: &str, known: &Known<'_>) -> Result<Self, Mistakes> {
        let population = known.population();
        let mut loader = Loader::new(Some(&population));
        loader.text(file, text);
        loader.finish()
    }

    /// As [`PolicySet::load`], with documents that were read elsewhere as well.
    pub(crate) fn load_beside(
        sources: &PolicySources,
        documents: &[&Document],
        known: &Known<'_>,
    ) -> Result<Self, Mistakes> {
        let population = known.population();
        let mut loader = Loader::new(Some(&population));
        loader.sources(sources);
        for document in documents {
            loader.document(document);
        }
        loader.finish()
    }

    /// As [`PolicySet::parse`], whoever is known.
    #[cfg(test)]
    pub(crate) fn parse_alone(file: &Path, text: &str) -> Result<Self, Mistakes> {
        let mut loader = Loader::new(None);
        loader.text(file, text);
        loader.finish()
    }

    /// The mistakes of the policies by themselves, for a configuration that cannot say whom they
    /// could name.
    pub(crate) fn mistakes(sources: &PolicySources) -> Mistakes {
        let mut loader = Loader::new(None);
        loader.sources(sources);
        loader.mistakes
    }

    /// How many policies there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.policies
    }

    /// Whether there is no policy: then nothing is allowed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.policies == 0
    }

    /// How many rules the policies have.
    #[must_use]
    pub fn rules(&self) -> usize {
        self.rules.len()
    }

    /// What is not wrong, and probably not meant.
    #[must_use]
    pub fn warnings(&self) -> &[Mistake] {
        &self.warnings
    }
}

// === impl Known ===

impl<'a> Known<'a> {
    fn population(&self) -> Population<'a> {
        let workloads = self.workloads.iter().map(|workload| Member {
            name: &workload.name,
            attributes: Some(&workload.attributes),
        });
        let peers = self.peers.iter().map(|peer| Member {
            name: &peer.name,
            attributes: peer.attributes.as_ref(),
        });
        Population::new(workloads.chain(peers))
    }
}

// === impl PolicySources ===

impl PolicySources {
    /// The files, in the order of their names; those that are named one by one come last.
    fn paths(&self, mistakes: &mut Mistakes) -> Vec<PathBuf> {
        let mut paths = Vec::new();
        if let Some(folder) = &self.folder {
            match policy_files(folder) {
                Ok(found) => paths = found,
                Err(error) => mistakes.file(
                    folder,
                    format!(
                        "the folder of policies could not be read: {error}; make it, or correct \
                         `policies.folder`"
                    ),
                ),
            }
        }
        for file in &self.files {
            if !paths.contains(file) {
                paths.push(file.clone());
            }
        }
        paths
    }
}

fn policy_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in folder.read_dir()? {
        let entry = entry?;
        let path = entry.path();
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let yaml = path.extension().is_some_and(|e| e == "yaml" || e == "yml");
        if yaml && !hidden && !path.is_dir() {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

// === impl Loader ===

impl<'a> Loader<'a> {
    fn new(known: Option<&'a Population<'a>>) -> Self {
        Self {
            known,
            names: HashMap::new(),
            mistakes: Mistakes::default(),
            set: PolicySet::default(),
        }
    }

    fn finish(self) -> Result<PolicySet, Mistakes> {
        self.mistakes.into_result()?;
        Ok(self.set)
    }

    fn sources(&mut self, sources: &PolicySources) {
        for path in sources.paths(&mut self.mistakes) {
            match yaml::read_file(&path) {
                Ok(text) => self.text(&path, &text),
                Err(mistakes) => self.mistakes.extend(mistakes),
            }
        }
    }

    fn text(&mut self, file: &Path, text: &str) {
        let (documents, mistakes) = yaml::parse(file, text);
        self.mistakes.extend(mistakes);
        for document in &documents {
            self.document(document);
        }
    }

    fn document(&mut self, document: &Document) {
        match self.kind(document) {
            Some(Kind::ConnectionPolicy) => {
                let policy = yaml::read::<ConnectionPolicy>(document, &mut self.mistakes);
                let Some(policy) = policy else { return };
                let lowered = lower(document, policy, self.known, &mut self.mistakes);
                if let Some((name, node)) = lowered.name {
                    let place = (Arc::clone(document.file()), document.line(node));
                    if let Some((file, line)) = self.names.get(&name) {
                        let what = format!(
                            "there is a policy `{name}` already, in {} on line {line}; give one \
                             of them another name",
                            file.display()
                        );
                        self.mistakes.push(document.mistake(node, what));
                    }
                    self.names.entry(name).or_insert(place);
                }
                self.set.policies += 1;
                self.set.rules.extend(lowered.rules);
                self.set.warnings.extend(lowered.warnings);
            }
            None => {}
        }
    }

    /// What the document is, by `apiVersion` and `kind`.
    fn kind(&mut self, document: &Document) -> Option<Kind> {
        const KINDS: [&str; 1] = ["ConnectionPolicy"];
        let root = document.root();
        let mut field = |name: &str, wanted: &[&str]| -> bool {
            let value = document.child(root, name);
            let text = value.and_then(|value| document.text(value));
            if text.is_some_and(|text| wanted.contains(&text)) {
                return true;
            }
            let mut what = match text {
                Some(text) => format!("`{}` is not known here", shown(text)),
                None => format!("`{name}` is missing"),
            };
            what.push_str(&format!("; expected `{}`", wanted.join("` or `")));
            if let Some(near) = text.and_then(|text| nearest(text, wanted.iter().copied())) {
                what.push_str(&format!("; did you mean `{near}`?"));
            }
            let mistake = document.mistake(value.unwrap_or(root), what);
            self.mistakes.push(mistake);
            false
        };
        let version = field("apiVersion", &[API_VERSION]);
        let kind = field("kind", &KINDS);
        (version && kind).then_some(Kind::ConnectionPolicy)
    }
}
