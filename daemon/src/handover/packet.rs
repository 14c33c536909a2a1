//! Messages with file descriptors, over a Unix socket that keeps them apart (`SOCK_SEQPACKET`).

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use nix::{
    cmsg_space,
    sys::socket::{
        ControlMessage, ControlMessageOwned, MsgFlags, UnixCredentials, getsockopt, recvmsg,
        sendmsg, sockopt::PeerCredentials,
    },
};
use serde::{Serialize, de::DeserializeOwned};
use socket2::{Domain, SockAddr, Socket, Type};

/// Longest message in bytes.
const MAX_MESSAGE: usize = 64 << 10;
/// File descriptors in one message; the kernel takes 253.
pub(super) const MAX_DESCRIPTORS: usize = 200;
/// For the other side to take a message.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// One end of a connection between two daemons.
#[derive(Debug)]
pub(super) struct Connection(Socket);

/// A socket that is not bound or connected yet.
pub(super) fn socket() -> io::Result<Socket> {
    Socket::new(Domain::UNIX, Type::SEQPACKET, None)
}

// === impl Connection ===

impl Connection {
    pub(super) fn new(socket: Socket) -> io::Result<Self> {
        socket.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Self(socket))
    }

    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket()?;
        socket.connect(&SockAddr::unix(path)?)?;
        Self::new(socket)
    }

    /// As [`Self::connect`], but fails where others wait before this one.
    pub(super) fn connect_at_once(path: &Path) -> io::Result<Self> {
        let socket = socket()?;
        socket.set_nonblocking(true)?;
        socket.connect(&SockAddr::unix(path)?)?;
        socket.set_nonblocking(false)?;
        Self::new(socket)
    }

    /// Fails unless root is at the other end, or whoever runs this daemon.
    pub(super) fn check_peer(&self) -> io::Result<()> {
        let (peer, own) = (self.peer()?.uid(), nix::unistd::geteuid().as_raw());
        match peer == 0 || peer == own {
            true => Ok(()),
            false => Err(io::Error::other(format!("user {peer} answers there"))),
        }
    }

    /// Who is at the other end.
    pub(super) fn peer(&self) -> io::Result<UnixCredentials> {
        Ok(getsockopt(&self.0, PeerCredentials)?)
    }

    pub(super) fn send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.send_with(message, descriptors, MsgFlags::empty())
    }

    /// Sends a message if there is room for it now; `WouldBlock` where there is none.
    pub(super) fn try_send(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        self.send_with(message, descriptors, MsgFlags::MSG_DONTWAIT)
    }

    fn send_with(
        &self,
        message: &impl Serialize,
        descriptors: &[BorrowedFd<'_>],
        flags: MsgFlags,
    ) -> io::Result<()> {
        let text = serde_json::to_vec(message)?;
        let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let ancillary = if raw.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(
            self.0.as_raw_fd(),
            &[IoSlice::new(&text)],
            ancillary,
            flags | MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        Ok(())
    }

    /// The next message, with its descriptors; waits for ever without a `patience`.
    /// `UnexpectedEof` where the other side has closed, `InvalidData` where the message is not
    /// understood: the next one may be.
    pub(super) fn receive<T: DeserializeOwned>(
        &self,
        patience: impl Into<Option<Duration>>,
    ) -> io::Result<(T, Vec<OwnedFd>)> {
        self.0.set_read_timeout(patience.into())?;
        self.receive_with(MsgFlags::empty())
    }

    /// A message that is there already.
    pub(super) fn try_receive<T: DeserializeOwned>(&self) -> io::Result<(T, Vec<OwnedFd>)> {
        self.receive_with(MsgFlags::MSG_DONTWAIT)
    }

    fn receive_with<T: DeserializeOwned>(&self, flags: MsgFlags) -> io::Result<(T, Vec<OwnedFd>)> {
        let mut text = vec![0; MAX_MESSAGE];
        let mut ancillary = cmsg_space!([std::os::fd::RawFd; MAX_DESCRIPTORS]);
        let mut parts = [IoSliceMut::new(&mut text)];
        let message = recvmsg::<()>(
            self.0.as_raw_fd(),
            &mut parts,
            Some(&mut ancillary),
            flags | MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let (length, cut) = (message.bytes, message.flags);
        let mut descriptors = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: the kernel has just made these descriptors for this process, and
                // nobody else knows of them.
                descriptors.extend(
                    raw.into_iter()
                        .map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }),
                );
            }
        }
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if cut.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "a message is longer than {MAX_MESSAGE} bytes, or has too many descriptors"
                ),
            ));
        }
        let message = serde_json::from_slice(text.get(..length).unwrap_or_default())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok((message, descriptors))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn messages_carry_descriptors_and_stay_apart() {
        let (one, two) = Socket::pair(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        let (one, two) = (Connection::new(one).unwrap(), Connection::new(two).unwrap());
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let many = vec![listener.as_fd(); MAX_DESCRIPTORS];
        one.send(&"first", &many).unwrap();
        one.send(&"second", &[]).unwrap();
        let patience = Duration::from_secs(5);
        let (text, descriptors) = two.receive::<String>(patience).unwrap();
        assert_eq!(
            (text.as_str(), descriptors.len()),
            ("first", MAX_DESCRIPTORS)
        );
        let passed = std::net::TcpListener::from(descriptors.into_iter().next().unwrap());
        assert_eq!(passed.local_addr().unwrap(), listener.local_addr().unwrap());
        assert_eq!(two.receive::<String>(patience).unwrap().0, "second");
        drop(one);
        let error = two.receive::<String>(None).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
