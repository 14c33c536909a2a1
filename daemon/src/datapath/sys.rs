//! The `bpf(2)` commands that the eBPF library has no call for: pinned links and their programs,
//! taking an entry out of a map, and socket storage.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    time::Duration,
};

use aya::Pod;

/// Commands of `bpf(2)`, from `linux/bpf.h`.
mod command {
    pub(super) const MAP_LOOKUP_ELEM: u32 = 1;
    pub(super) const MAP_UPDATE_ELEM: u32 = 2;
    pub(super) const OBJ_PIN: u32 = 6;
    pub(super) const OBJ_GET: u32 = 7;
    pub(super) const OBJ_GET_INFO_BY_FD: u32 = 15;
    pub(super) const MAP_LOOKUP_AND_DELETE_ELEM: u32 = 21;
    pub(super) const LINK_CREATE: u32 = 28;
    pub(super) const LINK_UPDATE: u32 = 29;
    pub(super) const LINK_DETACH: u32 = 34;
}

/// Where a program can be attached: `enum bpf_attach_type` of `linux/bpf.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum AttachType {
    CgroupIngress = 0,
    CgroupEgress = 1,
    CgroupSockOps = 3,
    CgroupBind4 = 8,
    CgroupBind6 = 9,
    CgroupConnect4 = 10,
    CgroupConnect6 = 11,
    CgroupSendmsg4 = 14,
    CgroupSendmsg6 = 15,
    CgroupRecvmsg4 = 19,
    CgroupRecvmsg6 = 20,
    CgroupSetsockopt = 22,
    CgroupGetpeername4 = 29,
    CgroupGetpeername6 = 30,
    CgroupGetsockname4 = 31,
    CgroupGetsockname6 = 32,
    SkLookup = 36,
}

#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttr {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct ElementAttr {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
struct LinkCreateAttr {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
struct LinkUpdateAttr {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

#[repr(C)]
struct LinkDetachAttr {
    link: u32,
}

/// What the kernel says of a link. The target is a cgroup id, or the inode of a network
/// namespace; 0 when it is gone. The type of attachment follows it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct RawLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    padding: u32,
    target: [u32; 3],
    rest: [u32; 9],
}

/// `BPF_LINK_TYPE_CGROUP`.
const LINK_OF_CGROUP: u32 = 3;
/// `BPF_LINK_TYPE_NETNS`.
const LINK_OF_NETNS: u32 = 5;

fn bpf<T>(command: u32, attr: &mut T) -> io::Result<i32> {
    // SAFETY: `attr` is a whole and writable value of the size given. The kernel takes bytes
    // beyond the end for zero, and the callers' structs begin like the command's own.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(result).map_err(io::Error::other)
}

fn raw(fd: impl AsFd) -> u32 {
    // File descriptors are not negative.
    fd.as_fd().as_raw_fd().unsigned_abs()
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::from)
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the kernel has just made this file descriptor for the caller.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Opens what is pinned at `path`.
pub(super) fn get_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = PinAttr {
        path: path.as_ptr().expose_provenance() as u64,
        fd: 0,
        flags: 0,
    };
    bpf(command::OBJ_GET, &mut attr).map(owned)
}

/// Pins a link or a map at `path`, where nothing may be yet.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let mut attr = PinAttr {
        path: path.as_ptr().expose_provenance() as u64,
        fd: raw(object),
        flags: 0,
    };
    bpf(command::OBJ_PIN, &mut attr).map(drop)
}

/// Attaches a program beside those of others.
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    target: BorrowedFd<'_>,
    attach_type: AttachType,
) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        program: raw(program),
        target: raw(target),
        attach_type: attach_type as u32,
        flags: 0,
    };
    bpf(command::LINK_CREATE, &mut attr).map(owned)
}

/// Puts another program into a link, with no moment between the two.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link: raw(link),
        program: raw(program),
        flags: 0,
        old_program: 0,
    };
    bpf(command::LINK_UPDATE, &mut attr).map(drop)
}

/// Ends what a link does at once; closing and unpinning it would do so a moment later.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetachAttr { link: raw(link) };
    bpf(command::LINK_DETACH, &mut attr).map(drop)
}

