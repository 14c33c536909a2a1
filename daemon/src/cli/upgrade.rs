//! `reeve upgrade`, and the service's own reload that carries it out: the new daemon is started by
//! systemd's reload of the unit, so that it has the unit's cgroup, sandbox, environment and watchdog.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use clap::{Args, Parser};

use super::{Cli, args, ask_status, failed, print, refused, reload_running};
use crate::{control, handover::Order};

/// For a new daemon to take over or to say why it does not: longer than it takes to give up, and
/// shorter than the time after which the order is void, or systemd gives the reload up (90 s).
const PATIENCE: Duration = Duration::from_secs(55);
const LOOK: Duration = Duration::from_millis(20);

/// Variables that are for the process of the reload, and not for the daemon that it starts.
const OF_THE_RELOAD: [&str; 4] = ["MAINPID", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS"];
/// Variables that systemd gives to the main process alone.
const OF_MAIN: [&str; 2] = ["WATCHDOG_USEC", "FDSTORE"];

/// What `reeve upgrade` is told.
#[derive(Debug, Args)]
pub struct Upgrade {
    /// The running daemon's admin socket (`admin.socket` of its configuration)
    #[arg(long, value_name = "PATH", default_value = args::DEFAULT_SOCKET)]
    socket: PathBuf,
    /// End the connections of all old daemons after this time, as in 90s, 1h or 0s; without it they end
    /// by themselves, or within `timeouts.handOver`
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    end_old_after: Option<Duration>,
}

/// Why an upgrade is not begun, or has failed.
#[derive(Debug, thiserror::Error)]
enum UpgradeError {
    #[error(
        "the daemon (process {0}) is no service of systemd: start `reeve run --takeover` with the same \
         configuration beside it"
    )]
    NoService(u32),
    #[error("`systemctl reload {unit}` cannot be run")]
    Systemctl { unit: String, source: io::Error },
    #[error(
        "the reload of {0} starts no daemon: install the unit deploy/reeve.service of this release, run \
         `systemctl daemon-reload`, and try again; nothing has changed"
    )]
    OldUnit(String),
    #[error("nothing has changed, the running daemon goes on: {0}")]
    Failed(String),
    #[error("{path} cannot be used")]
    File { path: PathBuf, source: io::Error },
}

/// `reeve upgrade`.
#[must_use]
pub fn upgrade(words: &Upgrade) -> ExitCode {
    let before = match ask_status(&words.socket) {
        Ok(status) => status,
        Err(code) => return code,
    };
    let process = match order(words, before.process) {
        Ok(process) => process,
        Err(error) => return failed(&error),
    };
    let version = match ask_status(&words.socket) {
        Ok(status) if status.process == process => status.version,
        Ok(status) => {
            let process = status.process;
            return refused(&format!("another process, {process}, has taken over since"));
        }
        Err(code) => return code,
    };
    let end = match words.end_old_after {
        Some(patience) => format!("within {}", humantime::format_duration(patience)),
        None => "by themselves".to_owned(),
    };
    print(&format!(
        "reeve {version}, process {process}, has taken over from reeve {}, process {}, whose \
         connections end {end}: `reeve status` says how many are left\n",
        before.version, before.process
    ))
}

/// Has systemd reload the unit of this process, and gives the process that has taken over.
fn order(words: &Upgrade, process: u32) -> Result<u32, UpgradeError> {
    let unit = unit_of(process).ok_or(UpgradeError::NoService(process))?;
    let path = Order::path(&words.socket);
    let on_file = |source| UpgradeError::File {
        path: path.clone(),
        source,
    };
    let order = Order::Upgrade {
        end_old_after: words.end_old_after.map(|patience| patience.as_secs()),
    };
    order.write(&path).map_err(on_file)?;
    let reloaded = Command::new("systemctl").args(["reload", &unit]).status();
    let outcome = Order::read(&path);
    fs::remove_file(&path).map_err(on_file)?;
    let reloaded = reloaded.map_err(|source| UpgradeError::Systemctl {
        unit: unit.clone(),
        source,
    })?;
    match outcome.map_err(on_file)? {
        Some(Order::Done(process)) => Ok(process),
        Some(Order::Failed(why)) => Err(UpgradeError::Failed(why)),
        // Not even looked at.
        Some(Order::Upgrade { .. }) => Err(UpgradeError::OldUnit(unit)),
        _ if reloaded.success() => Err(UpgradeError::OldUnit(unit)),
        _ => Err(UpgradeError::Failed(format!(
            "`systemctl reload {unit}` failed; `systemctl status {unit}` and `journalctl -u {unit}` say why"
        ))),
    }
}

/// The service that a process is of, by its cgroup.
fn unit_of(process: u32) -> Option<String> {
    let cgroups = fs::read_to_string(format!("/proc/{process}/cgroup")).ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    let parts = path.split('/').rev();
    let mut units = parts.filter(|part| part.ends_with(".service"));
    units.next().map(str::to_owned)
}

/// Tells `reeve upgrade` why the new daemon has ended.
pub fn report(error: &dyn std::error::Error, order: &Path) {
    let mut why = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        why.push_str(&format!(": {cause}"));
        source = cause.source();
    }
    // A daemon that has taken over, and ends later, has done what was asked.
    if matches!(Order::read(order), Ok(Some(Order::Upgrade { .. })))
        && let Err(error) = Order::Failed(why).write(order)
    {
        tracing::warn!(%error, "`reeve upgrade` is not told why");
    }
}

