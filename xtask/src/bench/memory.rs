//! Resident memory of the daemons.

use std::{fs, thread, time::Duration};

use super::{
    report::Report,
    scene::{Scene, Way},
};

/// Connections that are held open.
const CONNECTIONS: u32 = 1000;

/// For memory to become what it stays at.
const SETTLE: Duration = Duration::from_secs(2);

/// Before any load.
pub(crate) fn idle(scene: &Scene, report: &mut Report) {
    thread::sleep(SETTLE);
    for (name, daemon) in scene.daemons() {
        report.note(
            &format!("resident_idle_mb_of_{name}_daemon"),
            resident(daemon.id()) / 1e6,
        );
    }
}

/// What each connection that does nothing takes. Measured before any load, after which the
/// allocator would have memory to give that counts as resident already.
pub(crate) fn connections(scene: &Scene, report: &mut Report) {
    let (server, ports) = scene.server(Way::Tunnel);
    let address = format!("{server}:{}", ports.echo);
    let flood = |count: u32| {
        let mut flood = scene.client(Way::Tunnel).spawn_peer([
            "flood",
            &address,
            "--connections",
            &count.to_string(),
            "--hold",
            "60",
        ]);
        flood.wait_for("open");
        thread::sleep(SETTLE);
        flood
    };
    // What the first connection makes for all that follow is not theirs.
    drop(flood(1));
    thread::sleep(SETTLE);
    let before = scene.daemons().map(|(_, daemon)| resident(daemon.id()));
    let held = flood(CONNECTIONS);
    for ((name, daemon), before) in scene.daemons().into_iter().zip(before) {
        let grown = resident(daemon.id()) - before;
        report.note(
            &format!("resident_kib_per_idle_connection_of_{name}_daemon"),
            grown / f64::from(CONNECTIONS) / 1024.0,
        );
    }
    drop(held);
}

/// What stays after all load.
pub(crate) fn after(scene: &Scene, report: &mut Report) {
    thread::sleep(SETTLE);
    for (name, daemon) in scene.daemons() {
        report.note(
            &format!("resident_after_load_mb_of_{name}_daemon"),
            resident(daemon.id()) / 1e6,
        );
    }
}

/// Resident memory of a process in bytes.
pub(crate) fn resident(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let kibibytes = status.lines().find_map(|line| {
        line.strip_prefix("VmRSS:")?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse::<f64>()
            .ok()
    });
    kibibytes.map_or(f64::NAN, |kibibytes| kibibytes * 1024.0)
}