/// What a link is attached to, and the type of its attachment: a cgroup's id or a network namespace's
/// inode, as [`AttachType`] numbers types. 0: what it was attached to is gone.
pub(super) fn link_place(link: BorrowedFd<'_>) -> io::Result<(u64, u32)> {
    let info = info(link)?;
    let [first, second, third] = info.target;
    match info.kind {
        LINK_OF_CGROUP => {
            let id = if cfg!(target_endian = "big") {
                u64::from(first) << 32 | u64::from(second)
            } else {
                u64::from(second) << 32 | u64::from(first)
            };
            Ok((id, third))
        }
        LINK_OF_NETNS => Ok((u64::from(first), second)),
        _ => Err(io::Error::other(
            "it is no link to a cgroup or a network namespace",
        )),
    }
}

/// Type and id of a map or a link: two that are the same have both in common.
pub(super) fn kind_and_id(object: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    // What the kernel says of either begins with these two.
    info(object).map(|info| (info.kind, info.id))
}

fn info(object: BorrowedFd<'_>) -> io::Result<RawLinkInfo> {
    let mut info = RawLinkInfo::default();
    let mut attr = InfoAttr {
        fd: raw(object),
        length: size_of::<RawLinkInfo>() as u32,
        info: std::ptr::from_mut(&mut info).expose_provenance() as u64,
    };
    bpf(command::OBJ_GET_INFO_BY_FD, &mut attr)?;
    Ok(info)
}

/// The first value of an array (not of one for each processor) whose values have `size` bytes.
pub(super) fn first_value(array: BorrowedFd<'_>, size: usize) -> io::Result<Vec<u8>> {
    let key = 0_u32;
    let mut value = vec![0_u8; size];
    let mut attr = ElementAttr {
        map: raw(array),
        padding: 0,
        key: std::ptr::from_ref(&key).expose_provenance() as u64,
        value: value.as_mut_ptr().expose_provenance() as u64,
        flags: 0,
    };
    bpf(command::MAP_LOOKUP_ELEM, &mut attr).map(|_| value)
}

/// Takes the entry of `key` out of a hash; none where there is no such entry. `K` and `V` are the
/// types of the map.
pub(super) fn take<K: Pod, V: Pod + Default>(
    map: BorrowedFd<'_>,
    key: &K,
) -> io::Result<Option<V>> {
    let mut value = V::default();
    let mut attr = ElementAttr {
        map: raw(map),
        padding: 0,
        key: std::ptr::from_ref(key).expose_provenance() as u64,
        value: std::ptr::from_mut(&mut value).expose_provenance() as u64,
        flags: 0,
    };
    match bpf(command::MAP_LOOKUP_AND_DELETE_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// What socket storage holds for a socket; none where it holds nothing. `V` is the type of the map.
pub(super) fn of_socket<V: Pod + Default>(
    map: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
) -> io::Result<Option<V>> {
    let mut value = V::default();
    let key = raw(socket);
    let mut attr = ElementAttr {
        map: raw(map),
        padding: 0,
        key: std::ptr::from_ref(&key).expose_provenance() as u64,
        value: std::ptr::from_mut(&mut value).expose_provenance() as u64,
        flags: 0,
    };
    match bpf(command::MAP_LOOKUP_ELEM, &mut attr) {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes socket storage hold a value for a socket. `V` is the type of the map.
pub(super) fn set_of_socket<V: Pod>(
    map: BorrowedFd<'_>,
    socket: BorrowedFd<'_>,
    value: &V,
) -> io::Result<()> {
    let key = raw(socket);
    let mut attr = ElementAttr {
        map: raw(map),
        padding: 0,
        key: std::ptr::from_ref(&key).expose_provenance() as u64,
        value: std::ptr::from_ref(value).expose_provenance() as u64,
        flags: 0,
    };
    bpf(command::MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Waits until every run of a program that had begun has ended.
///
/// `membarrier(2)` with its oldest command waits for all of the kernel's readers (RCU), which
/// programs on a cgroup are.
pub(super) fn wait_for_programs() {
    /// `MEMBARRIER_CMD_GLOBAL` of `linux/membarrier.h`.
    const GLOBAL: libc::c_int = 1;
    /// Where the kernel has no such call: no program takes as long unless the machine stands still.
    const PAUSE: Duration = Duration::from_millis(50);
    // SAFETY: the call takes numbers only.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } != 0 {
        std::thread::sleep(PAUSE);
    }
}
