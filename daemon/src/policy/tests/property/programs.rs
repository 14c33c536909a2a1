//! The kernel's own programs, run by the kernel on packets made for them. Needs root.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use reeve_common::{Action, Direction, MAX_CGROUP_DEPTH, PEER_TUNNEL, WorkloadEntry, protocol};

use super::super::kernel::{self, Question};
use crate::{
    config::{EbpfLog, Maps, Ports},
    datapath::{Datapath, KernelState, Settings},
    policy::Snapshot,
};

/// The local end of every packet: nobody's, so that it is no forged source and no loopback.
const LOCAL_V4: [u8; 4] = [198, 51, 100, 7];
const LOCAL_V6: [u8; 16] = [0x20, 1, 0xd, 0xb8, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];

/// Programs that are attached to a cgroup in which nothing runs.
pub(super) struct Programs {
    datapath: Datapath,
    /// The cgroup of this process, in which the kernel makes the sockets of the packets.
    own_cgroup: u64,
    cgroup: PathBuf,
    pins: PathBuf,
    /// A port that no packet had yet: no flow that was remembered is asked about again.
    unused: u16,
}

// === impl Programs ===

impl Programs {
    pub(super) fn load() -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mount = mounts
            .lines()
            .filter_map(|line| line.split_once(" - "))
            .find(|(_, kind)| kind.starts_with("cgroup2 "))
            .map(|(mount, _)| PathBuf::from(mount.split(' ').nth(4).unwrap()))
            .unwrap();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap();
        // The tests of the datapath sweep what begins so when its process has been killed.
        let name = format!("reeve-datapath-{}-property", std::process::id());
        let (cgroup, pins) = (mount.join(&name), Path::new("/sys/fs/bpf").join(&name));
        fs::create_dir(&cgroup).unwrap();
        let settings = Settings {
            cgroup_root: cgroup.clone(),
            pins: pins.clone(),
            proc: "/proc".into(),
            ports: Ports::default(),
            maps: Maps::default(),
            log: EbpfLog::Off,
            namespace_source: None,
            beside: false,
        };
        Self {
            datapath: Datapath::load(settings).unwrap(),
            own_cgroup: fs::metadata(mount.join(own)).unwrap().ino(),
            cgroup,
            pins,
            unused: 10_000,
        }
    }

    /// Puts a snapshot in force for a workload that this process is.
    pub(super) fn enforce(&mut self, snapshot: &Snapshot, workload: u32) {
        let entry = WorkloadEntry { workload, flags: 0 };
        let depths = 0..=MAX_CGROUP_DEPTH;
        let state = KernelState {
            workloads: depths
                .map(|depth| (self.own_cgroup, depth, entry))
                .collect(),
            tables: snapshot.kernel_tables().clone(),
            ..KernelState::default()
        };
        self.datapath.apply(&state).unwrap();
    }

    /// Compares what becomes of a packet that opens a connection with what the snapshot says.
    pub(super) fn ask(&mut self, snapshot: &Snapshot, question: Question) {
        let remote = question.remote;
        // The other family's ICMP is a protocol without a meaning, and loopback never in question.
        let foreign = match question.protocol {
            protocol::ICMP => remote.is_ipv6(),
            protocol::ICMPV6 => remote.is_ipv4(),
            // Without ports, either direction is the other's reply.
            other => ![protocol::TCP, protocol::UDP, protocol::SCTP].contains(&other),
        };
        if foreign || remote.is_loopback() || remote.is_unspecified() {
            return;
        }
        self.unused = self.unused.checked_add(1).unwrap_or(10_000);
        let egress = question.direction == Direction::Egress;
        let decision = if egress {
            let to = (remote, question.port).into();
            snapshot.judge_egress(question.workload, to, question.protocol)
        } else {
            let (workload, protocol) = (question.workload, question.protocol);
            snapshot.judge_plaintext(workload, remote, protocol, question.port)
        };
        let peer = kernel::peer(snapshot.kernel_tables(), question);
        let tunnelled = question.protocol == protocol::TCP && peer.flags & PEER_TUNNEL != 0;
        let expected = match decision.action {
            Action::Allow => !(egress && tunnelled),
            Action::Permissive => true,
            Action::Deny | Action::TunnelOnly | Action::NoRoom => false,
        };
        let program = if egress {
            "reeve_egress"
        } else {
            "reeve_ingress"
        };
        let passes = self.datapath.passes(program, &self.frame(question));
        assert_eq!(passes, expected, "{question:?} {decision:?}");
    }

    /// An Ethernet frame with the first packet of a connection.
    fn frame(&self, question: Question) -> Vec<u8> {
        let egress = question.direction == Direction::Egress;
        let (local_port, remote_port) = if egress {
            (self.unused, question.port)
        } else {
            (question.port, self.unused)
        };
        let (from, to) = if egress {
            (local_port, remote_port)
        } else {
            (remote_port, local_port)
        };
        let payload = payload(question.protocol, from, to, self.unused);
        let mut frame = vec![0; 12];
        let length = u16::try_from(payload.len()).unwrap();
        match question.remote {
            IpAddr::V4(remote) => {
                let (source, destination) = ordered(egress, LOCAL_V4, remote.octets());
                frame.extend([0x08, 0x00, 0x45, 0]);
                frame.extend((20 + length).to_be_bytes());
                frame.extend([0, 1, 0, 0, 64, question.protocol, 0, 0]);
                frame.extend(source);
                frame.extend(destination);
            }
            IpAddr::V6(remote) => {
                let (source, destination) = ordered(egress, LOCAL_V6, remote.octets());
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(length.to_be_bytes());
                frame.extend([question.protocol, 64]);
                frame.extend(source);
                frame.extend(destination);
            }
        }
        frame.extend(payload);
        frame
    }
}

fn ordered<T>(egress: bool, local: T, remote: T) -> (T, T) {
    if egress {
        (local, remote)
    } else {
        (remote, local)
    }
}

/// What follows the IP header.
fn payload(protocol: u8, from: u16, to: u16, identifier: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    if [protocol::ICMP, protocol::ICMPV6].contains(&protocol) {
        // Echo request, code, checksum, identifier.
        let kind = if protocol == protocol::ICMP { 8 } else { 128 };
        bytes.extend([kind, 0, 0, 0]);
        bytes.extend(identifier.to_be_bytes());
    } else {
        bytes.extend(from.to_be_bytes());
        bytes.extend(to.to_be_bytes());
    }
    bytes.resize(20, 0);
    if protocol == protocol::TCP {
        // The header's length in words, and SYN.
        if let [.., length, flags, _, _, _, _, _, _] = bytes.as_mut_slice() {
            (*length, *flags) = (5 << 4, 2);
        }
    }
    if protocol == protocol::UDP
        && let Some(length) = bytes.get_mut(4..6)
    {
        length.copy_from_slice(&20_u16.to_be_bytes());
    }
    bytes
}

impl Drop for Programs {
    fn drop(&mut self) {
        // Nothing is enforced once the links are gone, and the cgroup is empty.
        let _ = fs::remove_dir_all(&self.pins);
        let _ = fs::remove_dir(&self.cgroup);
    }
}
