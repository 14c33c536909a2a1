//! Policies from files: found, read, checked against the workloads and peers that are declared.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use reeve_common::Direction;

use super::{
    document::{ConnectionPolicy, IdentityGroup, List, network::NetworkPolicy},
    lower::{self, Context, Groups, Lowered},
    population::{Member, Population},
    rule::{Effect, FarEnd, Isolation, Mode, Origin, PortMatch, Rule, Subjects},
};
use crate::{
    workload::{Namespaces, Peer, Roster, Workload},
    yaml::{self, Document, Mistake, Mistakes, NodeId, nearest, shown},
};

/// Group and version of reeve's own kinds.
const OWN_VERSION: &str = "reeve.dev/v1alpha1";

/// Group and version of Kubernetes' NetworkPolicy.
const NETWORK_VERSION: &str = "networking.k8s.io/v1";

/// The kinds of documents, and the `apiVersion` of each.
const KINDS: [(Kind, &str, &str); 7] = [
    (Kind::ConnectionPolicy, "ConnectionPolicy", OWN_VERSION),
    (Kind::IdentityGroup, "IdentityGroup", OWN_VERSION),
    (Kind::NetworkPolicy, "NetworkPolicy", NETWORK_VERSION),
    (Kind::List, "List", "v1"),
    (
        Kind::ConnectionPolicies,
        "ConnectionPolicyList",
        OWN_VERSION,
    ),
    (Kind::IdentityGroups, "IdentityGroupList", OWN_VERSION),
    (Kind::NetworkPolicies, "NetworkPolicyList", NETWORK_VERSION),
];

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
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The workloads of this node.
    pub workloads: &'a [Arc<Workload>],
    /// The peers.
    pub peers: &'a [Arc<Peer>],
    /// Labels of the namespaces.
    pub namespaces: &'a Namespaces,
}

/// What a policy is called, and where it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// `namespace/name`, or `name`.
    pub name: String,
    /// Its kind, as it is written.
    pub kind: &'static str,
    /// The file.
    pub file: Arc<Path>,
    /// Line in the file, from 1.
    pub line: usize,
    /// Whom it is for.
    pub(crate) subjects: Arc<Subjects>,
}

/// Policies without a mistake, in the order of their files' names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicySet {
    pub(crate) rules: Vec<Rule>,
    pub(crate) isolations: Vec<Isolation>,
    pub(crate) heads: Arc<Vec<Head>>,
    policies: usize,
    warnings: Vec<Mistake>,
    emptied: Vec<Mistake>,
    /// Files in which nothing is written.
    empty: Vec<PathBuf>,
}

/// The kinds of documents.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    ConnectionPolicy,
    IdentityGroup,
    NetworkPolicy,
    /// Several documents in one, as `kubectl get -o yaml` writes them.
    List,
    /// Several in one, as the API server gives them: an item may leave out what it is.
    ConnectionPolicies,
    IdentityGroups,
    NetworkPolicies,
}

struct Loader<'a> {
    known: Option<&'a Population<'a>>,
    /// Where each policy was found first: of every name, the kinds that have it.
    names: HashMap<String, Vec<(Kind, Arc<Path>, usize)>>,
    mistakes: Mistakes,
    documents: Vec<Document>,
    groups: Groups,
    set: PolicySet,
}

// === impl Kind ===