/// `reeve reload --service`, of the unit's `ExecReload=`: starts a new daemon where `reeve upgrade`
/// ordered one, and is a reload where it did not.
#[must_use]
pub(super) fn reload_service(asking: &super::Asking) -> ExitCode {
    let path = Order::path(&asking.socket);
    let end_old_after = match Order::read(&path) {
        Ok(Some(Order::Upgrade { end_old_after })) => end_old_after,
        Ok(_) => return reload_running(asking),
        Err(source) => return failed(&UpgradeError::File { path, source }),
    };
    match start_successor(&path, end_old_after) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            if let Err(source) = Order::Failed(why.clone()).write(&path) {
                return failed(&UpgradeError::File { path, source });
            }
            failed(&UpgradeError::Failed(why))
        }
    }
}

/// Starts a new daemon as the main process was started, and waits until it has taken over.
fn start_successor(order: &Path, end_old_after: Option<u64>) -> Result<(), String> {
    if env::var_os("NOTIFY_SOCKET").is_none() {
        return Err("the unit lacks `NotifyAccess=exec`, without which systemd would not hear the new \
                    daemon and end it: install deploy/reeve.service of this release, and run `systemctl \
                    daemon-reload`"
            .to_owned());
    }
    let main = env::var("MAINPID").map_err(|_| "this is for a unit's `ExecReload=`".to_owned())?;
    let config = config_of(&main)?;
    let program =
        env::current_exe().map_err(|error| format!("the program is not found: {error}"))?;
    let mut command = Command::new(program);
    command.args(["run", "--takeover"]);
    command.arg("--config").arg(config);
    command.arg("--report").arg(order);
    if let Some(seconds) = end_old_after {
        command.arg("--end-old-after").arg(format!("{seconds}s"));
    }
    for variable in OF_THE_RELOAD {
        command.env_remove(variable);
    }
    command.envs(of_main(&main)?);
    // Its end is the end of what is read here: it has another parent.
    let (end, held) = io::pipe().map_err(|error| format!("no pipe can be made: {error}"))?;
    command.stdin(held);
    control::spawn_orphan(&mut command)
        .map_err(|error| format!("the new daemon cannot be started: {error}"))?;
    drop(command);
    wait_for(end, order)
}

/// What systemd tells the main process alone, and what counts for the one after it as well.
fn of_main(main: &str) -> Result<Vec<(OsString, OsString)>, String> {
    let variables = fs::read(format!("/proc/{main}/environ"))
        .map_err(|error| format!("the environment of process {main} cannot be read: {error}"))?;
    let variables = variables.split(|byte| *byte == 0).filter_map(|variable| {
        let equals = variable.iter().position(|byte| *byte == b'=')?;
        let (name, value) = (variable.get(..equals)?, variable.get(equals + 1..)?);
        let (name, value) = (OsStr::from_bytes(name), OsStr::from_bytes(value));
        OF_MAIN
            .map(OsStr::new)
            .contains(&name)
            .then(|| (name.to_owned(), value.to_owned()))
    });
    Ok(variables.collect())
}

/// The configuration that the unit's main process was started with.
fn config_of(main: &str) -> Result<PathBuf, String> {
    let line = fs::read(format!("/proc/{main}/cmdline"))
        .map_err(|error| format!("how process {main} was started cannot be read: {error}"))?;
    let words = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty());
    let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
    match Cli::try_parse_from(words) {
        Ok(Cli {
            command: args::Command::Run { config, .. },
        }) => Ok(config),
        _ => Err(format!(
            "process {main} is no `reeve run` that this version understands: restart the unit instead"
        )),
    }
}

/// Waits until a new daemon has said how it ended, or has ended.
fn wait_for(mut end: io::PipeReader, order: &Path) -> Result<(), String> {
    let (told, ended) = mpsc::channel();
    thread::spawn(move || {
        let _ = io::copy(&mut end, &mut io::sink());
        let _ = told.send(());
    });
    let begun = Instant::now();
    loop {
        let has_ended = ended.recv_timeout(LOOK).is_ok();
        match Order::read(order) {
            Ok(Some(Order::Done(_))) => return Ok(()),
            Ok(Some(Order::Failed(why))) => return Err(why),
            _ if has_ended => return Err("the new daemon has ended without a word".to_owned()),
            // It takes over while the order stands, and no later.
            _ if begun.elapsed() > PATIENCE => {
                let patience = PATIENCE.as_secs();
                return Err(format!("it has not taken over within {patience} s"));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_daemon_that_ends_without_a_word_has_failed() {
        let folder = tempfile::tempdir().unwrap();
        let order = folder.path().join("order");
        let upgrade = Order::Upgrade {
            end_old_after: None,
        };
        upgrade.write(&order).unwrap();
        let of_ended = || io::pipe().unwrap().0;
        let why = wait_for(of_ended(), &order).unwrap_err();
        assert!(why.contains("without a word"), "{why}");
        // What it says counts more.
        Order::Failed("no certificate".to_owned())
            .write(&order)
            .unwrap();
        assert_eq!(wait_for(of_ended(), &order).unwrap_err(), "no certificate");
        Order::Done(7).write(&order).unwrap();
        assert_eq!(wait_for(of_ended(), &order), Ok(()));
    }

    #[test]
    fn a_process_of_no_service_has_no_unit() {
        assert_eq!(unit_of(0), None);
    }
}
