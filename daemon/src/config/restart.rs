//! Settings that a running daemon does not take: they need a restart, and none of them is ever taken by
//! half.

use std::{
    collections::BTreeMap,
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher},
};

use super::{Certificates, Config, Node};

/// What becomes of a reload whose file has changed such a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reload {
    /// It leaves the setting as it is, and takes the rest of the file.
    LeavesIt,
    /// It is refused as a whole: what else it would take is settled by this setting.
    IsRefused,
}

/// One setting, as it is somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Fixed {
    name: &'static str,
    reload: Reload,
    /// All that it says.
    value: String,
}

/// Settings that differ between two configurations and that only a restart takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestartNeeded {
    /// With one of these a reload is refused.
    pub refused: Vec<&'static str>,
    /// A reload leaves these as they are.
    pub left: Vec<&'static str>,
}

// === impl Config ===

impl Config {
    /// This configuration with what a running daemon takes of another one, and what it does not take.
    #[must_use]
    pub fn reloaded(&self, new: Self) -> (Self, RestartNeeded) {
        let needed = RestartNeeded::of(&self.fixed(), |one| new.fixed().contains(one));
        let merged = Self {
            // Whose address is the node's changes with the policies.
            node: Node {
                addresses: new.node.addresses,
                host_addresses: new.node.host_addresses,
                ..self.node.clone()
            },
            workloads: new.workloads,
            enforced_parents: new.enforced_parents,
            peers: new.peers,
            namespaces: new.namespaces,
            policies: new.policies,
            unselected: new.unselected,
            certificates: Certificates {
                sources: self.certificates.sources.clone(),
                ..new.certificates
            },
            ..self.clone()
        };
        (merged, needed)
    }

    /// A short text for each setting that a running daemon does not take, which another one of the same
    /// version has for the same value.
    #[must_use]
    pub fn fingerprints(&self) -> BTreeMap<String, String> {
        let prints = self.fixed().into_iter();
        prints
            .map(|fixed| (fixed.name.to_owned(), fingerprint(&fixed)))
            .collect()
    }

    /// What of this file a daemon with these [fingerprints](Self::fingerprints) does not take.
    #[must_use]
    pub fn restart_needed(&self, running: &BTreeMap<String, String>) -> RestartNeeded {
        RestartNeeded::of(&self.fixed(), |one| {
            running
                .get(one.name)
                .is_none_or(|print| *print == fingerprint(one))
        })
    }

    /// Every setting of a configuration is named here: as one of those that are returned, or as one that a
    /// reload takes.
    fn fixed(&self) -> Vec<Fixed> {
        let Self {
            // What a reload takes.
            file: _,
            workloads: _,
            enforced_parents: _,
            peers: _,
            namespaces: _,
            policies: _,
            unselected: _,
            // What it does not.
            trust_domain,
            node,
            state_dir,
            certificates,
            tls,
            ports,
            congestion_control,
            limits,
            timeouts,
            maps,
            sandbox,
            metrics,
            admin,
            log,
        } = self;
        let node = Node {
            addresses: Vec::new(),
            host_addresses: false,
            ..node.clone()
        };
        let fixed = |name, reload, value: &dyn Debug| Fixed {
            name,
            reload,
            value: format!("{value:?}"),
        };
        use Reload::{IsRefused, LeavesIt};
        vec![
            // Identities of workloads and peers.
            fixed("trustDomain", IsRefused, trust_domain),
            // Sources that workloads name.
            fixed("certificates.sources", IsRefused, &certificates.sources),
            // Peers' tunnels, where they name no port.
            fixed("ports", IsRefused, ports),
            // How many workloads and peers there may be.
            fixed("maps", IsRefused, maps),
            fixed("node", LeavesIt, &node),
            fixed("stateDir", LeavesIt, state_dir),
            fixed("tls", LeavesIt, tls),
            fixed("tunnel.congestionControl", LeavesIt, congestion_control),
            fixed("limits", LeavesIt, limits),
            fixed("timeouts", LeavesIt, timeouts),
            fixed("sandbox", LeavesIt, sandbox),
            fixed("metrics", LeavesIt, metrics),
            fixed("admin", LeavesIt, admin),
            fixed("log", LeavesIt, log),
        ]
    }
}

