//! Just enough of io_uring to have the kernel connect a socket on a workload's behalf.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    sync::atomic::{AtomicU32, Ordering},
};

use socket2::{SockAddr, Socket};

/// From `linux/io_uring.h`.
const OP_CONNECT: u8 = 16;
const ENTER_GETEVENTS: u32 = 1;
/// Has a thread of the kernel do it, at once.
const SQE_ASYNC: u8 = 1 << 4;
const OFFSET_SUBMISSIONS: i64 = 0;
const OFFSET_ENTRIES: i64 = 0x1000_0000;
/// Enough for rings of one entry.
const MAPPED: usize = 4096;

#[repr(C)]
#[derive(Default)]
struct SubmissionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    flags: u32,
    dropped: u32,
    array: u32,
    reserved: [u32; 3],
}

#[repr(C)]
#[derive(Default)]
struct CompletionOffsets {
    head: u32,
    tail: u32,
    mask: u32,
    entries: u32,
    overflow: u32,
    completions: u32,
    reserved: [u32; 4],
}

#[repr(C)]
#[derive(Default)]
struct Params {
    entries: u32,
    completions: u32,
    flags: u32,
    rest: [u32; 7],
    submission: SubmissionOffsets,
    completion: CompletionOffsets,
}

#[repr(C)]
#[derive(Default)]
struct Entry {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    length: u32,
    rest: [u32; 9],
}

/// Connects through a ring of its own.
pub(crate) fn connect(socket: &Socket, to: SocketAddr) -> io::Result<()> {
    let to = SockAddr::from(to);
    let mut params = Params::default();
    // SAFETY: `params` is what the call fills in.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, &raw mut params) };
    let ring = i32::try_from(ring).unwrap();
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made it.
    let ring = unsafe { OwnedFd::from_raw_fd(ring) };
    // Since Linux 5.4 one mapping holds both rings.
    let rings = map(&ring, OFFSET_SUBMISSIONS)?;
    let entries = map(&ring, OFFSET_ENTRIES)?;
    // SAFETY: the offsets are the kernel's own, inside of what is mapped and not unmapped.
    unsafe {
        entries.cast::<Entry>().write(Entry {
            opcode: OP_CONNECT,
            flags: SQE_ASYNC,
            fd: socket.as_raw_fd(),
            offset: to.len().into(),
            address: to.as_ptr().expose_provenance() as u64,
            ..Entry::default()
        });
        rings
            .add(params.submission.array as usize)
            .cast::<u32>()
            .write(0);
        (*rings
            .add(params.submission.tail as usize)
            .cast::<AtomicU32>())
        .store(1, Ordering::Release);
    }
    // SAFETY: submits the one entry and waits for its end.
    let entered = unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            ring.as_raw_fd(),
            1,
            1,
            ENTER_GETEVENTS,
            ptr::null::<()>(),
            0,
        )
    };
    if entered < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above; a completion's result stands behind its eight bytes of user data.
    let result = unsafe {
        rings
            .add(params.completion.completions as usize + 8)
            .cast::<i32>()
            .read()
    };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(())
}

fn map(ring: &OwnedFd, offset: i64) -> io::Result<*mut u8> {
    // SAFETY: a new mapping, which ends with the process.
    let mapped = unsafe {
        libc::mmap(
            ptr::null_mut(),
            MAPPED,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            ring.as_raw_fd(),
            offset,
        )
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok(mapped.cast())
}
