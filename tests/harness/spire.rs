//! A real SPIRE: a server, and an agent on each node, as processes with settings of their own.
//!
//! `cargo xtask peers` builds its programs and says where they are.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde_json::Value;

use crate::{Node, Place, Process, Programs, certs::Authority, wait};

const PORT: u16 = 8081;
/// For a program of SPIRE to become ready or to end, on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running server of one trust domain. Dropped, it is gone.
#[derive(Debug)]
pub struct Server {
    trust_domain: String,
    place: Place,
    address: SocketAddr,
    folder: PathBuf,
    process: Option<Process>,
}

/// Settings of a server.
pub struct Settings<'a> {
    /// Whose identities it gives.
    pub trust_domain: &'a str,
    /// Of the workloads' certificates, as in `1m`.
    pub lifetime: &'a str,
    /// What signs the server's authority; none where it signs itself.
    pub upstream: Option<&'a Authority>,
}

/// A registration entry.
#[derive(Debug)]
pub struct Entry<'a> {
    /// The identity that it grants.
    pub id: &'a str,
    /// What a process must have.
    pub selectors: &'a [&'a str],
    /// Other trust domains, whose bundles go with it.
    pub federates_with: &'a [&'a str],
}

/// A running agent. Dropped, it is gone.
#[derive(Debug)]
pub struct Agent {
    id: String,
    place: Place,
    folder: PathBuf,
    process: Option<Process>,
}

/// What the server is told of an authority, as a step of its replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is a next one, which everybody trusts and which signs nothing yet.
    Prepare,
    /// The next one signs.
    Activate,
    /// What the old one has signed is replaced.
    Taint,
    /// The old one is not trusted any more.
    Revoke,
}

// === impl Server ===

impl Server {
    /// Starts a server in a node's host network.
    #[must_use]
    pub fn start(node: &Node, settings: &Settings<'_>) -> Self {
        let folder = node.folder().join("spire-server");
        fs::create_dir(&folder).expect("making a folder for a server");
        let mut server = Self {
            trust_domain: settings.trust_domain.to_owned(),
            place: beside(node, "spire-server"),
            address: node.addresses().port4(PORT),
            folder,
            process: None,
        };
        if let Some(authority) = settings.upstream {
            server.put_upstream(authority);
        }
        let text = server.configuration(settings);
        fs::write(server.file("server.conf"), text).expect("writing a server's settings");
        server.start_again();
        server
    }

    /// Starts it, after it was stopped, with what it had.
    pub fn start_again(&mut self) {
        assert!(self.process.is_none(), "the server runs");
        let (program, config) = (program("SERVER"), self.file("server.conf"));
        let socket = self.file("api.sock");
        let words = [text(&program), "run", "-config", text(&config)];
        let process = self.process.insert(self.place.spawn(words));
        let ask = [text(&program), "healthcheck", "-socketPath", text(&socket)];
        until_ready(process, || {
            socket.exists() && self.place.exec(ask).status.success()
        });
    }

    /// Asks it to stop, and waits until it has.
    pub fn stop(&mut self) {
        stop(&mut self.process);
    }

    /// Replaces what signs the server's next authority.
    pub fn put_upstream(&self, authority: &Authority) {
        for (name, text) in [
            ("upstream.pem", authority.certificate_pem()),
            ("upstream.key", authority.key_pem()),
        ] {
            fs::write(self.file(name), text).expect("writing an upstream authority");
        }
    }

    /// Creates an entry for processes of an agent's node, and gives its id.
    pub fn grant(&self, agent: &Agent, entry: &Entry<'_>) -> String {
        let mut words = vec!["entry", "create", "-output", "json"];
        words.extend(["-parentID", &agent.id, "-spiffeID", entry.id]);
        for selector in entry.selectors {
            words.extend(["-selector", selector]);
        }
        let federates_with = entry.federates_with.iter();
        let federates_with: Vec<_> = federates_with.map(|it| format!("spiffe://{it}")).collect();
        for trust_domain in &federates_with {
            words.extend(["-federatesWith", trust_domain]);
        }
        let said = self.ask_json(&words);
        let id = &said["results"][0]["entry"]["id"];
        let id = id.as_str().unwrap_or_else(|| panic!("no entry: {said}"));
        id.to_owned()
    }