// === impl RestartNeeded ===

impl RestartNeeded {
    fn of(all: &[Fixed], is_same: impl Fn(&Fixed) -> bool) -> Self {
        let mut needed = Self::default();
        for fixed in all.iter().filter(|fixed| !is_same(fixed)) {
            match fixed.reload {
                Reload::IsRefused => needed.refused.push(fixed.name),
                Reload::LeavesIt => needed.left.push(fixed.name),
            }
        }
        needed
    }

    /// Why a reload is refused, if it is.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        (!self.refused.is_empty()).then(|| {
            format!(
                "`{}` cannot change while reeve runs, and the rest of the file depends on it: nothing of the \
                 file is taken; restart reeve, or take the change back",
                self.refused.join("`, `")
            )
        })
    }

    /// What `reeve check` has to say of them, one sentence each.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if !self.refused.is_empty() {
            warnings.push(format!(
                "the running daemon refuses to reload this file and has to be restarted for it: `{}` has changed",
                self.refused.join("`, `")
            ));
        }
        if !self.left.is_empty() {
            warnings.push(format!(
                "the running daemon has to be restarted for `{}`: a reload leaves the old values in force",
                self.left.join("`, `")
            ));
        }
        warnings
    }
}

fn fingerprint(fixed: &Fixed) -> String {
    let mut hasher = DefaultHasher::new();
    fixed.value.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parsed(lines: &str) -> Config {
        let text = format!("node: {{name: a}}\n{lines}");
        Config::parse(Path::new("/reeve.yaml"), &text).unwrap()
    }

    const BEFORE: &str = "trustDomain: example.org\n";

    #[test]
    fn workloads_change_at_a_reload_and_time_outs_do_not() {
        let before = parsed(BEFORE);
        let new = "trustDomain: example.org\ntimeouts: {drain: 7s}\n\
            enforcedParents: [/jobs.slice]\n\
            workloads: [{name: web, cgroup: /web}]\n";
        let mut new = parsed(new);
        new.node.host_addresses = true;
        let (merged, needed) = before.reloaded(new.clone());
        assert_eq!(merged.workloads.len(), 1);
        assert_eq!(merged.enforced_parents, ["/jobs.slice"]);
        assert!(merged.node.host_addresses);
        assert_eq!(merged.timeouts, before.timeouts);
        assert_eq!(needed.left, ["timeouts"]);
        assert_eq!(needed.refusal(), None);
        assert_eq!(new.restart_needed(&before.fingerprints()), needed);
        assert_eq!(needed.warnings().len(), 1);
        let none = RestartNeeded::default();
        assert_eq!(before.restart_needed(&before.fingerprints()), none);
        assert!(none.warnings().is_empty());
    }

    #[test]
    fn what_others_are_settled_by_has_the_reload_refused() {
        let before = parsed(BEFORE);
        for (lines, name) in [
            ("trustDomain: example.com\n", "trustDomain"),
            (
                "trustDomain: example.org\nports: {tunnel: 15009}\n",
                "ports",
            ),
            (
                "trustDomain: example.org\nmaps: {workloads: 2000}\n",
                "maps",
            ),
            (
                "trustDomain: example.org\ncertificates: {sources: [{embedded: {caDir: /ca}}]}\n",
                "certificates.sources",
            ),
        ] {
            let new = parsed(lines);
            let (_, needed) = before.reloaded(new.clone());
            assert_eq!(needed.refused, [name]);
            assert!(needed.refusal().unwrap().contains(name));
            assert_eq!(new.restart_needed(&before.fingerprints()), needed);
        }
    }
}
