//! Who holds a TCP port of the daemon's own network namespace: what an operator has to know when
//! `metrics.address` is taken.
//!
//! Whoever holds it may have made the search for a process as long as they like: many processes, with many
//! files open. So no thread of the daemon's waits for it, and it is given up after a while.

use std::{
    fmt, fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// The kernel's sockets of this thread's network namespace (proc_net(5)).
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
/// State of a socket that listens, as it stands in these tables.
const LISTENS: &str = "0A";
/// For the search for a process, all in all.
const PATIENCE: Duration = Duration::from_secs(1);

/// The owner of a socket that keeps an address from being bound.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Holder {
    /// Number of the user who made the socket.
    user: u32,
    /// A process that has it open.
    process: Option<Process>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    id: u32,
    name: String,
}

/// A line of the kernel's table.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    local: SocketAddr,
    listens: bool,
    user: u32,
    inode: u64,
}

// === impl Holder ===

impl Holder {
    /// Finds the user who holds an address. None where no socket of the table explains it: the table lacks
    /// sockets that are bound and neither listen nor are connected.
    fn of(address: SocketAddr) -> Option<(Self, u64)> {
        let tables = TABLES.map(|file| fs::read_to_string(file).unwrap_or_default());
        let entries = tables.iter().flat_map(|table| table.lines().skip(1));
        let entry = entries
            .filter_map(Entry::parse)
            .filter(|entry| entry.inode != 0 && entry.keeps_from(address))
            .max_by_key(|entry| entry.listens)?;
        let holder = Self {
            user: entry.user,
            process: None,
        };
        Some((holder, entry.inode))
    }

    /// The same with a process, if one is found before the deadline.
    fn with_process(address: SocketAddr, deadline: Instant) -> Option<Self> {
        let (mut holder, inode) = Self::of(address)?;
        holder.process = processes()
            .take_while(|_| Instant::now() < deadline)
            .find(|id| has_open(*id, inode, deadline))
            .map(Process::named);
        Some(holder)
    }
}

