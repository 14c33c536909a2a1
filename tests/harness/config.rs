//! The settings of a daemon under test.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::PathBuf,
};

use serde_json::{Map, Value, json};

use crate::{Daemon, Node, Workload};

/// Settings of a daemon; [`Reeve::start`] writes them and starts it.
#[derive(Debug)]
pub struct Reeve<'n> {
    node: &'n Node,
    settings: Value,
    policies: PathBuf,
    environment: Vec<OsString>,
    launcher: Vec<OsString>,
}

impl<'n> Reeve<'n> {
    pub(crate) fn new(node: &'n Node) -> Self {
        let folder = node.folder();
        let policies = folder.join("policies");
        fs::create_dir_all(&policies).expect("making a folder for policies");
        let settings = json!({
            "trustDomain": "example.org",
            "node": {
                "name": node.name(),
                "addresses": node.addresses().both(),
                "cgroupRoot": node.cgroup().path(),
                "bpffs": node.pins(),
            },
            "stateDir": folder.join("state"),
            "workloads": [],
            "peers": [],
            "policies": {"folder": policies},
            "certificates": {"sources": [{"embedded": {"caDir": node.network().trust()}}]},
            // The node's network namespace is its own, so a fixed port collides with nothing.
            "metrics": {"address": format!("127.0.0.1:{}", Daemon::METRICS_PORT)},
            "admin": {"socket": folder.join("admin.sock")},
            "log": {"format": "json", "level": "debug"},
        });
        Self {
            node,
            settings,
            policies,
            environment: Vec::new(),
            launcher: Vec::new(),
        }
    }

    /// Enrols a workload of this node.
    #[must_use]
    pub fn enrol(self, workload: &Workload) -> Self {
        self.enrol_with(workload, json!({}))
    }

    /// Enrols a workload of this node with more settings, or other ones.
    #[must_use]
    pub fn enrol_with(self, workload: &Workload, settings: Value) -> Self {
        let place = json!({"cgroup": workload.cgroup().below_mount()});
        self.push("workloads", [workload.attributes(), place, settings])
    }

    /// Tells it of a workload on another node.
    #[must_use]
    pub fn peer(self, workload: &Workload) -> Self {
        self.peer_with(workload, json!({"tunnel": true}))
    }

    /// Tells it of something elsewhere, with more settings, or other ones.
    #[must_use]
    pub fn peer_with(self, workload: &Workload, settings: Value) -> Self {
        let addresses = json!({"addresses": workload.addresses().both()});
        self.push("peers", [workload.attributes(), addresses, settings])
    }

    /// Gives it a policy file.
    #[must_use]
    pub fn policy(self, text: &str) -> Self {
        let number = fs::read_dir(&self.policies)
            .expect("the folder of policies is there")
            .count();
        fs::write(self.policies.join(format!("{number}.yaml")), text).expect("writing a policy");
        self
    }

    /// Trusts the authorities of another trust domain: certificates in PEM.
    #[must_use]
    pub fn trust(self, trust_domain: &str, authorities: &str) -> Self {
        let file = self.node.folder().join(format!("{trust_domain}.pem"));
        fs::write(&file, authorities).expect("writing a trust bundle");
        let place = format!("/certificates/trustBundles/{trust_domain}");
        self.set(&place, json!(file))
    }

    /// Where files for the daemon may be put.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        self.node.folder()
    }

    /// Sets anything, by JSON pointer: `/limits/handshakes`, `/certificates/sources/0/embedded`.
    /// What lies on the way is made; of a list, the next entry.
    #[must_use]
    pub fn set(mut self, pointer: &str, value: Value) -> Self {
        let mut place = &mut self.settings;
        for key in pointer.split('/').skip(1) {
            place = match (place, key.parse::<usize>()) {
                (Value::Array(list), Ok(index)) => {
                    if list.len() == index {
                        list.push(Value::Null);
                    }
                    &mut list[index]
                }
                (place, _) => &mut place[key],
            };
        }
        *place = value;
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn environment(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        let mut variable = OsString::from(name);
        variable.push("=");
        variable.push(value);
        self.environment.push(variable);
        self
    }

    /// Has another program start it: this program's words come before the daemon's.
    #[must_use]
    pub fn launched_by<W: Into<OsString>>(mut self, words: impl IntoIterator<Item = W>) -> Self {
        self.launcher.extend(words.into_iter().map(Into::into));
        self
    }

    /// Gives it mounts of its own, which nobody else sees, after this shell script has run there.
    #[must_use]
    pub fn with_mounts(self, script: &str) -> Self {
        let script = format!("set -e; {script}; exec \"$@\"");
        let words = ["unshare", "--mount", "--propagation", "private"];
        self.launched_by(words)
            .launched_by(["sh", "-c", &script, "sh"])
    }

    /// Writes the settings and starts the daemon; returns when it is ready.
    #[must_use]
    pub fn start(self) -> Daemon {
        let mut daemon = self.start_unready();
        daemon.wait_until_ready();
        daemon
    }

    /// Writes the settings and starts the daemon.
    #[must_use]
    pub fn start_unready(self) -> Daemon {
        let file = self.write();
        Daemon::start(self.node, file, self.environment, self.launcher)
    }

    /// Writes the settings, and gives the file.
    pub fn write(&self) -> PathBuf {
        let file = self.node.folder().join("reeve.yaml");
        // JSON is YAML.
        let text = serde_json::to_string_pretty(&self.settings).expect("settings are JSON");
        fs::write(&file, text).expect("writing the configuration");
        file
    }

    fn push<const N: usize>(mut self, list: &str, parts: [Value; N]) -> Self {
        let mut entry = Map::new();
        for part in parts {
            let Value::Object(part) = part else {
                panic!("settings of {list} are objects, not {part}");
            };
            entry.extend(part);
        }
        self.settings[list]
            .as_array_mut()
            .expect("it is a list")
            .push(Value::Object(entry));
        self
    }
}
