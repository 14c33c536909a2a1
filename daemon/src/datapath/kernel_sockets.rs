//! How the programs tell the kernel's own sockets, by which it finds neighbours, sends errors and
//! resets connections, from sockets of processes: by a bit of the kernel's own structure.

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};

use super::kernel_types::KernelTypes;

/// Where the running kernel says whether a socket is its own. All zero: the programs cannot read it,
/// and a socket in a workload's cgroup is the workload's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KernelSocketBit {
    /// The socket in a packet, in bytes.
    pub(super) socket: u32,
    /// The byte in a socket.
    pub(super) offset: u32,
    /// The bit in that byte.
    pub(super) mask: u8,
}

/// Whether the programs at `connect()` can ask of which multipath connection (MPTCP) a socket is a part.
pub(super) fn knows_multipath(types: Option<&KernelTypes>) -> bool {
    let helper = is_helper_supported(
        ProgramType::CgroupSockAddr,
        BpfHelper::BPF_FUNC_skc_to_mptcp_sock,
    );
    // A kernel that is built without it has the helper, and no type for its answer.
    let has_type = types.is_some_and(|types| types.offset("mptcp_sock", &["sk"]).is_some());
    helper.unwrap_or(false) && has_type
}

// === impl KernelSocketBit ===

impl KernelSocketBit {
    pub(super) fn find(types: Option<&KernelTypes>) -> Self {
        let readable = is_helper_supported(
            ProgramType::CgroupSkb,
            BpfHelper::BPF_FUNC_probe_read_kernel,
        );
        if !readable.unwrap_or(false) {
            return Self::default();
        }
        let found = || {
            let types = types?;
            let (offset, mask) = types.bit("sock", "sk_kern_sock")?;
            Some(Self {
                socket: types.offset("sk_buff", &["sk"])?,
                offset,
                mask,
            })
        };
        found().unwrap_or_default()
    }
}
