//! The container image, run as `deploy/kubernetes/reeve.yaml` has a kubelet run it: its arguments, its
//! privileges, its mounts and its configuration.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use harness::{Daemon, Network, Node, Output, Process, eventually};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::{Value, json};

use crate::{
    arrange::{PORT, is_denied, say, send, serve},
    deploy::beside_target,
    release::{Release, run},
};

#[test]
fn the_image_runs_as_the_manifest_says() {
    let network = Network::new();
    let node = Node::new(&network, "node");
    let (inside, stranger) = (node.pod("inside"), node.pod("stranger"));
    let release = Release::get();
    let manifest = Manifest::of(&release.folder);
    let folders = manifest.write_config(&node, &inside);
    let container = Container::new(&node);
    container
        .podman(["load", "--input", path(&release.image)])
        .ok();

    let _servers = [serve(&inside, PORT, &[]), serve(&stranger, PORT, &[])];
    let probed = inside.addresses();
    let to = stranger.addresses().port4(PORT);
    say(&inside, to, "before it is enrolled");
    let mut daemon = container.start(manifest.run(&folders));
    // What the kubelet asks.
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let get = &manifest.container[probe]["httpGet"];
        let answers = format!(
            "http://127.0.0.1:{}{}",
            Daemon::METRICS_PORT,
            text(&get["path"])
        );
        eventually(&format!("{probe}: {answers}"), || {
            assert!(
                daemon.ended().is_none(),
                "{}{}",
                daemon.stdout(),
                daemon.stderr()
            );
            let asked = ["curl", "--silent", "--fail", &answers];
            node.host().exec(asked).status.success()
        });
    }
    let status = container.exec(["reeve", "status", "--json"]).json();
    assert_eq!(status["ready"], true, "{status}");
    assert_eq!(status["workloads"][0]["state"], "running", "{status}");
    is_denied(&inside, to);
    // The kubelet probes pods from whichever address of the host's leads to them, and nobody else does.
    for probed in [probed.port4(PORT), probed.port6(PORT)] {
        say(node.host(), probed, "a probe");
        send(&stranger, probed, &["--text", "no probe"]).fails();
    }
    for (named, folder) in [("state", "ca"), ("run", "admin.sock")] {
        let folder = folders.join(named).join(folder);
        assert!(folder.exists(), "{}", folder.display());
    }

    container.podman(["stop", "--time", "60", CONTAINER]).ok();
    let ended = daemon.wait(harness::SOON);
    assert!(ended.status.success(), "{}{}", ended.stdout, ended.stderr);
    is_denied(&inside, to);
}

#[test]
fn nothing_but_reeve_is_in_the_image() {
    let node = Node::new(&Network::new(), "node");
    let container = Container::new(&node);
    let image = &Release::get().image;
    container.podman(["load", "--input", path(image)]).ok();
    let manifest = Manifest::of(&Release::get().folder);
    let image = text(&manifest.container["image"]);
    container
        .podman(["create", "--name", CONTAINER, image])
        .ok();
    let files = node.folder().join("files.tar");
    container
        .podman(["export", "--output", path(&files), CONTAINER])
        .ok();
    let listed = run(Command::new("tar").arg("-tf").arg(files));
    let files: Vec<_> = listed.lines().filter(|path| !path.ends_with('/')).collect();
    assert_eq!(
        files,
        [
            "usr/local/bin/reeve",
            "usr/share/doc/reeve/LICENSE-APACHE",
            "usr/share/doc/reeve/LICENSE-MIT",
            "usr/share/doc/reeve/THIRD-PARTY.md",
            "usr/share/doc/reeve/reeve.cdx.json",
        ]
    );
}

// === the manifest ===

struct Manifest {
    /// The daemon's container.
    container: Value,
    /// Its pod.
    pod: Value,
    /// The configuration that comes with it.
    config: Value,
}

impl Manifest {
    /// That of a release.
    fn of(release: &Path) -> Self {
        let documents =
            yaml(&fs::read_to_string(release.join("deploy/kubernetes/reeve.yaml")).unwrap());
        let of_kind = |kind: &str| {
            let mut documents = documents.as_array().unwrap().iter();
            documents
                .find(|document| document["kind"] == kind)
                .unwrap()
                .clone()
        };
        let pod = of_kind("DaemonSet")["spec"]["template"]["spec"].clone();
        let config = of_kind("ConfigMap");
        assert_eq!(config["metadata"]["name"], "reeve-config");
        let config = yaml(text(&config["data"]["reeve.yaml"]));
        Self {
            container: pod["containers"][0].clone(),
            config: config[0].clone(),
            pod,
        }
    }

    /// Writes its configuration, with what is different on each node, and gives the folder that has
    /// one for each volume of this node.
    fn write_config(&self, node: &Node, workload: &harness::Workload) -> PathBuf {
        let mut config = self.config.clone();
        config["node"]["name"] = node.name().into();
        // Tests share the machine's cgroups and its bpffs.
        config["node"]["cgroupRoot"] = path(node.cgroup().path()).into();
        config["node"]["bpffs"] = path(node.pins()).into();
        config["workloads"] = json!([{
            "name": workload.name(),
            "namespace": "default",
            "serviceAccount": workload.name(),
            "cgroup": workload.cgroup().below_mount(),
        }]);
        let folders = node.folder().join("volumes");
        for volume in ["config", "policies", "state", "run"] {
            fs::create_dir_all(folders.join(volume)).unwrap();
        }
        fs::write(folders.join("config/reeve.yaml"), config.to_string()).unwrap();
        folders
    }

