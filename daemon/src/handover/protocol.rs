//! What two daemons say to each other, and whether they fit.

use std::{fmt, time::Duration};

use reeve_common::LAYOUT_VERSION;
use serde::{Deserialize, Serialize};

use super::material::Pass;
use crate::{config::Ports, identity::SpiffeId};

/// Version of the hand-over. A field that is added does not raise it.
pub(super) const PROTOCOL_VERSION: u32 = 1;
/// Version of how the programs of two layouts judge beside each other, see `SETTINGS_BESIDE`. Daemons of
/// different layouts hand over to each other only where both have the same. To be raised when one of these
/// changes: where connections are redirected to and what listens there, the mark, the routes of a
/// workload's namespace, or by what the programs know sockets of the other daemon.
pub(super) const BESIDE_VERSION: u32 = 1;

/// What the new daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum FromNew {
    /// First.
    Hello(Hello),
    /// It accepts connections; the old daemon may stop.
    Take,
    /// After that: what the old daemon is to do. One that does not know this passes it over.
    Tell(Word),
    /// Instead of a hello: an old daemon that no other one hears any more.
    Old(Old),
    /// The answer to that: what is left of it is heard from now on.
    Heard,
    /// To an old daemon that has said [`FromOld::Uses`]: the certificate of one of these identities,
    /// whenever there is another one. A file comes along.
    Pass(Pass),
    /// To an old daemon: cgroups (id and depth) of the one that serves, or is about to, which must not be
    /// judged. One whose maps another daemon looks after passes it over.
    Serves(Vec<(u64, u32)>),
}

/// An old daemon that looks for the one that serves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Old {
    /// Its cgroups (id and depth), which must not be judged.
    pub(super) own_cgroups: Vec<(u64, u32)>,
}

/// What a daemon that has taken over tells the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Word {
    /// The configuration is another: read it again.
    Reload,
    /// Another daemon serves now: [`FromNew::Old`] is for it.
    Move,
    /// Certificates are passed from now on to who says which identities are used: no source need be asked.
    Certificates,
    /// Connections may end by themselves for so many seconds, those of earlier daemons as well.
    EndWithin {
        /// From now on.
        seconds: u64,
    },
    /// One daemon lets its connections end within [`Word::EndWithin`]'s seconds; any other passes it on.
    EndOne {
        /// The daemon's process, as it sees it itself.
        process: u32,
        /// When it was started, as [`Draining::started`] says.
        started: u64,
        /// From now on.
        seconds: u64,
    },
}

/// Who wants to take over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Hello {
    pub(super) protocol: u32,
    pub(super) version: String,
    /// `LAYOUT_VERSION` of its maps.
    pub(super) layout: u32,
    pub(super) outbound_port: u16,
    pub(super) tunnel_port: u16,
    /// A service manager hears this daemon (`NOTIFY_SOCKET`).
    #[serde(default)]
    pub(super) notifies: bool,
    /// [`BESIDE_VERSION`]; 0: it takes over from daemons of its own layout only.
    #[serde(default)]
    pub(super) beside: u32,
    /// Its cgroups (id and depth), which must not be judged.
    #[serde(default)]
    pub(super) own_cgroups: Vec<(u64, u32)>,
}

/// What the old daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) enum FromOld {
    /// Nothing is handed over, and nothing has changed.
    Refused(String),
    /// It has left the kernel's maps to the new daemon, or is about to judge beside it. Sockets follow.
    Offer(Offer),
    /// Sockets, in the message's ancillary data.
    Sockets,
    /// It leaves accepting to the new daemon, and there is no way back.
    Taken,
    /// Again and again after that: what is left of it, and of daemons before it. A daemon that does
    /// not know this passes it over.
    Left(Vec<Draining>),
    /// After [`Word::Certificates`], and whenever they are others.
    Uses(Uses),
}

/// The identities that an old daemon's connections use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Uses {
    pub(super) identities: Vec<SpiffeId>,
    /// The next message has more of them.
    pub(super) more: bool,
}