    /// Deletes an entry.
    pub fn withdraw(&self, entry: &str) {
        self.ask(&["entry", "delete", "-entryID", entry]);
    }

    /// Its own bundle, in PEM.
    #[must_use]
    pub fn bundle(&self) -> String {
        self.ask(&["bundle", "show", "-format", "pem"])
    }

    /// Gives it the bundle of another trust domain, in PEM.
    pub fn federate(&self, trust_domain: &str, bundle: &str) {
        let file = self.file("federated.pem");
        fs::write(&file, bundle).expect("writing a bundle");
        let id = format!("spiffe://{trust_domain}");
        let set = ["bundle", "set", "-format", "pem", "-id", &id, "-path"];
        self.ask(&[&set[..], &[text(&file)]].concat());
    }

    /// A step of the replacement of its own authority.
    pub fn authority(&self, step: Step) {
        let state = self.ask_json(&["localauthority", "x509", "show", "-output", "json"]);
        let whose = match step {
            Step::Prepare => {
                self.ask(&["localauthority", "x509", "prepare"]);
                return;
            }
            Step::Activate => "prepared",
            Step::Taint | Step::Revoke => "old",
        };
        let id = state[whose]["authority_id"].as_str();
        let id = id.unwrap_or_else(|| panic!("no authority is {whose}: {state}"));
        self.ask(&["localauthority", "x509", step.word(), "-authorityID", id]);
    }

    /// A step of the replacement of the authority above its own: [`Step::Taint`] or [`Step::Revoke`].
    pub fn upstream(&self, step: Step) {
        let state = self.ask_json(&["localauthority", "x509", "show", "-output", "json"]);
        let id = state["old"]["upstream_authority_subject_key_id"].as_str();
        let id = id.unwrap_or_else(|| panic!("no old authority has one above it: {state}"));
        self.ask(&["upstreamauthority", step.word(), "-subjectKeyID", id]);
    }

    /// Runs a command of its own program, and gives what it printed.
    fn ask(&self, words: &[&str]) -> String {
        let (program, socket) = (program("SERVER"), self.file("api.sock"));
        let words = [&[text(&program)], words, &["-socketPath", text(&socket)]];
        self.place.exec(words.concat()).ok()
    }

