//! Enforced parents: made where they are not there, since what is born in one is refused from its
//! birth only where the kernel knows the parent already.

use std::{cell::OnceCell, fs, io};

use super::systemd::{self, Systemd};
use crate::{
    config::Config,
    workload::{
        CgroupSelector,
        cgroup::{CgroupError, CgroupTree},
    },
};

/// Why an enforced parent does not hold.
#[derive(Debug, thiserror::Error)]
pub enum ParentError {
    /// systemd has not started the slice.
    #[error(
        "the enforced parent {path} is a slice that systemd does not start, so that its cgroup would not stay: {error}; `systemctl start {slice}` says more"
    )]
    Slice {
        /// Path of the parent.
        path: String,
        /// The slice.
        slice: String,
        /// From systemd.
        error: io::Error,
    },
    /// It cannot be made.
    #[error("the enforced parent {path} is not there and cannot be made: {error}; {}", remedy(.error, .path))]
    Make {
        /// Path of the parent.
        path: String,
        /// From the kernel.
        error: io::Error,
    },
    /// It goes with a unit.
    #[error(
        "the enforced parent {path} goes whenever {unit} stops, and what is born when {unit} is started again is refused only once the daemon has seen it; name the slice that {unit} is in instead"
    )]
    Passing {
        /// Path of the parent.
        path: String,
        /// The unit that takes it along.
        unit: String,
    },
}

fn remedy(error: &io::Error, path: &str) -> String {
    let why = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "in the root of the hierarchy nothing is made without CAP_DAC_OVERRIDE: "
        }
        io::ErrorKind::ReadOnlyFilesystem => {
            "cgroups are read-only here (`ProtectControlGroups=`, or a container's mount): "
        }
        _ => "",
    };
    format!(
        "{why}make it before reeve is started, as `reeve guard` does in its unit, or take {path} out of \
         `enforcedParents`"
    )
}

/// Makes enforced parents, and knows how they are kept.
pub(super) struct Parents<'a> {
    cgroups: &'a CgroupTree,
    /// Connected to when it is first needed; then none where there is none.
    systemd: OnceCell<Option<Systemd>>,
}

// === impl Parents ===

impl<'a> Parents<'a> {
    pub(super) fn new(cgroups: &'a CgroupTree) -> Self {
        Self {
            cgroups,
            systemd: OnceCell::new(),
        }
    }

    /// Makes a parent that is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn make(&mut self, path: &str) -> Result<(), ParentError> {
        if self.cgroups.folder(path).exists() {
            return Ok(());
        }
        self.start(path)?;
        let folder = self.cgroups.folder(path);
        if folder.exists() {
            return Ok(());
        }
        fs::create_dir_all(&folder).map_err(|error| ParentError::Make {
            path: path.to_owned(),
            error,
        })?;
        tracing::info!(
            cgroup = path,
            "an enforced parent was not there and is made"
        );
        Ok(())
    }

    /// Makes a parent that is not there, and has it stay without the daemon.
    ///
    /// # Errors
    /// When it cannot be made, or goes when its unit stops.
    pub(super) fn hold(&mut self, path: &str) -> Result<(), ParentError> {
        self.start(path)?;
        self.make(path)?;
        match systemd::unit_in(path) {
            Some(unit) if self.systemd().is_some() => Err(ParentError::Passing {
                path: path.to_owned(),
                unit: unit.to_owned(),
            }),
            _ => Ok(()),
        }
    }

    /// Path of the cgroup that a unit will have, where that is known.
    pub(super) fn cgroup_of(&mut self, unit: &str) -> Option<String> {
        self.systemd()?.cgroup_of(unit)
    }

    fn systemd(&mut self) -> Option<&mut Systemd> {
        self.systemd.get_or_init(Systemd::connect);
        self.systemd.get_mut()?.as_mut()
    }

    /// Has systemd start a parent that is a slice: it keeps the cgroup of a slice that is started, and
    /// removes any other when it likes.
    fn start(&mut self, path: &str) -> Result<(), ParentError> {
        let folder = self.cgroups.folder(path);
        let Some(slice) = systemd::slice_at(path) else {
            return Ok(());
        };
        let Some(systemd) = self.systemd() else {
            return Ok(());
        };
        systemd
            .start_slice(slice, &folder)
            .map_err(|error| ParentError::Slice {
                path: path.to_owned(),
                slice: slice.to_owned(),
                error,
            })
    }
}

/// Makes sure that programs are attached above all that is declared by its path.
///
/// # Errors
/// When something lies elsewhere: nothing would be enforced there.
pub(super) fn require_below_root(cgroups: &CgroupTree, config: &Config) -> Result<(), CgroupError> {
    for workload in &config.workloads {
        if let CgroupSelector::Cgroup(path) = &workload.selector {
            cgroups.require_below_root(&format!("workload {}", workload.name), path)?;
        }
    }
    for path in &config.enforced_parents {
        cgroups.require_below_root("an enforced parent", path)?;
    }
    Ok(())
}
