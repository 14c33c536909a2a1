//! What can go wrong between the daemon and the kernel.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError};

use super::{netns::Netns, refusal::Refusal};

/// Why the datapath could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No bpf file system, and none could be mounted.
    #[error(
        "there is no bpf file system at {path} and none is mounted there: {source}; name a folder \
         in a bpf file system with node.bpffs (the default is in /sys/fs/bpf), or mount one at an \
         empty folder: `mount -t bpf bpf FOLDER`"
    )]
    Bpffs {
        /// Where it is looked for.
        path: PathBuf,
        /// From `mount`.
        source: io::Error,
    },
    /// The folder of pinned programs and maps.
    #[error("cannot {doing} {path}: {source}")]
    Pin {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
    /// Others than root could take what is pinned away, or could have made it.
    #[error(
        "{path} is not root's alone ({why}), and what is enforced could be taken away by others: \
         remove it, or name another folder with node.bpffs, and start reeve again"
    )]
    NotRoots {
        /// The folder, one above it, or a pin.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A program that was attached is so no more.
    #[error("the program {name} is no longer attached: somebody has detached it")]
    Detached {
        /// The program.
        name: &'static str,
    },
    /// Somebody else writes the maps.
    #[error(
        "the maps hold generation {found}, and this daemon wrote {written}: another reeve writes them"
    )]
    Overwritten {
        /// What is there.
        found: u32,
        /// What was written.
        written: u32,
    },
    /// What is pinned was made by a reeve with other maps, and is not to be replaced.
    #[error(
        "what is pinned in {path} has layout {found} and this reeve has layout {expected}: it goes \
         on refusing what it refuses; `reeve run` puts this layout in its place"
    )]
    Layout {
        /// The folder.
        path: PathBuf,
        /// Layout of what is pinned.
        found: u32,
        /// Layout of this program.
        expected: u32,
    },
    /// A pinned map whose shape is not that of its layout.
    #[error(
        "the map pinned at {path} is not one of reeve's ({found} with keys of {found_key} bytes and \
         values of {found_value}, not {expected} with {key} and {value}): remove it, and start reeve \
         again"
    )]
    Shape {
        /// The map's file.
        path: PathBuf,
        /// Its type.
        found: String,
        /// The type that it should have.
        expected: String,
        /// Its keys' size.
        found_key: u32,
        /// Its values' size.
        found_value: u32,
        /// The size that keys have.
        key: u32,
        /// The size that values have.
        value: u32,
    },
    /// The cgroup at which programs are attached.
    #[error("cannot open the cgroup {path}: {source}; node.cgroupRoot names another")]
    Cgroup {
        /// The cgroup's folder.
        path: PathBuf,
        /// From the kernel.
        source: io::Error,
    },
    /// A program, a map or their type information was refused.
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The object lacks a program or a map: the build is broken.
    #[error("the embedded eBPF object has no {0}: build reeve again")]
    Missing(&'static str),
    /// A program could not be attached.
    #[error("cannot attach {name} to {target}: {source}")]
    Attach {
        /// The program.
        name: &'static str,
        /// What to.
        target: String,
        /// From the kernel.
        source: io::Error,
    },
    /// A map could not be read or written.
    #[error("cannot {doing} the map {map}: {source}")]
    Map {
        /// The map.
        map: &'static str,
        /// What was being done.
        doing: &'static str,
        /// From the kernel.
        source: Box<MapError>,
    },
    /// A map has no room left. Whatever could be about what did not fit is refused.
    #[error(
        "the map {map} is full ({capacity} entries), and whatever could be about what does not fit \
         is refused as map_failure: raise its capacity under maps in the configuration, remove the \
         pinned maps (`reeve detach`) and start reeve again"
    )]
    Full {
        /// The map.
        map: &'static str,
        /// Its capacity in entries.
        capacity: u32,
    },
    /// The map of cgroups has no room left.
    #[error(
        "the map WORKLOADS is full ({capacity} entries), and {missing} cgroups of workloads are not \
         enrolled: only an enforced parent above them refuses them; raise maps.workloads in the \
         configuration, remove the pinned maps (`reeve detach`) and start reeve again"
    )]
    NotEnrolled {
        /// Cgroups without room.
        missing: usize,
        /// The map's capacity in entries.
        capacity: u32,
    },
    /// No id is left for a new workload or peer.
    #[error(
        "every id has been given to a workload or a peer once, and none is given twice: remove the \
         pinned maps (`reeve detach`) and start reeve again"
    )]
    NoIds,
    /// A network namespace could not be prepared.
    #[error("cannot {doing} in the network namespace {inode}: {source}")]
    Namespace {
        /// The namespace's inode.
        inode: u64,
        /// What was being done.
        doing: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// Only one reader can have the events.
    #[error("the kernel's {0} are being read already")]
    Taken(&'static str),
    /// The ring buffer could not be polled.
    #[error("cannot wait for the kernel's {what}: {source}")]
    Wait {
        /// What is waited for.
        what: &'static str,
        /// From the runtime.
        source: io::Error,
    },
}

impl From<EbpfError> for Error {
    fn from(error: EbpfError) -> Self {
        Self::Refused(Box::new(Refusal::of_object(&error)))
    }
}

impl Error {
    /// What `doing` fails with in this namespace.
    pub(super) fn in_namespace(
        netns: &Netns,
        doing: &'static str,
    ) -> impl FnOnce(io::Error) -> Self + use<> {
        let inode = netns.inode;
        move |source| Self::Namespace {
            inode,
            doing,
            source,
        }
    }
}
