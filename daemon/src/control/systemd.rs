//! systemd, as keeper of cgroups: the cgroup of a slice stays for as long as the slice is started.

mod bus;

use std::{io, path::Path, thread, time::Duration};

use bus::{Bus, Method};

/// systemd's own socket, which is there before any message bus is.
const SOCKET: &str = "/run/systemd/private";
const DESTINATION: &str = "org.freedesktop.systemd1";
const MANAGER: Method<'_> = Method {
    destination: DESTINATION,
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
    name: "",
};

const UNIT: &str = "org.freedesktop.systemd1.Unit";
const JOB: &str = "org.freedesktop.systemd1.Job";
const SERVICE: &str = "org.freedesktop.systemd1.Service";
/// The job of a unit that has none.
const NO_JOB: &str = "/";

/// For a slice to have its cgroup, once systemd has been told.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(10);

/// Kinds of units that have a cgroup of their own, besides slices, with the names of their interfaces.
const KINDS: [(&str, &str); 5] = [
    ("service", "Service"),
    ("scope", "Scope"),
    ("socket", "Socket"),
    ("mount", "Mount"),
    ("swap", "Swap"),
];

/// The host's service manager.
#[derive(Debug)]
pub(super) struct Systemd {
    bus: Bus,
}

// === impl Systemd ===

impl Systemd {
    /// None where the host is not systemd's, or this process does not see it.
    pub(super) fn connect() -> Option<Self> {
        match Bus::connect(Path::new(SOCKET)) {
            Ok(bus) => Some(Self { bus }),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::debug!(%error, "systemd cannot be asked");
                }
                None
            }
        }
    }

    /// Starts a slice, and waits for its cgroup, which stays until the slice is stopped.
    ///
    /// # Errors
    /// When systemd refuses, or makes no cgroup at `folder`.
    pub(super) fn start_slice(&mut self, name: &str, folder: &Path) -> io::Result<()> {
        let start = Method {
            name: "StartUnit",
            ..MANAGER
        };
        self.bus.call(&start, &[name, "replace"])?;
        let mut waited = Duration::ZERO;
        while !folder.exists() {
            if waited >= PATIENCE {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("it started {name} and made no {}", folder.display()),
                ));
            }
            thread::sleep(LOOK);
            waited += LOOK;
        }
        Ok(())
    }

    /// Whether systemd knows a unit, by a file or because it runs; of a template, any instance of it.
    pub(super) fn knows(&mut self, unit: &str) -> io::Result<bool> {
        let load = Method {
            name: "LoadUnit",
            ..MANAGER
        };
        let path = self.bus.call(&load, &[&instance_of(unit)])?;
        let state = self.bus.call(&property_of(&path), &[UNIT, "LoadState"])?;
        Ok(state != "not-found")
    }

    /// Whether a unit is being stopped to be started again, by a job that was asked for.
    pub(super) fn is_restarting(&mut self, unit: &str) -> io::Result<bool> {
        let path = self.path_of(unit)?;
        let job = self
            .bus
            .call(&property_of(&path), &[UNIT, "Job"])
            .map_err(|error| io::Error::other(format!("the job of {unit}: {error}")))?;
        if job == NO_JOB {
            return Ok(false);
        }
        let kind = self.bus.call(&property_of(&job), &[JOB, "JobType"])?;
        Ok(kind == "restart")
    }

    /// How many descriptors systemd keeps for a service (`FileDescriptorStoreMax=`).
    pub(super) fn descriptors_kept(&mut self, unit: &str) -> io::Result<u32> {
        let path = self.path_of(unit)?;
        let words = [SERVICE, "FileDescriptorStoreMax"];
        let most = self.bus.call_for_number(&property_of(&path), &words)?;
        Ok(most.unwrap_or_default())
    }

    fn path_of(&mut self, unit: &str) -> io::Result<String> {
        let get = Method {
            name: "GetUnit",
            ..MANAGER
        };
        self.bus.call(&get, &[unit])
    }

    /// Path of the cgroup that a unit will have when it is started, where systemd knows the unit. Of
    /// a template, that of an instance without its last part.
    pub(super) fn cgroup_of(&mut self, unit: &str) -> Option<String> {
        if let Some(path) = path_of_slice(unit) {
            return Some(path);
        }
        let kind = unit.rsplit_once('.')?.1;
        let (_, interface) = KINDS.iter().find(|(name, _)| *name == kind)?;
        let instance = instance_of(unit);
        let load = Method {
            name: "LoadUnit",
            ..MANAGER
        };
        let path = self.bus.call(&load, &[&instance]).ok()?;
        let interface = format!("{DESTINATION}.{interface}");
        let get = property_of(&path);
        let slice = self.bus.call(&get, &[&interface, "Slice"]).ok()?;
        Some(format!("{}/{unit}", path_of_slice(&slice)?))
    }
}

/// Some instance of a template; any other unit is itself.
fn instance_of(unit: &str) -> String {
    unit.replace("@.", "@reeve.")
}

/// The call for a property of an object.
fn property_of(path: &str) -> Method<'_> {
    Method {
        destination: DESTINATION,
        path,
        interface: "org.freedesktop.DBus.Properties",
        name: "Get",
    }
}

/// The slice whose cgroup has this path.
pub(super) fn slice_at(path: &str) -> Option<&str> {
    let name = path.rsplit('/').next()?;
    (path_of_slice(name)? == path).then_some(name)
}

/// The first unit in a path, other than slices: systemd removes all that is below when it stops.
pub(super) fn unit_in(path: &str) -> Option<&str> {
    path.split('/').find(|part| {
        let kind = part.rsplit_once('.').map(|(_, kind)| kind);
        KINDS.iter().any(|(name, _)| kind == Some(name))
    })
}

/// Path of a slice's cgroup: `a-b.slice` is in `a.slice` (systemd.slice(5)).
fn path_of_slice(name: &str) -> Option<String> {
    let stem = name.strip_suffix(".slice")?;
    if stem == "-" {
        return Some(String::new());
    }
    if stem.split('-').any(str::is_empty) {
        return None;
    }
    let ends = stem.match_indices('-').map(|(at, _)| at);
    Some(
        ends.chain([stem.len()])
            .map(|end| format!("/{}.slice", &stem[..end]))
            .collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slice_is_in_the_slices_that_its_name_begins_with() {
        assert_eq!(path_of_slice("jobs.slice").unwrap(), "/jobs.slice");
        assert_eq!(
            path_of_slice("a-b-c.slice").unwrap(),
            "/a.slice/a-b.slice/a-b-c.slice"
        );
        assert_eq!(path_of_slice("-.slice").unwrap(), "");
        for other in ["jobs.service", "-a.slice", "a--b.slice", "a-.slice"] {
            assert_eq!(path_of_slice(other), None, "{other}");
        }
        assert_eq!(slice_at("/a.slice/a-b.slice"), Some("a-b.slice"));
        for other in [
            "/a.slice/b.slice",
            "/a-b.slice",
            "/a.slice/x.service",
            "/kubepods",
        ] {
            assert_eq!(slice_at(other), None, "{other}");
        }
    }

    #[test]
    fn units_in_a_path_are_found() {
        assert_eq!(
            unit_in("/system.slice/docker.service/x"),
            Some("docker.service")
        );
        assert_eq!(unit_in("/machine.slice/a.scope"), Some("a.scope"));
        assert_eq!(unit_in("/kubepods.slice/kubepods-besteffort.slice"), None);
        assert_eq!(unit_in("/service/x"), None);
    }
}
