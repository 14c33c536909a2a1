//! A conversation with the kernel by netlink (`netlink(7)`), about one network namespace.

use std::io::{self, Read};

use socket2::{Domain, Protocol, Socket, Type};

use super::{
    diag::message::{HEADER, split_message, word},
    netns::Netns,
};

/// Messages of every netlink protocol, and flags of requests.
const ERROR: u16 = 2;
const DONE: u16 = 3;
pub(super) const REQUEST: u16 = 1;
pub(super) const ACKNOWLEDGE: u16 = 4;
pub(super) const DUMP: u16 = 0x300;

/// The kernel fills at most this much with one part of its answer.
const PART: usize = 64 << 10;

/// One conversation.
pub(super) struct Netlink {
    socket: Socket,
    buffer: Vec<u8>,
}

// === impl Netlink ===

impl Netlink {
    /// Opens a socket of a netlink protocol in a namespace.
    pub(super) fn open(netns: &Netns, protocol: i32) -> io::Result<Self> {
        let kind = (
            Domain::from(libc::AF_NETLINK),
            Type::RAW,
            Protocol::from(protocol),
        );
        let socket = netns.run(|| Socket::new(kind.0, kind.1, Some(kind.2)))?;
        Ok(Self {
            socket,
            buffer: vec![0; PART],
        })
    }

    /// Sends a request, and calls `answer` with each message of the kind `expected` until the last.
    pub(super) fn ask(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        expected: u16,
        mut answer: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        self.ask_until(kind, flags, body, expected, |message| {
            answer(message);
            false
        })
    }

    /// As [`Netlink::ask`], until `answer` says that it is enough. What is left of the answer then lies
    /// in the way of the next one.
    pub(super) fn ask_until(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        expected: u16,
        mut answer: impl FnMut(&[u8]) -> bool,
    ) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        // Neither a sequence number nor an address: there is one question at a time.
        message.extend([0; 8]);
        message.extend(body);
        self.socket.send(&message)?;
        loop {
            let read = (&self.socket).read(&mut self.buffer)?;
            let mut rest = self.buffer.get(..read).unwrap_or_default();
            while let Some((kind, body, next)) = split_message(rest) {
                match kind {
                    DONE => return Ok(()),
                    ERROR => {
                        // 0 acknowledges.
                        return match word(body, 0) {
                            Some(0) => Ok(()),
                            code => Err(io::Error::from_raw_os_error(
                                code.map_or(libc::EPROTO, |code| code.cast_signed().wrapping_neg()),
                            )),
                        };
                    }
                    kind if kind == expected && answer(body) => return Ok(()),
                    _ => {}
                }
                rest = next;
            }
        }
    }
}