/// The process of another reeve that holds an address, root's or of this one's user: the same program, so
/// that no container's is taken for it. Nobody else's processes are looked into.
pub(super) fn other_reeve(address: SocketAddr) -> Option<u32> {
    let own_user = nix::unistd::geteuid().as_raw();
    let (holder, inode) = Holder::of(address)?;
    if ![0, own_user].contains(&holder.user) {
        return None;
    }
    let program = |of: &str| {
        let metadata = fs::metadata(format!("/proc/{of}/exe")).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let own = program("self")?;
    let deadline = Instant::now() + PATIENCE;
    processes()
        .filter(|id| *id != std::process::id())
        .filter(|id| {
            let user = fs::metadata(format!("/proc/{id}")).map(|process| process.uid());
            user.is_ok_and(|user| [0, own_user].contains(&user))
                && program(&id.to_string()) == Some(own)
        })
        .find(|id| has_open(*id, inode, deadline))
}

/// A search for the holder of an address, on a thread of its own.
#[derive(Debug)]
pub(super) struct Search {
    found: mpsc::Receiver<Option<Holder>>,
}

impl Search {
    pub(super) fn start(address: SocketAddr) -> Self {
        let (finder, found) = mpsc::channel();
        let search = move || {
            // Nobody waits for it any more where the address is free by now.
            let _ = finder.send(Holder::with_process(address, Instant::now() + PATIENCE));
        };
        // Without a thread nothing is found.
        let _ = thread::Builder::new()
            .name("port-holder".into())
            .spawn(search);
        Self { found }
    }

    /// What it has found; an error while it goes on.
    pub(super) fn result(&self) -> Result<Option<Holder>, mpsc::TryRecvError> {
        match self.found.try_recv() {
            Err(mpsc::TryRecvError::Disconnected) => Ok(None),
            result => result,
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some(Process { id, name }) => {
                // A process gives itself whatever name it likes.
                write!(f, "process {id} ({})", name.escape_default())?;
            }
            None => write!(f, "an unknown process")?,
        }
        write!(f, " of user {}", self.user)
    }
}

// === impl Entry ===

impl Entry {
    fn parse(line: &str) -> Option<Self> {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        Some(Self {
            local: parse_address(fields.get(1)?)?,
            listens: *fields.get(3)? == LISTENS,
            user: fields.get(7)?.parse().ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    }

    /// Whether this socket may be what keeps an address from being bound.
    fn keeps_from(&self, address: SocketAddr) -> bool {
        let [own, wanted] = [self.local, address].map(|at| at.ip().to_canonical());
        let overlap = own == wanted || own.is_unspecified() || wanted.is_unspecified();
        self.local.port() == address.port() && overlap
    }
}

/// An address of the table: hexadecimal words in this machine's order of bytes, and the port.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| {
        let digits = ip.get(at * 8..(at + 1) * 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let words = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Ipv6Addr::from(<[u8; 16]>::try_from(words).ok()?).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

// === impl Process ===

impl Process {
    fn named(id: u32) -> Self {
        let name = fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
        let name = name.trim_end().to_owned();
        Self { id, name }
    }
}

/// All processes.
fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Whether a process has the socket with this inode open, as far as that is found out in time.
fn has_open(process: u32, inode: u64, deadline: Instant) -> bool {
    let wanted = PathBuf::from(format!("socket:[{inode}]"));
    // One that has ended meanwhile has nothing open.
    let files = fs::read_dir(format!("/proc/{process}/fd"));
    files.is_ok_and(|files| {
        files
            .flatten()
            .take_while(|_| Instant::now() < deadline)
            .any(|file| fs::read_link(file.path()).is_ok_and(|link| link == wanted))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn the_search_for_a_process_ends_in_time_and_its_user_is_known_all_the_same() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let holder = Holder::with_process(address, Instant::now()).unwrap();
        assert_eq!(holder.process, None);
        assert_eq!(holder.user, nix::unistd::geteuid().as_raw());
        // Nor does one process with many files take longer.
        let (_, inode) = Holder::of(address).unwrap();
        assert!(has_open(std::process::id(), inode, soon()));
        assert!(!has_open(std::process::id(), inode, Instant::now()));
    }

    #[test]
    fn the_holder_of_a_port_is_found_in_either_family() {
        for ip in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
            let listener = TcpListener::bind((ip.parse::<IpAddr>().unwrap(), 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let holder = Holder::with_process(address, soon()).unwrap();
            let process = holder.process.clone().unwrap();
            assert_eq!(process.id, std::process::id(), "{ip}");
            assert_eq!(holder.user, nix::unistd::geteuid().as_raw());
            // It is this very process, and so no other reeve.
            assert_eq!(other_reeve(address), None);
            drop(listener);
            assert_eq!(Holder::of(address), None, "{ip}");
        }
    }

    #[test]
    fn a_listener_goes_before_its_connections_and_whatever_is_bound_elsewhere_does_not_count() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _client = TcpStream::connect(address).unwrap();
        let (_server, _) = listener.accept().unwrap();
        assert!(Holder::of(address).is_some());
        let entry = |local: &str| Entry {
            local: local.parse().unwrap(),
            listens: true,
            user: 0,
            inode: 1,
        };
        let wanted = "127.0.0.1:15020".parse().unwrap();
        for keeps in [
            "127.0.0.1:15020",
            "0.0.0.0:15020",
            "[::]:15020",
            "[::ffff:127.0.0.1]:15020",
        ] {
            assert!(entry(keeps).keeps_from(wanted), "{keeps}");
        }
        for other in ["127.0.0.2:15020", "127.0.0.1:15021", "[::1]:15020"] {
            assert!(!entry(other).keeps_from(wanted), "{other}");
        }
    }

    #[test]
    fn a_name_that_a_process_gives_itself_breaks_no_line() {
        let holder = Holder {
            user: 1000,
            process: Some(Process {
                id: 7,
                name: "a\nb".into(),
            }),
        };
        assert_eq!(holder.to_string(), r"process 7 (a\nb) of user 1000");
        assert_eq!(Entry::parse("  sl  local_address rem_address"), None);
    }
}
