//! Handing a node over from one daemon to the next, so that no connection notices.
//!
//! In: a new daemon that asks at the old one's hand-over socket, or the sockets that a service
//! manager kept. Out: the listening sockets themselves, so that nothing that waits in their
//! queues is lost.
//!
//! Follow a hand-over: the new daemon [`ask`]s, which changes nothing where the versions do not
//! fit; the old one's control [freezes](Request::Freeze), which leaves the kernel's maps to the new
//! one (of another layout, each keeps its own), and goes on serving; the new one gets ready, and
//! [takes](Takeover::take); the old one accepts
//! no more, drains, and says how much is [left](Draining) and which identities that uses. Of these the
//! new one [passes](Passer) the certificates. Whatever ends the new one before that has
//! the old one go on as before. When the daemon that took over ends before the old one does, the old
//! one [comes](come) to whichever serves then. What either says is read on a thread without privileges.

mod inherited;
mod material;
mod new;
mod old;
mod order;
mod packet;
mod protocol;

pub use inherited::{Inherited, forget_kept, from_service_manager, keep};
pub use new::{Before, Heard, Passer, Takeover, TakeoverError, ask};
pub use old::{Asker, Comer, Listener, Request, Rest, come};
pub use order::Order;
pub use protocol::{Draining, DrainingCertificates, Left, LeftOf, Offer, Word};

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Where a daemon with this admin socket is asked to hand over.
fn socket_beside(admin_socket: &Path) -> PathBuf {
    let mut path = admin_socket.as_os_str().to_owned();
    path.push(".handover");
    path.into()
}

/// Has nobody find the daemon with this admin socket any more.
pub fn leave(admin_socket: &Path) {
    // Where it is gone already, nobody finds it either.
    let _ = fs::remove_file(socket_beside(admin_socket));
}
