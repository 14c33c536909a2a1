//! Capabilities: which thread keeps which, and why.

use caps::{CapSet, Capability, CapsHashSet};

use super::PrivilegeError;

/// What deciding and enforcing needs. Everything else is given up at the start.
pub(super) const OF_THE_DAEMON: [Capability; 7] = [
    // Programs, maps and links; pointers in programs.
    Capability::CAP_BPF,
    Capability::CAP_PERFMON,
    // Attaching to cgroups and namespaces; routes, rules and sysctls in workloads' namespaces.
    Capability::CAP_NET_ADMIN,
    // Entering namespaces, and mounting bpffs where there is none.
    Capability::CAP_SYS_ADMIN,
    // Seeing which namespace other users' processes are in.
    Capability::CAP_SYS_PTRACE,
    // Certificates and keys that belong to other users.
    Capability::CAP_DAC_READ_SEARCH,
    // `ports` and `metrics.address` below 1024.
    Capability::CAP_NET_BIND_SERVICE,
];

/// What opening sockets in namespaces needs: entering them, and `IP_TRANSPARENT` with a mark.
pub(super) const OF_SOCKETS: [Capability; 2] =
    [Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN];

/// The first kernel in which an open map can be read without a capability, however
/// `kernel.unprivileged_bpf_disabled` is set.
const MAPS_NEED_NO_CAPABILITY: (u32, u32) = (5, 19);

/// What reading what strangers send needs: nothing. On older kernels the original destination of
/// a connection cannot be asked for without `CAP_BPF`.
pub(super) fn of_the_exposed() -> &'static [Capability] {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    match version(&release) {
        Some(found) if found >= MAPS_NEED_NO_CAPABILITY => &[],
        _ => &[Capability::CAP_BPF],
    }
}

/// Has this thread keep `wanted` of what it has, and gives up everything else for good.
pub(super) fn keep(wanted: &[Capability]) -> Result<(), PrivilegeError> {
    let failed = |error: caps::errors::CapsError| PrivilegeError::Capabilities(error.to_string());
    let held = caps::read(None, CapSet::Permitted).map_err(failed)?;
    let kept: CapsHashSet = wanted
        .iter()
        .copied()
        .filter(|capability| held.contains(capability))
        .collect();
    // Nothing runs a program, so the bounding set only says what is true anyhow. It needs a
    // capability that is about to go.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(failed)? {
        let bounding = caps::read(None, CapSet::Bounding).map_err(failed)?;
        for capability in bounding.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability).map_err(failed)?;
        }
    }
    if !caps::read(None, CapSet::Ambient)
        .map_err(failed)?
        .is_empty()
    {
        caps::clear(None, CapSet::Ambient).map_err(failed)?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(failed)?;
    caps::set(None, CapSet::Effective, &kept).map_err(failed)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(failed)
}

/// Major and minor number of a kernel release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim().split(['.', '-', '+']).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_release_is_compared_by_number() {
        assert_eq!(version("6.18.44-fc-v669\n"), Some((6, 18)));
        assert!(version("5.15.0-91-generic") < Some(MAPS_NEED_NO_CAPABILITY));
        assert_eq!(version("nonsense"), None);
    }
}
