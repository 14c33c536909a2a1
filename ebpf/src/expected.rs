//! A cgroup is made: one that the daemon expects is enrolled before anything can run in it. The daemon
//! finds it a moment later and goes on from there; of any other it alone decides.

use aya_ebpf::{
    helpers::{bpf_probe_read_kernel, generated::bpf_probe_read_kernel_str},
    macros::raw_tracepoint,
    programs::RawTracePointContext,
};
use reeve_common::{EXPECTED_NAME, ExpectedCgroup, WorkloadEntry};

use crate::maps::{
    CGROUP_NODE, CGROUP_PARENT, CGROUP_ROOT, EXPECTED, HIERARCHY_ID, MADE, NODE_ID, NODE_NAME,
    WORKLOADS,
};

/// `cgrp_dfl_root`'s `hierarchy_id`: that of cgroup2.
const CGROUP2: i32 = 0;

#[raw_tracepoint(tracepoint = "cgroup_mkdir")]
pub fn reeve_cgroup_made(ctx: RawTracePointContext) -> i32 {
    // What cannot be read is left to the daemon.
    let _ = made(ctx.arg(0));
    0
}

/// The kernel tells while it holds the tree's lock, so that no two are made at once.
#[inline(always)]
fn made(cgroup: *const u8) -> Result<(), i32> {
    let root: *const u8 = read(cgroup, CGROUP_ROOT.load())?;
    if read::<i32>(root, HIERARCHY_ID.load())? != CGROUP2 {
        return Ok(());
    }
    // The parent's `css` is the beginning of its cgroup.
    let parent: *const u8 = read(cgroup, CGROUP_PARENT.load())?;
    let node: *const u8 = read(cgroup, CGROUP_NODE.load())?;
    let name: *const u8 = read(node, NODE_NAME.load())?;
    let parent: *const u8 = read(parent, CGROUP_NODE.load())?;
    let Some(key) = MADE.get_ptr_mut(0) else {
        return Ok(());
    };
    // SAFETY: the value is this processor's.
    let key: &mut ExpectedCgroup = unsafe { &mut *key };
    key.parent = read(parent, NODE_ID.load())?;
    let words: *mut u64 = key.name.as_mut_ptr().cast();
    let mut word = 0;
    while word < EXPECTED_NAME / size_of::<u64>() {
        // SAFETY: within the name, which is aligned as the number before it.
        unsafe { words.add(word).write_volatile(0) };
        word += 1;
    }
    // SAFETY: the name is as long as is said. A longer one is cut, and expected by nobody.
    let length = unsafe {
        bpf_probe_read_kernel_str(
            key.name.as_mut_ptr().cast(),
            EXPECTED_NAME as u32,
            name.cast(),
        )
    };
    if length <= 0 || length >= EXPECTED_NAME as i64 {
        return Ok(());
    }
    let Some(expected) = EXPECTED.get_ptr_mut(&*key) else {
        return Ok(());
    };
    let id: u64 = read(node, NODE_ID.load())?;
    // SAFETY: the entry stays readable until the program ends.
    let (workload, last) = unsafe { ((*expected).workload, (*expected).last) };
    // Where another daemon's program has been here, it is this one.
    if last != 0 && last != id {
        // One that had come and gone before the daemon saw it.
        let _ = WORKLOADS.remove(&last);
    }
    // SAFETY: as above.
    unsafe { (*expected).last = id };
    let entry = WorkloadEntry { workload, flags: 0 };
    WORKLOADS.insert(&id, &entry, 0)
}

/// A field of one of the kernel's structures.
#[inline(always)]
fn read<T>(structure: *const u8, offset: u32) -> Result<T, i32> {
    // SAFETY: the helper reads any address, and fails where nothing is mapped.
    unsafe { bpf_probe_read_kernel(structure.wrapping_add(offset as usize).cast()) }
}