    /// The words by which podman runs it alike.
    fn run(&self, folders: &Path) -> Vec<OsString> {
        let context = &self.container["securityContext"];
        assert_eq!(context["privileged"], false);
        assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault");
        assert_eq!(self.pod["hostNetwork"], true);
        assert_eq!(self.pod["hostPID"], true);
        let mut words: Vec<OsString> = ["--network=host", "--pid=host"].map(OsString::from).into();
        // Without `privileged`, a kubelet's containers have one of their own wherever there is cgroup2.
        words.push("--cgroupns=private".into());
        if context["readOnlyRootFilesystem"] == true {
            // Kubernetes brings no writable folders of its own, as podman would.
            words.extend(["--read-only", "--read-only-tmpfs=false"].map(OsString::from));
        }
        words.push(format!("--user={}", context["runAsUser"]).into());
        for (list, option) in [("drop", "--cap-drop"), ("add", "--cap-add")] {
            for capability in context["capabilities"][list].as_array().unwrap() {
                words.push(format!("{option}={}", text(capability)).into());
            }
        }
        for mount in self.container["volumeMounts"].as_array().unwrap() {
            let name = text(&mount["name"]);
            let volumes = self.pod["volumes"].as_array().unwrap();
            let volume = volumes
                .iter()
                .find(|volume| volume["name"] == name)
                .unwrap();
            let host = match volume["hostPath"]["path"].as_str() {
                // The node's own, where tests have nodes of their own.
                Some(host) if !["state", "run"].contains(&name) => PathBuf::from(host),
                _ => folders.join(name),
            };
            let mut word = OsString::from("--volume=");
            word.push(host);
            word.push(":");
            word.push(text(&mount["mountPath"]));
            word.push(match mount["readOnly"] == true {
                true => ":ro,rslave",
                false => ":rslave",
            });
            words.push(word);
        }
        words.push(text(&self.container["image"]).into());
        let arguments = self.container["args"].as_array().unwrap();
        words.extend(arguments.iter().map(|argument| text(argument).into()));
        words
    }
}

/// The documents of a file.
fn yaml(text: &str) -> Value {
    let convert = "import json, sys, yaml\n\
        print(json.dumps(list(yaml.safe_load_all(sys.argv[1]))))";
    let json = run(Command::new("python3")
        .args(["-c", convert, text])
        .env("PYTHONPATH", beside_target("kubernetes-validate")));
    serde_json::from_str(&json).unwrap()
}

fn text(value: &Value) -> &str {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is no text"))
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

// === podman ===

/// Containers are apart in each storage, so one name is enough.
const CONTAINER: &str = "reeve";

/// A container on a node, with storage of its own; dropping it removes it.
struct Container<'n> {
    node: &'n Node,
}

impl<'n> Container<'n> {
    fn new(node: &'n Node) -> Self {
        Self { node }
    }

    fn words<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Vec<OsString> {
        let mut all: Vec<OsString> = ["podman", "--root"].map(OsString::from).into();
        // Podman wants short paths.
        all.push(self.node.folder().join("root").into());
        all.push("--runroot".into());
        all.push(self.node.folder().join("run").into());
        let settings = [
            "--storage-driver=vfs",
            "--runtime=runc",
            "--cgroup-manager=cgroupfs",
        ];
        all.extend(settings.map(OsString::from));
        all.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        all
    }

    /// Runs podman to its end.
    fn podman<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Output {
        self.node.host().exec(self.words(words))
    }

    /// Runs a program inside.
    fn exec<W: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = W>) -> Output {
        let exec = ["exec", CONTAINER].map(OsString::from).into_iter();
        self.podman(exec.chain(words.into_iter().map(|word| word.as_ref().to_owned())))
    }

    fn start(&self, words: Vec<OsString>) -> Process {
        let mut run: Vec<OsString> = ["run", "--name", CONTAINER, "--cgroups=no-conmon"]
            .map(OsString::from)
            .into();
        run.push(format!("--cgroup-parent={}", self.cgroup()).into());
        // Podman would raise both limits, which not every machine lets it. The second is none for root.
        let (files, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        run.push(format!("--ulimit=nofile={files}:{files}").into());
        run.push("--ulimit=nproc=4096:4096".into());
        run.extend(words);
        self.node.host().spawn(self.words(run))
    }

    /// Below the node's, with which it goes.
    fn cgroup(&self) -> String {
        self.node.cgroup().below_mount() + "/container"
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        // Mounts would be left otherwise.
        let removed = self.podman(["rm", "--force", "--all"]);
        if !removed.status.success() {
            eprintln!("removing a container: {}", removed.stderr);
        }
        // Where there are hierarchies of version 1, its cgroup was in all of them.
        for hierarchy in fs::read_dir("/sys/fs/cgroup")
            .into_iter()
            .flatten()
            .flatten()
        {
            let cgroup = self.cgroup();
            for above in Path::new(cgroup.trim_start_matches('/')).ancestors() {
                if above.as_os_str().is_empty()
                    || fs::remove_dir(hierarchy.path().join(above)).is_err()
                {
                    break;
                }
            }
        }
    }
}
