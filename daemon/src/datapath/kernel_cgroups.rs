//! The program that enrols an expected cgroup when it is made: see `ebpf/src/expected.rs`.

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, RawTracePoint},
};

use super::kernel_types::KernelTypes;

const PROGRAM: &str = "reeve_cgroup_made";
/// Where the kernel runs it.
const TRACEPOINT: &str = "cgroup_mkdir";

/// Offsets in the running kernel's structures, by the globals that hold them. None where a field is not
/// where it is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CgroupFields([(&'static str, u32); 6]);

// === impl CgroupFields ===

impl CgroupFields {
    pub(super) fn find(types: &KernelTypes) -> Option<Self> {
        // A pointer to the parent's `self` is one to the parent.
        if types.offset("cgroup", &["self"])? != 0 {
            return None;
        }
        Some(Self([
            ("CGROUP_NODE", types.offset("cgroup", &["kn"])?),
            ("CGROUP_ROOT", types.offset("cgroup", &["root"])?),
            (
                "CGROUP_PARENT",
                types.offset("cgroup", &["self", "parent"])?,
            ),
            (
                "HIERARCHY_ID",
                types.offset("cgroup_root", &["hierarchy_id"])?,
            ),
            ("NODE_ID", types.offset("kernfs_node", &["id"])?),
            ("NODE_NAME", types.offset("kernfs_node", &["name"])?),
        ]))
    }

    pub(super) fn set<'a>(&'a self, loader: &mut EbpfLoader<'a>) {
        for (name, offset) in &self.0 {
            loader.override_global(name, offset, true);
        }
    }
}

/// Has the program run for as long as these programs are loaded. Not pinned: without a daemon nobody is
/// expected.
pub(super) fn attach(ebpf: &mut Ebpf) -> Result<(), ProgramError> {
    let Some(program) = ebpf.program_mut(PROGRAM) else {
        return Ok(());
    };
    let program: &mut RawTracePoint = program.try_into()?;
    program.load()?;
    program.attach(TRACEPOINT).map(drop)
}
