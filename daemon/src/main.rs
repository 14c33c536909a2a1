//! The `reeve` binary: the command line, and how the daemon is put together.

use std::{
    collections::HashSet,
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use clap::Parser;
use reeve::{
    cli::{self, Cli, Command},
    config::{Config, Declared},
    control::{self, Control, Daemon, Endpoints, Looks, Parts, RunError, StandIn},
    datapath::Datapath,
    handover::{self, Inherited},
    policy::Snapshot,
    telemetry::{self, ConnectionLog, Events, Health, Metrics, Observers, Readiness, Told},
    tunnel::{Shared, Tunnels},
    workload::{Registry, RosterSource},
};
use tokio::{runtime::Builder, sync::watch};

/// Threads of the control work: one that decides, and one that answers meanwhile.
const CONTROL_THREADS: usize = 2;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Run {
            config,
            takeover,
            end_old_after,
            report,
        } => match run(&config, takeover, end_old_after, report.clone()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                cli::print_error(&error);
                if let Some(report) = report {
                    cli::report(&error, &report);
                }
                if !nix::unistd::geteuid().is_root() {
                    eprintln!("  this user is not root, whom `reeve run` needs to be");
                }
                ExitCode::from(error.exit_code())
            }
        },
        Command::Guard { config } => cli::guard(&config),
        Command::Check { config, elsewhere } => cli::check(&config, elsewhere),
        Command::Reload { asking, service } => cli::reload(&asking, service),
        Command::Upgrade(words) => cli::upgrade(&words),
        Command::Status(asking) => cli::status(&asking),
        Command::Wait(words) => cli::wait(&words),
        Command::Ca { command } => cli::ca(&command),
        Command::Certs(words) => cli::certs(&words),
        Command::Observe(words) => cli::observe(&words),
        Command::Explain(words) => cli::explain(&words),
        Command::Policy { command } => cli::policy(&command),
        Command::Detach { config } => cli::detach(&config),
        Command::Completions { shell } => cli::completions(shell),
        Command::Man { command, folder } => cli::man(&command, folder.as_deref()),
    }
}

/// Runs the daemon until a signal ends it, or another one takes over.
fn run(
    file: &Path,
    takeover: bool,
    end_old_after: Option<Duration>,
    report: Option<PathBuf>,
) -> Result<(), RunError> {
    let kept = handover::from_service_manager();
    let config = Arc::new(Config::load(file)?);
    let looks = Looks::at(&config);
    let policies = control::policies(&config, &config.roster())?;
    telemetry::start_logging(&config.log)?;
    control::prepare_process();
    // Before there is a second thread, and before anything is given up that it takes.
    let cgroups = control::open_cgroups(&config)?;
    let own_cgroups = control::settle_in(&cgroups, &config)?;
    config.sandbox.enter_process()?;
    let stand_in = StandIn::start(config.sandbox).map_err(RunError::StandIn)?;
    let runtime = Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .thread_name("control")
        .enable_all()
        .build()
        .map_err(RunError::Runtime)?;
    runtime.block_on(async {
        // Sockets of the daemon before: its own, where it hands over, or those that were kept.
        let asked = match takeover {
            true => handover::ask(
                &config.admin.socket,
                config.ports,
                &own_cgroups,
                config.sandbox,
            )?,
            false => None,
        };
        let (takeover, sockets) = asked.map_or((None, kept), |(takeover, sockets)| {
            (Some(takeover), sockets)
        });
        let mut inherited = Inherited::sort(sockets, &config);

        // What tells others comes first: a second daemon fails here, before it touches the kernel.
        let metrics = Metrics::new(config.metrics.rules as usize);
        let (readiness, ready) = watch::channel(Readiness::starting());
        let (health, healthy) = watch::channel(Health::starting());
        let told = Told {
            readiness: ready,
            health: healthy,
        };
        let mut endpoints = Endpoints::bind(&config, &mut inherited, metrics.clone(), told)?;

        // The kernel goes on with what is pinned until control has read everything.
        let settings = control::datapath_settings(&config, &cgroups, takeover.as_ref());
        let datapath = Arc::new(Datapath::load(settings)?);
        // Maps of another layout than those of the daemon before know none of its sockets.
        let is_beside = takeover.as_ref().is_some_and(|before| before.offer.beside);
        let listeners = inherited.listeners.values().flatten();
        for listener in listeners.filter(|_| is_beside) {
            if let Err(error) = datapath.adopt_listener(listener.as_fd()) {
                tracing::warn!(%error, "a listener of the daemon before stays unknown to the programs");
            }
        }
        let config = Arc::new(control::give_ids(Config::clone(&config), &datapath)?);
        let declared = Declared::new(&config);
        let rosters = declared.rosters();
        let declaration = control::declaration(&config, &rosters.borrow());
        let registry = Registry::start(cgroups.clone(), declaration, datapath.local_addresses())?;

        // Identities and tunnels: nothing listens before control says where.
        let identities = Arc::new(control::identity_store(&config)?);
        let federation = control::federation(&config, identities.clone())?;
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let observers = Observers::new(config.admin.recent_events as usize);
        let log = ConnectionLog::new(metrics.clone(), observers.clone())
            .with_lines_per_second(config.log.connections_per_second);
        let shared = Shared {
            snapshot: snapshot.clone(),
            identities: identities.clone(),
            storage: datapath.clone(),
            metrics: metrics.clone(),
            log: log.clone(),
            proofs: true,
        };
        let tunnels = Tunnels::start(
            shared,
            &config.limits,
            &config.timeouts,
            config.ports,
            config.congestion_control,
            config.sandbox,
        )?;
        let listening: HashSet<u64> = inherited.listeners.keys().copied().collect();
        if takeover.is_some() || !listening.is_empty() {
            tunnels.inherit(inherited.listeners);
        }

        let events = (datapath.events()?, Events::new(metrics.clone(), log));
        if let Some(lines) = datapath.debug_log()? {
            tokio::spawn(lines);
        }

        // Control decides, and the daemon answers for all of them.
        let daemon = Daemon::new(
            config,
            datapath,
            identities,
            federation,
            tunnels,
            metrics.clone(),
            snapshot.clone(),
            observers,
            registry.remarks(),
        );
        let daemon = Arc::new(daemon);
        let read = daemon.clone();
        metrics.read_from(move || read.readings());
        if takeover.is_none() {
            endpoints.serve(&daemon)?;
        }
        let parts = Parts {
            snapshot,
            cgroups,
            own_cgroups,
            declared,
            rosters,
            registry,
            policies,
            looks,
            readiness,
            health,
            events,
            endpoints,
            takeover,
            stand_in,
            report,
            end_old_after,
            inherited: listening,
        };
        Control::new(daemon, parts).run().await
    })
}