impl Kind {
    /// As it is written.
    fn name(self) -> &'static str {
        let written = KINDS.into_iter().find(|(kind, ..)| *kind == self);
        written.map_or("", |(_, name, _)| name)
    }

    /// What each item is, of a list of one kind.
    fn of_items(self) -> Option<Self> {
        match self {
            Self::ConnectionPolicies => Some(Self::ConnectionPolicy),
            Self::IdentityGroups => Some(Self::IdentityGroup),
            Self::NetworkPolicies => Some(Self::NetworkPolicy),
            Self::ConnectionPolicy | Self::IdentityGroup | Self::NetworkPolicy | Self::List => None,
        }
    }
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
        loader.documents(documents);
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
        loader.documents(&[]);
        loader.mistakes
    }

    /// Between two sets: what allows or denies anybody as in `anybody`, and what is about somebody
    /// as in both. What both sets allow it allows, and what both refuse it refuses.
    #[must_use]
    pub(crate) fn between(anybody: &Self, other: &Self) -> Self {
        let mut between = anybody.clone();
        let own: HashMap<&str, &Rule> = anybody
            .rules
            .iter()
            .map(|rule| (rule.origin.name.as_str(), rule))
            .collect();
        let more = other
            .rules
            .iter()
            .filter(|rule| own.get(rule.origin.name.as_str()) != Some(rule));
        for rule in more {
            let mut rule = rule.clone();
            rule.far_ends.retain(|far_end| *far_end != FarEnd::Anybody);
            if !rule.far_ends.is_empty() {
                between.rules.push(rule);
            }
        }
        between
    }

    /// The same, with everything refused to workloads in a direction, for want of room: by the names of
    /// the workloads.
    #[must_use]
    pub(crate) fn closing<'a>(
        &self,
        sides: impl IntoIterator<Item = (&'a str, Direction)>,
    ) -> Self {
        let mut names: BTreeMap<u8, (Direction, BTreeSet<String>)> = BTreeMap::new();
        for (name, direction) in sides {
            let entry = names.entry(direction as u8);
            let (_, names) = entry.or_insert_with(|| (direction, BTreeSet::new()));
            names.insert(name.to_owned());
        }
        let rule = |(direction, names): (Direction, BTreeSet<String>)| Rule {
            origin: Origin {
                name: match direction {
                    Direction::Egress => "no room/egress".to_owned(),
                    Direction::Ingress => "no room/ingress".to_owned(),
                },
                file: Path::new("").into(),
                line: 0,
            },
            subjects: Arc::new(Subjects {
                names,
                ..Subjects::default()
            }),
            direction,
            far_ends: vec![FarEnd::Anybody],
            ports: vec![PortMatch::Everything],
            effect: Effect::NoRoom,
            mode: Mode::Enforce,
        };
        let mut closing = self.clone();
        closing.rules.extend(names.into_values().map(rule));
        closing
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

    /// Files that held policies before and hold nothing now: as after taking all of them out, and
    /// as in the moment between emptying a file and writing it anew.
    pub fn emptied<'a>(&'a self, before: &'a Self) -> impl Iterator<Item = &'a Path> {
        let held = |file: &&Path| before.heads.iter().any(|head| *head.file == **file);
        self.empty.iter().map(PathBuf::as_path).filter(held)
    }

    /// What is not wrong, and probably not meant.
    #[must_use]
    pub fn warnings(&self) -> &[Mistake] {
        &self.warnings
    }

    /// Rules that mean everybody since nothing is written where their far ends would be.
    pub(crate) fn emptied_rules(&self) -> &[Mistake] {
        &self.emptied
    }
}

// === impl Known ===

impl<'a> Known<'a> {
    fn population(&self) -> Population<'a> {
        let workloads = self.workloads.iter().map(|workload| Member {
            name: &workload.name,
            attributes: Some(&workload.attributes),
            ports: &workload.named_ports,
        });
        let peers = self.peers.iter().map(|peer| Member {
            name: &peer.name,
            attributes: peer.attributes.as_ref(),
            ports: &peer.named_ports,
        });
        Population::new(workloads.chain(peers), self.namespaces)
    }
}

