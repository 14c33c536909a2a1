//! What the programs on a cgroup cost a process below it that is not enrolled.

use super::{
    measure::{connect_rate, number, throughput},
    report::Report,
    scene::Scene,
};

/// Measures over loopback, with the programs attached above the process and without.
pub(crate) fn measure(scene: &Scene, seconds: u32, report: &mut Report) {
    for (hooks, place, ports) in scene.bystanders.each() {
        let rate = connect_rate(place, "127.0.0.1", ports.answer, seconds);
        report.add_hooks(
            "hooks_connections_per_second",
            hooks,
            number(&rate["per_second"]),
        );
        let throughput = throughput(place, "127.0.0.1", ports.bulk, seconds);
        report.add_hooks("hooks_bulk_gbit_per_second", hooks, throughput);
    }
}
