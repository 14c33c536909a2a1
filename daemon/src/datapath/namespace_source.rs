//! How the programs find the network namespace of a packet's socket: what the running kernel
//! offers for it.

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use reeve_common::NamespaceSource;

use super::kernel_types::KernelTypes;

/// Offsets of fields in the kernel's structures, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offsets {
    /// The socket in a packet.
    pub(super) socket: u32,
    /// The namespace in a socket.
    pub(super) network: u32,
    /// The cookie in a namespace.
    pub(super) cookie: u32,
}

/// How the programs find the network namespace of a packet's socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PacketNamespaces {
    source: NamespaceSource,
    offsets: Offsets,
    /// What the kernel lacks, where the packet's address has to do.
    lacks: Option<String>,
}

/// What the default deny would not cover on the running kernel, and why. None where it covers
/// everything, and for a process that may load no programs, which cannot find out.
#[must_use]
pub fn gap_of_running_kernel() -> Option<String> {
    let helper = BpfHelper::BPF_FUNC_get_netns_cookie;
    is_helper_supported(ProgramType::CgroupSkb, helper).ok()?;
    PacketNamespaces::find(None).gap()
}

// === impl PacketNamespaces ===

impl PacketNamespaces {
    /// The best way that the kernel offers, or the one that is wanted.
    pub(super) fn find(wanted: Option<NamespaceSource>) -> Self {
        let of = |source| Self {
            source,
            offsets: Offsets::default(),
            lacks: None,
        };
        let supports =
            |helper| is_helper_supported(ProgramType::CgroupSkb, helper).unwrap_or(false);
        match wanted {
            Some(NamespaceSource::Helper) => return of(NamespaceSource::Helper),
            None if supports(BpfHelper::BPF_FUNC_get_netns_cookie) => {
                return of(NamespaceSource::Helper);
            }
            _ => {}
        }
        let offsets = match wanted {
            Some(NamespaceSource::Address) => Err("it is not wanted".to_owned()),
            _ if supports(BpfHelper::BPF_FUNC_probe_read_kernel) => offsets(),
            _ => Err(
                "programs may not read kernel memory (lockdown is set to confidentiality, or \
                 CAP_PERFMON is missing)"
                    .to_owned(),
            ),
        };
        match offsets {
            Ok(offsets) => Self {
                offsets,
                ..of(NamespaceSource::KernelMemory)
            },
            Err(lacks) => Self {
                lacks: Some(lacks),
                ..of(NamespaceSource::Address)
            },
        }
    }

    /// How they are found.
    #[must_use]
    pub const fn source(&self) -> NamespaceSource {
        self.source
    }

    /// The name of [`PacketNamespaces::source`], in metrics and logs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self.source {
            NamespaceSource::Address => "address",
            NamespaceSource::KernelMemory => "kernel_memory",
            NamespaceSource::Helper => "helper",
        }
    }

    pub(super) const fn offsets(&self) -> Offsets {
        self.offsets
    }

    /// What the default deny does not cover, and why; none where it covers everything.
    #[must_use]
    pub fn gap(&self) -> Option<String> {
        let lacks = self.lacks.as_ref()?;
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Some(format!(
            "on this kernel ({}) packets do not tell their network namespace, and {lacks}: a socket of \
             no workload in a workload's namespace is judged by the packet's address alone, so that \
             broadcasts, multicasts and addresses that reeve does not know are not refused to it; \
             Linux 6.16 and later have no such gap",
            kernel.trim()
        ))
    }
}

fn offsets() -> Result<Offsets, String> {
    let types = KernelTypes::of_running_kernel()
        .map_err(|error| format!("its type information cannot be read: {error}"))?;
    let offset = |structure: &str, path: &[&str]| {
        types
            .offset(structure, path)
            .ok_or_else(|| format!("its type information has no {structure}.{}", path.join(".")))
    };
    Ok(Offsets {
        socket: offset("sk_buff", &["sk"])?,
        network: offset("sock", &["__sk_common", "skc_net", "net"])?,
        cookie: offset("net", &["net_cookie"])?,
    })
}