    fn ask_json(&self, words: &[&str]) -> Value {
        let said = self.ask(words);
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{words:?}: {error}: {said}"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn configuration(&self, settings: &Settings<'_>) -> String {
        let folder = self.folder.display();
        let upstream = settings.upstream.map_or_else(String::new, |_| {
            format!(
                r#"
  UpstreamAuthority "disk" {{
    plugin_data {{
      cert_file_path = "{folder}/upstream.pem"
      key_file_path = "{folder}/upstream.key"
    }}
  }}"#
            )
        });
        format!(
            r#"
server {{
  bind_address = "{}"
  bind_port = "{}"
  socket_path = "{folder}/api.sock"
  trust_domain = "{}"
  data_dir = "{folder}"
  log_level = "DEBUG"
  default_x509_svid_ttl = "{}"
  agent_ttl = "1h"
  experimental {{ cache_reload_interval = "1s" }}
}}
plugins {{
  DataStore "sql" {{
    plugin_data {{
      database_type = "sqlite3"
      connection_string = "{folder}/datastore.sqlite3"
    }}
  }}
  KeyManager "disk" {{ plugin_data {{ keys_path = "{folder}/keys.json" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}{upstream}
}}
"#,
            self.address.ip(),
            self.address.port(),
            self.trust_domain,
            settings.lifetime,
        )
    }
}

// === impl Agent ===

impl Agent {
    /// Starts the agent of a node, which lets whoever has one of `delegates` ask for workloads.
    #[must_use]
    pub fn start(node: &Node, server: &Server, delegates: &[&str]) -> Self {
        let folder = node.folder().join("spire-agent");
        for part in ["public", "admin"] {
            fs::create_dir_all(folder.join(part)).expect("making a folder for an agent");
        }
        let said = server.ask_json(&["token", "generate", "-output", "json"]);
        let token = said["value"].as_str();
        let token = token.unwrap_or_else(|| panic!("no token: {said}"));
        let mut agent = Self {
            id: format!(
                "spiffe://{}/spire/agent/join_token/{token}",
                server.trust_domain
            ),
            place: beside(node, "spire-agent"),
            folder,
            process: None,
        };
        let text = agent.configuration(server, delegates);
        fs::write(agent.config(), text).expect("writing an agent's settings");
        agent.run(&["-joinToken", token]);
        agent
    }

    /// Starts it, after it was stopped, with what it had.
    pub fn start_again(&mut self) {
        self.run(&[]);
    }

    /// Asks it to stop, and waits until it has.
    pub fn stop(&mut self) {
        stop(&mut self.process);
    }

    /// The socket of the Workload API.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.join("public/api.sock")
    }

    /// The socket of the Delegated Identity API.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.folder.join("admin/api.sock")
    }

    fn config(&self) -> PathBuf {
        self.folder.join("agent.conf")
    }

    fn run(&mut self, more: &[&str]) {
        assert!(self.process.is_none(), "the agent runs");
        let (program, config) = (program("AGENT"), self.config());
        let words = [text(&program), "run", "-config", text(&config)];
        let sockets = [self.socket(), self.admin_socket()];
        let process = self.place.spawn([&words, more].concat());
        let process = self.process.insert(process);
        until_ready(process, || sockets.iter().all(|socket| socket.exists()));
    }

    fn configuration(&self, server: &Server, delegates: &[&str]) -> String {
        let folder = self.folder.display();
        format!(
            r#"
agent {{
  data_dir = "{folder}"
  log_level = "DEBUG"
  server_address = "{}"
  server_port = "{}"
  socket_path = "{folder}/public/api.sock"
  admin_socket_path = "{folder}/admin/api.sock"
  authorized_delegates = {delegates:?}
  trust_domain = "{}"
  insecure_bootstrap = true
  experimental {{ sync_interval = "1s" }}
}}
plugins {{
  KeyManager "disk" {{ plugin_data {{ directory = "{folder}" }} }}
  NodeAttestor "join_token" {{ plugin_data {{}} }}
  WorkloadAttestor "unix" {{
    plugin_data {{
      discover_workload_path = true
      # No checksums of programs.
      workload_size_limit = -1
    }}
  }}
}}
"#,
            server.address.ip(),
            server.address.port(),
            server.trust_domain,
        )
    }
}

// === impl Step ===

impl Step {
    fn word(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Activate => "activate",
            Self::Taint => "taint",
            Self::Revoke => "revoke",
        }
    }
}

/// A cgroup of its own among the host's processes.
fn beside(node: &Node, name: &str) -> Place {
    let cgroup = node.cgroup().child(name);
    node.host().with_cgroup(Arc::new(cgroup))
}

/// What `cargo xtask peers` has built.
fn program(name: &str) -> PathBuf {
    let variable = format!("REEVE_SPIRE_{name}");
    let path = env::var_os(&variable).map(PathBuf::from);
    let path = path.filter(|path| path.is_file());
    path.unwrap_or_else(|| {
        panic!("{variable} names no program of SPIRE: run these tests with `cargo xtask peers`")
    })
}

/// Paths of tests are text.
fn text(path: &Path) -> &str {
    path.to_str().expect("the path is text")
}

fn until_ready(process: &mut Process, mut is_ready: impl FnMut() -> bool) {
    let ready = wait::until(PATIENCE, || {
        if let Some(status) = process.ended() {
            panic!("a program of SPIRE ended ({status}): {}", said(process));
        }
        is_ready().then_some(())
    });
    assert!(ready.is_some(), "SPIRE is not ready: {}", said(process));
}

fn said(process: &Process) -> String {
    process.stdout() + &process.stderr()
}

fn stop(process: &mut Option<Process>) {
    let process = process.take().expect("the program runs");
    process.stop(PATIENCE);
}

impl Drop for Server {
    fn drop(&mut self) {
        show(&self.folder, self.process.as_ref());
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        show(&self.folder, self.process.as_ref());
    }
}

/// Shows a log if the test is failing.
fn show(folder: &Path, process: Option<&Process>) {
    if std::thread::panicking()
        && let Some(process) = process
    {
        eprintln!("--- log at {} ---\n{}", folder.display(), said(process));
    }
}

/// Selectors of the daemon under test, as an agent finds them.
#[must_use]
pub fn reeve_itself() -> [String; 2] {
    let program = fs::canonicalize(&Programs::get().reeve).expect("the daemon is built");
    [
        "unix:uid:0".to_owned(),
        format!("unix:path:{}", program.display()),
    ]
}