/// What is handed over.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Offer {
    /// Version of the old daemon.
    pub version: String,
    /// Its process, as it sees it itself.
    pub process: u32,
    /// Whether it was ready: the new one then has to be, too.
    pub is_ready: bool,
    /// Cgroups of daemons (id and depth) that drain after this and must not be judged meanwhile.
    pub own_cgroups: Vec<(u64, u32)>,
    /// Number of sockets that follow.
    pub sockets: usize,
    /// Its maps have another layout: they stay its own, and the new daemon's are beside them.
    #[serde(default)]
    pub beside: bool,
}

/// How far a daemon has come that lets its connections end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Draining {
    /// Version of the daemon.
    pub version: String,
    /// Its process, as it sees it itself.
    pub process: u32,
    /// When it was started, by its clock then, in seconds since 1970.
    #[serde(default)]
    pub started: u64,
    /// Seconds since it began to let its connections end.
    #[serde(default)]
    pub seconds: u64,
    /// What is left; none where the daemon is of a version that does not say.
    pub left: Option<Left>,
    /// Its certificates; none where the daemon is of a version that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificates: Option<DrainingCertificates>,
}

/// The certificates that a daemon's connections use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainingCertificates {
    /// The daemon that serves passes them; otherwise it asks the sources by itself.
    pub passed: bool,
    /// Identities that its connections use.
    pub identities: usize,
    /// Those of them without a valid certificate.
    pub missing: usize,
    /// Seconds until the first of the certificates expires; none without any.
    pub seconds_left: Option<u64>,
}

/// What is left of a daemon's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Left {
    /// Application connections.
    pub connections: usize,
    /// Whose they are: those with the most, of which there is a bounded number.
    pub workloads: Vec<LeftOf>,
    /// Seconds until what is left is ended; none where that is left to the connections.
    pub seconds: Option<u64>,
}

/// What is left of one workload's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeftOf {
    /// Its name.
    pub workload: String,
    /// Its connections.
    pub connections: usize,
}

/// Whether a service manager hears this process.
pub(super) fn is_notifying() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

// === impl Draining ===

impl Draining {
    /// Of a daemon that has just handed over, and has said nothing yet.
    pub(super) fn beginning(offer: &Offer) -> Self {
        Self {
            version: offer.version.clone(),
            process: offer.process,
            ..Self::default()
        }
    }
}

impl fmt::Display for Draining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let since = Duration::from_secs(self.seconds);
        write!(
            f,
            "reeve {}, process {}, for {}: ",
            self.version,
            self.process,
            humantime::format_duration(since)
        )?;
        match &self.left {
            Some(left) => left.fmt(f)?,
            None => f.write_str("it does not say how many connections are left")?,
        }
        match &self.certificates {
            Some(certificates) if certificates.identities > 0 => write!(f, "; {certificates}"),
            _ => Ok(()),
        }
    }
}

// === impl DrainingCertificates ===

impl fmt::Display for DrainingCertificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let valid = self.identities.saturating_sub(self.missing);
        write!(f, "certificates: {valid} of {}", self.identities)?;
        f.write_str(match self.passed {
            true => ", passed by the daemon that serves",
            false => ", from its own sources",
        })?;
        let Some(seconds) = self.seconds_left else {
            return Ok(());
        };
        let left = humantime::format_duration(Duration::from_secs(seconds));
        write!(f, ", the first expires in {left}")
    }
}

// === impl Left ===

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "connections left: {}", self.connections)?;
        let mut unnamed = self.connections;
        for (number, of) in self.workloads.iter().enumerate() {
            let before = if number == 0 { " (" } else { ", " };
            write!(f, "{before}{} {}", of.workload, of.connections)?;
            unnamed = unnamed.saturating_sub(of.connections);
        }
        match (self.workloads.is_empty(), unnamed) {
            (true, _) => {}
            (false, 0) => f.write_str(")")?,
            (false, more) => write!(f, ", others {more})")?,
        }
        let Some(seconds) = self.seconds else {
            return f.write_str(", until they end by themselves");
        };
        let most = Duration::from_secs(seconds);
        write!(f, ", for at most {}", humantime::format_duration(most))
    }
}

// === impl Hello ===

impl Hello {
    pub(super) fn new(ports: Ports) -> Self {
        Self {
            protocol: PROTOCOL_VERSION,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            layout: LAYOUT_VERSION,
            outbound_port: ports.outbound,
            tunnel_port: ports.tunnel,
            notifies: is_notifying(),
            beside: BESIDE_VERSION,
            own_cgroups: Vec::new(),
        }
    }

