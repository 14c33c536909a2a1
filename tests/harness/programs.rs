//! Where the programs under test are.

use std::{
    env,
    path::{Path, PathBuf},
    sync::OnceLock,
};

static PROGRAMS: OnceLock<Programs> = OnceLock::new();

/// The daemon, and the program that plays clients and servers.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The `reeve` binary.
    pub reeve: PathBuf,
    /// The tests' own program.
    pub peer: PathBuf,
}

impl Programs {
    /// What the daemon is called whose kernel maps have another layout.
    pub const OTHER_LAYOUT: &str = "reeve-other-layout";

    /// Those in use: from the environment (`REEVE`, `REEVE_PEER`), else what cargo built beside the
    /// running program.
    pub fn get() -> &'static Programs {
        PROGRAMS.get_or_init(|| {
            let program = env::current_exe().expect("the running program has a path");
            // Test binaries are in `deps`, one folder below the programs.
            let beside = |name: &str| {
                program
                    .ancestors()
                    .skip(1)
                    .take(2)
                    .map(|folder| folder.join(name))
                    .find(|file| file.is_file())
                    .unwrap_or_else(|| panic!("`{name}` is not built: run `cargo xtask build`"))
            };
            let named = |variable: &str, name: &str| {
                env::var_os(variable)
                    .map_or_else(|| beside(name), |path| Path::new(&path).to_owned())
            };
            Programs {
                reeve: named("REEVE", "reeve"),
                peer: named("REEVE_PEER", "peer"),
            }
        })
    }

    /// A daemon whose kernel maps have another layout: from the environment (`REEVE_OTHER_LAYOUT`), else
    /// beside the daemon under test.
    #[must_use]
    pub fn other_layout() -> PathBuf {
        let beside = || Self::get().reeve.with_file_name(Self::OTHER_LAYOUT);
        let program =
            env::var_os("REEVE_OTHER_LAYOUT").map_or_else(beside, |path| PathBuf::from(&path));
        assert!(
            program.is_file(),
            "{} is not built: `cargo xtask test` does that",
            program.display()
        );
        program
    }

    /// Uses these, where they are known. Call it before anything else of this library.
    pub fn set(self) {
        assert!(
            PROGRAMS.set(self).is_ok(),
            "the programs are in use already"
        );
    }
}