impl<'a> From<&'a Roster> for Known<'a> {
    fn from(roster: &'a Roster) -> Self {
        Self {
            workloads: &roster.workloads,
            peers: &roster.peers,
            namespaces: &roster.namespaces,
        }
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
            documents: Vec::new(),
            groups: Groups::default(),
            set: PolicySet::default(),
        }
    }

    fn finish(mut self) -> Result<PolicySet, Mistakes> {
        self.documents(&[]);
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
        if documents.is_empty() {
            self.set.empty.push(file.to_owned());
        }
        self.mistakes.extend(mistakes);
        self.documents.extend(documents);
    }

    /// Takes what was read here and elsewhere: groups first, which any policy may name.
    fn documents(&mut self, elsewhere: &[&Document]) {
        let documents = std::mem::take(&mut self.documents);
        let mut policies = Vec::new();
        for document in documents.iter().chain(elsewhere.iter().copied()) {
            for (node, kind) in self.kinds(document, document.root()) {
                if kind == Kind::IdentityGroup {
                    self.group(document, node);
                } else {
                    policies.push((document, node, kind));
                }
            }
        }
        for (document, node, kind) in policies {
            if let Some(lowered) = self.policy(document, node, kind) {
                self.take(document, kind, lowered);
            }
        }
    }

    fn context<'d>(&self, document: &'d Document, root: NodeId) -> Context<'d>
    where
        'a: 'd,
    {
        Context {
            document,
            root,
            known: self.known,
        }
    }

    fn group(&mut self, document: &Document, node: NodeId) {
        let group = yaml::read_at::<IdentityGroup>(document, node, &mut self.mistakes);
        let Some(group) = group else { return };
        let context = self.context(document, node);
        lower::identity_group(context, group, &mut self.groups, &mut self.mistakes);
    }

    fn policy(&mut self, document: &Document, node: NodeId, kind: Kind) -> Option<Lowered> {
        let context = self.context(document, node);
        let mistakes = &mut self.mistakes;
        match kind {
            Kind::ConnectionPolicy => {
                let policy = yaml::read_at::<ConnectionPolicy>(document, node, mistakes)?;
                let groups = &self.groups;
                Some(lower::connection_policy(context, policy, groups, mistakes))
            }
            Kind::NetworkPolicy => {
                let policy = yaml::read_at::<NetworkPolicy>(document, node, mistakes)?;
                Some(lower::network_policy(context, policy, mistakes))
            }
            Kind::IdentityGroup
            | Kind::List
            | Kind::ConnectionPolicies
            | Kind::IdentityGroups
            | Kind::NetworkPolicies => None,
        }
    }

    fn take(&mut self, document: &Document, kind: Kind, mut lowered: Lowered) {
        if let Some((name, node)) = lowered.name.take() {
            let written = kind.name();
            let (file, line) = (Arc::clone(document.file()), document.line(node));
            let namesakes = self.names.entry(name.clone()).or_default();
            if let Some((_, file, line)) = namesakes.iter().find(|(other, ..)| *other == kind) {
                let what = format!(
                    "there is a {written} `{name}` already, in {} on line {line}; give one of \
                     them another name",
                    file.display()
                );
                self.mistakes.push(document.mistake(node, what));
            }
            // Policies of two kinds may have one name; their rules may not.
            let title = if namesakes.is_empty() {
                name
            } else {
                lowered.rename(&name, format!("{written}:{name}"))
            };
            namesakes.push((kind, Arc::clone(&file), line));
            Arc::make_mut(&mut self.set.heads).push(Head {
                name: title,
                kind: written,
                file,
                line,
                subjects: lowered.subjects,
            });
        }
        self.set.policies += 1;
        self.set.rules.extend(lowered.rules);
        self.set.isolations.extend(lowered.isolation);
        self.set.warnings.extend(lowered.warnings);
        self.set.emptied.extend(lowered.emptied);
    }

    /// What a document is, by `apiVersion` and `kind`; of a list, what its items are.
    fn kinds(&mut self, document: &Document, node: NodeId) -> Vec<(NodeId, Kind)> {
        if document.items(node).is_some() {
            let what = "is a list; expected one policy: part them by lines of `---`, or put them \
                        below `items` of a `kind: List`";
            self.mistakes.push(document.mistake(node, what));
            return Vec::new();
        }
        let kind = self.field(document, node, "kind", &KINDS.map(|(_, name, _)| name));
        let kind = KINDS.into_iter().find(|(_, name, _)| Some(*name) == kind);
        let versions: Vec<_> = match kind {
            Some((.., version)) => vec![version],
            None => KINDS.map(|(.., version)| version).to_vec(),
        };
        let version = self.field(document, node, "apiVersion", &versions);
        let (Some((kind, ..)), Some(_)) = (kind, version) else {
            return Vec::new();
        };
        if kind == Kind::List || kind.of_items().is_some() {
            self.items(document, node, kind)
        } else {
            vec![(node, kind)]
        }
    }

    /// What the items of a list are.
    fn items(&mut self, document: &Document, node: NodeId, kind: Kind) -> Vec<(NodeId, Kind)> {
        let Some(list) = yaml::read_at::<List>(document, node, &mut self.mistakes) else {
            return Vec::new();
        };
        let Some(items) = list.items else {
            // What `items` holds that is no list is a mistake already.
            let written = document.child(node, "items");
            if written.is_none_or(|items| document.is_null(items)) {
                let what = "`items` is missing; add it, as `items: []` where the list is empty";
                self.mistakes.push(document.mistake(node, what));
            }
            return Vec::new();
        };
        let mut found = Vec::new();
        for item in document.list(items.node) {
            match kind.of_items() {
                Some(one) if self.may_be(document, *item, one) => found.push((*item, one)),
                Some(_) => {}
                None => found.extend(self.kinds(document, *item)),
            }
        }
        found
    }

    /// Whether an item of a list of one kind says nothing else of itself.
    fn may_be(&mut self, document: &Document, item: NodeId, kind: Kind) -> bool {
        let Some((_, name, version)) = KINDS.into_iter().find(|(one, ..)| *one == kind) else {
            return false;
        };
        [("kind", name), ("apiVersion", version)]
            .into_iter()
            .filter(|(field, _)| document.child(item, field).is_some())
            .all(|(field, wanted)| self.field(document, item, field, &[wanted]).is_some())
    }

    /// A field that has one of some texts.
    fn field<'d>(
        &mut self,
        document: &'d Document,
        node: NodeId,
        name: &str,
        wanted: &[&'static str],
    ) -> Option<&'d str> {
        let value = document.child(node, name);
        let text = value.and_then(|value| document.text(value));
        if let Some(text) = text.filter(|text| wanted.contains(text)) {
            return Some(text);
        }
        let mut expected: Vec<&str> = Vec::new();
        for text in wanted {
            if !expected.contains(text) {
                expected.push(text);
            }
        }
        let mut what = match text {
            Some(text) => format!("`{}` is not known here", shown(text)),
            None => format!("`{name}` is missing"),
        };
        what.push_str(&format!("; expected `{}`", expected.join("`, `")));
        if let Some(near) = text.and_then(|text| nearest(text, wanted.iter().copied())) {
            what.push_str(&format!("; did you mean `{near}`?"));
        }
        let mistake = document.mistake(value.unwrap_or(node), what);
        self.mistakes.push(mistake);
        None
    }
}
