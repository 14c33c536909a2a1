//! What the daemon may still do once it runs, and what each of its threads may.
//!
//! In: the configuration's `sandbox`. Out: threads that cannot do what they have no need of.
//!
//! Capabilities, seccomp filters and Landlock domains belong to threads, and a thread passes its
//! own on to those that it starts. So the whole process is confined before its second thread
//! ([`Confinement::enter_process`]), and whoever reads what strangers send gives up all that is
//! left ([`Confinement::enter_exposed`]): the tunnels' workers, the metrics endpoint, the admin and the
//! hand-over socket have no capability, no file and no way to a new socket.
//! [`crate::datapath::Sockets`] opens those.

mod capabilities;
mod exposed;
mod refusal;
mod seccomp;

use landlock::{ABI, Access, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetStatus};
use nix::sys::prctl;
use serde::Deserialize;

/// What of a confinement must be there. Capabilities are given up in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Confinement {
    /// Filters of system calls. Default auto.
    pub seccomp: Demand,
    /// No files for threads that read what strangers send. Default auto.
    pub landlock: Demand,
}

/// How much a part of the confinement is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Demand {
    /// Where the kernel has it; a warning where it has not.
    #[default]
    Auto,
    /// The daemon does not start without it.
    Required,
    /// Never.
    Off,
}

/// Why the daemon cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// Capabilities cannot be given up.
    #[error("capabilities cannot be given up: {0}")]
    Capabilities(String),
    /// `PR_SET_NO_NEW_PRIVS`.
    #[error("gaining privileges by running programs cannot be ruled out (PR_SET_NO_NEW_PRIVS)")]
    NoNewPrivileges(#[source] nix::Error),
    /// `sandbox.seccomp` is `required`.
    #[error(
        "`sandbox.seccomp` is `required`, and system calls cannot be filtered: {0}; or set it to `auto`"
    )]
    Seccomp(String),
    /// `sandbox.landlock` is `required`.
    #[error(
        "`sandbox.landlock` is `required`, and files cannot be shut off: {0}; or set it to `auto`"
    )]
    Landlock(String),
}

// === impl Confinement ===

impl Confinement {
    /// Confines this thread and all that it will start to what the daemon as a whole needs. To be
    /// called before there is a second thread.
    ///
    /// # Errors
    /// When something that is required is refused.
    pub fn enter_process(self) -> Result<(), PrivilegeError> {
        prctl::set_no_new_privs().map_err(PrivilegeError::NoNewPrivileges)?;
        capabilities::keep(&capabilities::OF_THE_DAEMON)?;
        self.filter(seccomp::never, "the daemon")
    }

    /// Leaves this thread what it needs to open sockets in network namespaces.
    ///
    /// # Errors
    /// When capabilities cannot be given up.
    pub fn enter_sockets(self) -> Result<(), PrivilegeError> {
        capabilities::keep(&capabilities::OF_SOCKETS)
    }

    /// Leaves this thread, and those that it will start, what it needs to fetch something from the
    /// network: no capability, and no file to write or to run.
    ///
    /// # Errors
    /// When something that is required is refused.
    pub fn enter_fetching(self) -> Result<(), PrivilegeError> {
        capabilities::keep(&[])?;
        let but_reading = AccessFs::from_write(ABI::V5) | AccessFs::Execute;
        self.shut_off_files(but_reading)
    }

    /// Leaves this thread, which reads what strangers send, nothing but its open sockets and its
    /// memory.
    ///
    /// # Errors
    /// When something that is required is refused.
    pub fn enter_exposed(self) -> Result<(), PrivilegeError> {
        capabilities::keep(capabilities::of_the_exposed())?;
        self.shut_off_files(AccessFs::from_all(ABI::V5))?;
        self.filter(seccomp::exposed, "a thread that reads what strangers send")
    }

