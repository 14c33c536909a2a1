//! Options of TCP sockets, and connecting them.

use std::{
    io,
    net::{Shutdown, SocketAddr},
    os::fd::AsRawFd,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};
use socket2::{SockRef, Socket};
use tokio::net::{TcpListener, TcpStream};

/// Hands a listening socket to the running event loop. What it accepts inherits `TCP_NODELAY`
/// from it, and `TCP_USER_TIMEOUT` where `user` is given.
pub(super) fn listener(socket: Socket, user: Option<Duration>) -> io::Result<TcpListener> {
    socket.set_tcp_nodelay(true)?;
    if let Some(user) = user {
        set_user_timeout(&socket, user)?;
    }
    TcpListener::from_std(socket.into())
}

/// Connects a non-blocking socket that has `TCP_NODELAY` already. `user` is its
/// `TCP_USER_TIMEOUT`.
pub(super) async fn connect(
    socket: Socket,
    to: SocketAddr,
    user: Option<Duration>,
) -> io::Result<TcpStream> {
    if let Some(user) = user {
        set_user_timeout(&socket, user)?;
    }
    let stream = begin(socket, to)?;
    established(&stream).await?;
    Ok(stream)
}

/// Begins to connect a non-blocking socket. [`established`] says when it is.
pub(super) fn begin(socket: Socket, to: SocketAddr) -> io::Result<TcpStream> {
    match socket.connect(&to.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
        _ => {}
    }
    TcpStream::from_std(socket.into())
}

/// Waits until a connection stands, or has failed.
pub(super) async fn established(stream: &TcpStream) -> io::Result<()> {
    stream.writable().await?;
    stream.take_error()?.map_or(Ok(()), Err)
}

/// Closes a connection so that the far end sees a reset and not an end of file.
pub(super) fn reset(stream: TcpStream) {
    // Failing to make it abrupt leaves an ordinary close: nothing more can be done.
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
    drop(stream);
}

/// Whether the far end has reset the connection, or the kernel has given it up. Asked once more
/// it may say no.
pub(super) fn is_broken(stream: &TcpStream) -> bool {
    !matches!(stream.take_error(), Ok(None))
}

/// Bytes that the far end's kernel has not acknowledged.
pub(super) fn unsent(stream: &TcpStream) -> u32 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the kernel writes one `int` to the local that the pointer is to.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    // A connection that is over has nothing that could still be sent.
    if result < 0 || is_broken(stream) {
        return 0;
    }
    u32::try_from(bytes).unwrap_or_default()
}

/// Ends the direction towards the far end.
pub(super) fn end_writing(stream: &TcpStream) -> io::Result<()> {
    match SockRef::from(stream).shutdown(Shutdown::Write) {
        // The far end has closed everything already.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Sets `TCP_USER_TIMEOUT`.
pub(super) fn set_user_timeout(socket: &Socket, timeout: Duration) -> io::Result<()> {
    let milliseconds = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
    Ok(setsockopt(socket, TcpUserTimeout, &milliseconds)?)
}