    /// Whether its maps have another layout than this daemon's.
    pub(super) fn is_beside(&self) -> bool {
        self.layout != LAYOUT_VERSION
    }

    /// Why a daemon with these ports does not hand over to this one, if it does not.
    pub(super) fn refusal(&self, ports: Ports) -> Option<String> {
        let own = Self::new(ports);
        let restart = "stop the old daemon and start the new one instead: what needs a tunnel fails \
                       meanwhile, and nothing is open";
        if self.protocol != own.protocol {
            return Some(format!(
                "reeve {} speaks version {} of the hand-over and the running reeve {} version {}; {restart}",
                self.version, self.protocol, own.version, own.protocol
            ));
        }
        if self.is_beside() && self.beside != own.beside {
            return Some(format!(
                "the kernel maps of reeve {} have layout {} and those of the running reeve {} layout \
                 {}, and they do not judge beside each other; {restart}",
                self.version, self.layout, own.version, own.layout
            ));
        }
        let asked = (self.outbound_port, self.tunnel_port);
        if asked != (own.outbound_port, own.tunnel_port) {
            return Some(format!(
                "`ports` are {} and {} and those of the running daemon {} and {}; {restart}",
                self.outbound_port, self.tunnel_port, own.outbound_port, own.tunnel_port
            ));
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_fits_is_handed_over_to() {
        let ports = Ports::default();
        let hello = Hello::new(ports);
        assert_eq!(hello.refusal(ports), None);
        let older = Hello {
            version: "0.0.9".into(),
            ..hello.clone()
        };
        assert_eq!(older.refusal(ports), None, "the version alone is no reason");
        let of_another_layout = Hello {
            layout: LAYOUT_VERSION - 1,
            ..hello.clone()
        };
        assert_eq!(of_another_layout.refusal(ports), None, "nor is the layout");
        for (other, said) in [
            (
                Hello {
                    protocol: PROTOCOL_VERSION + 1,
                    ..hello.clone()
                },
                "version 2 of the hand-over",
            ),
            (
                Hello {
                    beside: 0,
                    ..of_another_layout.clone()
                },
                "have layout",
            ),
            (
                Hello {
                    tunnel_port: 1,
                    ..hello.clone()
                },
                "`ports` are 15001 and 1 ",
            ),
        ] {
            let refusal = other.refusal(ports).unwrap();
            assert!(refusal.contains(said), "{refusal}");
            assert!(refusal.contains("start the new one instead"), "{refusal}");
        }
    }

    #[test]
    fn what_is_left_is_said_with_whose_it_is() {
        let of = |workload: &str, connections| LeftOf {
            workload: workload.to_owned(),
            connections,
        };
        let mut draining = Draining {
            version: "0.1.0".into(),
            process: 7,
            seconds: 3600,
            left: Some(Left {
                connections: 12,
                workloads: vec![of("web", 7), of("jobs", 3)],
                seconds: Some(90),
            }),
            ..Draining::default()
        };
        assert_eq!(
            draining.to_string(),
            "reeve 0.1.0, process 7, for 1h: connections left: 12 (web 7, jobs 3, others 2), for at \
             most 1m 30s"
        );
        draining.left = Some(Left::default());
        assert!(
            draining
                .to_string()
                .contains("connections left: 0, until they end by themselves")
        );
        draining.left = None;
        assert!(draining.to_string().contains("it does not say"));
        draining.certificates = Some(DrainingCertificates {
            passed: true,
            identities: 2,
            missing: 1,
            seconds_left: Some(7),
        });
        let said =
            "; certificates: 1 of 2, passed by the daemon that serves, the first expires in 7s";
        assert!(draining.to_string().ends_with(said), "{draining}");
    }

    #[test]
    fn a_field_that_a_later_version_adds_is_passed_over() {
        let text = r#"{"hello":{"protocol":1,"version":"9","layout":1,"outboundPort":1,"tunnelPort":2,"more":3}}"#;
        let FromNew::Hello(hello) = serde_json::from_str(text).unwrap() else {
            panic!("not a hello");
        };
        assert_eq!(hello.version, "9");
    }
}