    fn filter(self, filter: seccomp::Make, whose: &str) -> Result<(), PrivilegeError> {
        if self.seccomp == Demand::Off {
            return Ok(());
        }
        match seccomp::apply(filter) {
            Err(error) if self.seccomp == Demand::Required => Err(PrivilegeError::Seccomp(error)),
            Err(error) => {
                tracing::warn!(error, whose, "system calls are not filtered");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// These accesses to files by name are refused from now on. What is open stays usable.
    fn shut_off_files(self, access: BitFlags<AccessFs>) -> Result<(), PrivilegeError> {
        if self.landlock == Demand::Off {
            return Ok(());
        }
        let ruleset = Ruleset::default()
            .handle_access(access)
            .and_then(Ruleset::create)
            .and_then(landlock::RulesetCreated::restrict_self);
        let failure = match ruleset {
            Ok(status) if status.ruleset != RulesetStatus::NotEnforced => return Ok(()),
            Ok(_) => refusal::no_landlock(),
            Err(error) => refusal::explain_cause("Landlock", &error),
        };
        if self.landlock == Demand::Required {
            return Err(PrivilegeError::Landlock(failure));
        }
        tracing::warn!(
            error = failure,
            "a thread that reads what strangers send is not shut off from files"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io, net::TcpListener, thread};

    use super::*;

    /// Runs `work` on a thread that is confined first.
    fn exposed<T: Send + 'static>(
        confinement: Confinement,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        thread::spawn(move || {
            confinement.enter_exposed().unwrap();
            work()
        })
        .join()
        .unwrap()
    }

    const REQUIRED: Confinement = Confinement {
        seccomp: Demand::Required,
        landlock: Demand::Required,
    };

    #[test]
    fn who_reads_what_strangers_send_has_no_capability() {
        let status = thread::spawn(|| {
            capabilities::keep(capabilities::of_the_exposed()).unwrap();
            fs::read_to_string("/proc/thread-self/status").unwrap()
        })
        .join()
        .unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let line = status.lines().find(|line| line.starts_with(set)).unwrap();
            assert!(line.ends_with("0000000000000000"), "{line}");
        }
    }

    #[test]
    fn each_of_the_two_walls_alone_keeps_it_from_files() {
        for (seccomp, landlock, code) in [
            (Demand::Off, Demand::Required, libc::EACCES),
            (Demand::Required, Demand::Off, libc::EPERM),
        ] {
            let confinement = Confinement { seccomp, landlock };
            let (read, written) = exposed(confinement, || {
                (fs::read("/etc/passwd"), fs::write("/tmp/reeve-no", ""))
            });
            assert_eq!(read.unwrap_err().raw_os_error(), Some(code));
            assert_eq!(written.unwrap_err().raw_os_error(), Some(code));
        }
        assert!(fs::read("/etc/passwd").is_ok(), "other threads go on");
    }

    #[test]
    fn who_fetches_reads_files_and_connects_and_writes_nothing() {
        let confinement = Confinement {
            landlock: Demand::Required,
            ..Confinement::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let status = thread::spawn(move || {
            confinement.enter_fetching().unwrap();
            assert!(fs::read("/etc/passwd").is_ok());
            let written = fs::write("/tmp/reeve-no", "").unwrap_err();
            assert_eq!(written.raw_os_error(), Some(libc::EACCES));
            assert!(std::process::Command::new("/bin/true").status().is_err());
            std::net::TcpStream::connect(at).unwrap();
            fs::read_to_string("/proc/thread-self/status").unwrap()
        });
        let status = status.join().unwrap();
        let line = status.lines().find(|line| line.starts_with("CapEff"));
        assert!(line.unwrap().ends_with("0000000000000000"), "{status}");
    }

    #[test]
    fn it_makes_no_socket_and_runs_no_program() {
        let (socket, program) = exposed(REQUIRED, || {
            let program = std::process::Command::new("/bin/true").status();
            (TcpListener::bind("127.0.0.1:0"), program)
        });
        let denied = |error: io::Error| error.raw_os_error() == Some(libc::EPERM);
        assert!(denied(socket.unwrap_err()));
        assert!(program.is_err());
    }

    #[test]
    fn what_it_had_open_goes_on() {
        use std::io::{Read, Write};
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        client.write_all(b"hello").unwrap();
        let read = exposed(REQUIRED, move || {
            let (mut accepted, _) = listener.accept()?;
            let mut text = [0; 5];
            accepted.read_exact(&mut text)?;
            Ok::<_, io::Error>(text)
        });
        assert_eq!(&read.unwrap(), b"hello");
    }

    #[test]
    fn the_daemon_as_a_whole_runs_no_program_and_traces_nobody() {
        thread::spawn(|| {
            REQUIRED.enter_process().unwrap();
            let program = std::process::Command::new("/bin/true").status();
            assert!(program.is_err());
            // SAFETY: the call is refused before it looks at its arguments.
            let traced = unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            assert_eq!(traced, -1);
            assert!(fs::read("/etc/passwd").is_ok());
            let status = fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        })
        .join()
        .unwrap();
    }
}
