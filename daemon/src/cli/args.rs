//! The words of the command line.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};

use super::{
    CaCommand, PolicyCommand, certs::Certs, explain::Explain, observe::Observe, upgrade::Upgrade,
    wait::Wait,
};

pub(super) const DEFAULT_CONFIG: &str = "/etc/reeve/reeve.yaml";
pub(super) const DEFAULT_SOCKET: &str = "/run/reeve/admin.sock";

const AFTER_HELP: &str = "\
Start with a configuration that names the workloads of this node:

  reeve check --config /etc/reeve/reeve.yaml
  reeve run --config /etc/reeve/reeve.yaml
  reeve status

Exit codes:
  0  done
  1  failed: the message says at what, and what to do
  2  the command line or a file is wrong: the same again will fail again";

/// Default-deny policy in the kernel and transparent mutual TLS between workloads
#[derive(Debug, Parser)]
#[command(
    name = "reeve",
    version,
    after_help = AFTER_HELP,
    long_about = "\
Default-deny policy in the kernel and transparent mutual TLS between workloads, \
one daemon per Linux node.

A workload is a cgroup. Once it is enrolled, it may talk to nobody, and nobody to it, \
but where a policy says so; what is allowed between two enrolled workloads travels through \
mutual TLS, without the applications knowing."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Enforce the policies on this node, until SIGTERM or SIGINT
    #[command(
        long_about = "\
Enforce the policies on this node, until SIGTERM or SIGINT.

The first signal lets open connections end within `timeouts.drain`; a second one ends them. \
What is pinned in the kernel goes on refusing after that; `reeve detach` removes it. \
SIGHUP reads everything again, as `reeve reload` does: workloads, peers, policies, trust and \
certificates change at once, for other \
settings the log says that a restart is needed. Needs root.

With --takeover it takes over from the daemon that runs, if one does: both run until this one is \
ready, then listeners, the metrics endpoint and the admin socket change hands without losing a \
connection. The old daemon serves its open connections until the last one has ended, or for \
`timeouts.handOver` where that is set; --end-old-after ends those of all old daemons after a time. \
Where versions do not fit, or this one does not become ready, it exits and the old one goes on. \
A daemon that is a service of systemd does not hand over to one outside of its unit: \
`reeve upgrade` starts one inside.",
        after_help = "\
Examples:
  reeve run
  reeve run --config ./reeve.yaml
  reeve run --takeover
  reeve run --takeover --end-old-after 1h

The log goes to standard error. Exit codes: 0 stopped in good order, 1 failed, 2 the \
configuration is wrong."
    )]
    Run {
        /// The configuration
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
        /// Take over from the daemon that runs, without breaking a connection
        #[arg(long)]
        takeover: bool,
        /// End the connections of all old daemons after this time, as in 90s, 1h or 0s
        #[arg(
            long,
            value_name = "DURATION",
            requires = "takeover",
            value_parser = humantime::parse_duration
        )]
        end_old_after: Option<Duration>,
        /// Where to write how the takeover ended, for `reeve upgrade`
        #[arg(long, value_name = "FILE", requires = "takeover", hide = true)]
        report: Option<PathBuf>,
    },

    /// Refuse everything to the workloads until `reeve run` knows them: for boot
    #[command(
        long_about = "\
Refuse everything but loopback to the enforced parents and the workloads of a configuration, until \
`reeve run` knows what they may do. Runs once, and early: before what starts workloads, and without \
certificates, policies or a network.

The programs are attached and pinned, and the enforced parents are made where they are not there, so \
that a cgroup below one is refused from its birth. Nothing is taken back: what the kernel holds \
of a cgroup already stays, so that a guard does no harm while a daemon runs. Where systemd runs, an \
enforced parent that is a slice is started, since systemd keeps the cgroups of started slices alone. \
What cannot be refused before `reeve run` is named on standard error, and the exit code says so: an \
enforced parent that cannot be made, or that goes with the unit that it belongs to, and a workload whose \
cgroup does not exist yet and lies below no enforced parent. Needs root.",
        after_help = "\
Examples:
  reeve guard
  reeve guard --config ./reeve.yaml && systemctl start workloads.target

In a boot-time unit: Type=oneshot, RemainAfterExit=yes, ExecStart=/usr/local/bin/reeve guard, \
DefaultDependencies=no, After=sys-fs-bpf.mount and Before= whatever starts workloads.

Exit codes: 0 all of it is refused; 1 the kernel refused, or an enforced parent does not hold, or something \
is declared outside of `node.cgroupRoot`; 2 the \
configuration is wrong; 3 a workload is open until `reeve run` has found it. What can be refused is \
refused in the last case too, and what was enforced before stays so in every case."
    )]
    Guard {
        /// The configuration; its policies are not read
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },

    /// Check a configuration and its policies, without running anything
    #[command(after_help = "\
Examples:
  reeve check --config ./reeve.yaml && systemctl reload reeve
  reeve check --elsewhere --config ./node-b/reeve.yaml

Every mistake is printed with its file, line and field. Where a daemon runs, settings that it takes by a \
restart only are named if they have changed. A unit that this machine's systemd does not know is a mistake. Exit codes: 0 no mistakes, 2 mistakes.")]
    Check {
        /// The configuration
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
        /// It is for another machine: do not ask this one's systemd, daemon or kernel
        #[arg(long)]
        elsewhere: bool,
    },

    /// Show how the daemon on this node is
    #[command(
        long_about = "\
Show how the daemon on this node is: whether it is ready and what is missing, workloads with \
their namespaces and certificates, tunnels, policies, and how full the kernel's maps are.",
        after_help = "\
Examples:
  reeve status
  reeve status --json | jq '.workloads[] | select(.listening | not)'

Exit codes: 0 the daemon answered, ready or not; 1 it did not."
    )]
    Status(Asking),

    /// Wait until the daemon knows the caller's workload: for units that connect as soon as they start
    #[command(
        long_about = "\
Wait until the daemon has enrolled the workload to which the caller's cgroup belongs, listens for it, and has a \
certificate for it.

Most units may connect as soon as they start. Those in a network namespace of their own have no listeners until the \
daemon has seen it, and a SPIFFE agent is asked for a certificate once there is a process. As an `ExecStartPre=` of \
the unit, this has its other processes start when all of that is there. The `+` is for units with a `User=`: the \
daemon answers root alone.",
        after_help = "\
Examples:
  reeve wait
  reeve wait --timeout 5s

In a unit: ExecStartPre=+/usr/local/bin/reeve wait

Exit codes: 0 the workload can connect; 1 it cannot, and the message says what is missing."
    )]
    Wait(Wait),

    /// Show this node's certificates, or check any other
    #[command(
        long_about = "\
Show the certificates of this node's workloads: where each comes from, who signed it, how long it \
is valid, when it is renewed, and how the last attempt ended.",
        after_help = "\
Examples:
  reeve certs
  reeve certs --json | jq '.certificates[] | select(.secondsLeft < 600)'
  reeve certs inspect 10.0.0.7:15008 --bundle ./bundle.pem

Exit codes: 0 the daemon answered, whatever it said; 1 it did not."
    )]
    Certs(Box<Certs>),

    /// Have the daemon read everything again: configuration, policies, trust, certificates
    #[command(
        long_about = "\
Have the daemon read everything again: configuration, policies, trust bundles, revocation lists, \
and every workload's certificate from its source, as SIGHUP does.

What is refused is not taken, not even in part, and is told here with the reason. Some settings need a restart: \
a reload leaves them as they are and says so, or is refused where the rest of the file depends on them. Files \
that change are noticed by themselves; this is for the impatient and for scripts that need to know.",
        after_help = "\
Examples:
  reeve reload
  reeve check && reeve reload
  reeve reload --json | jq '.parts[] | select(.refused != [])'

Exit codes: 0 all was read, 1 something was refused or no daemon answers."
    )]
    Reload {
        /// Whom to ask
        #[command(flatten)]
        asking: Asking,
        /// For the unit's `ExecReload=`: carry out `reeve upgrade`, where it was asked for
        #[arg(long)]
        service: bool,
    },

    /// Put the installed reeve in the place of the daemon that runs, without breaking a connection
    #[command(
        long_about = "\
Put the installed reeve in the place of the daemon that runs, without breaking a connection.

For a daemon that is a service of systemd: has systemd reload its unit, whose `ExecReload=` starts the \
new daemon inside of the unit. It takes over as `reeve run --takeover` does, with the configuration that \
the old one was started with, and becomes the unit's main process; the watchdog goes on throughout. \
The old daemon serves its open connections until the last one has ended, or for `timeouts.handOver` \
where that is set. `reeve status` shows old daemons; --end-old-after ends the connections of all of \
them after a time, as where they have a known hole. Where the new one does not fit or \
does not become ready, it ends, the reason is told here, and the old one goes on. Needs root.",
        after_help = "\
Examples:
  install -m 755 bin/reeve /usr/local/bin/reeve && reeve upgrade
  reeve upgrade && reeve status
  reeve upgrade --end-old-after 1h

Exit codes: 0 the new daemon has taken over; 1 it has not, and nothing has changed."
    )]
    Upgrade(Upgrade),

    /// Make, renew, revoke and show the certificates of the embedded CA
    #[command(
        long_about = "\
Make, renew, revoke and show the certificates of the embedded CA.

Works on the CA's folder, with or without a daemon that uses it; the daemon notices what is done. \
docs/certificates.md shows how a fleet is set up and kept with it.",
        after_help = "\
Examples:
  reeve ca init --trust-domain example.org --dir ./root
  reeve ca show

Exit codes: 0 done, 1 failed, 2 the command line is wrong."
    )]
    Ca {
        /// What to do.
        #[command(subcommand)]
        command: CaCommand,
    },

    /// Show what happens to connections: who was refused, by which rule, and why
    #[command(
        long_about = "\
Show what happens to connections: which were allowed or refused, opened and closed, with both \
identities, the reason, and the rule with its file and line.

Filters may be given several times: of each kind one has to fit. On a terminal it goes on until \
it is ended; in a pipe, or with `--last`, it shows what the daemon has kept \
(`admin.recentEvents`) and ends. Where events were lost, a line says how many.",
        after_help = "\
Examples:
  reeve observe
  reeve observe --verdict deny --workload web
  reeve observe --since 10m --port 5432
  reeve observe --last 20 --verdict deny --json | jq -r .reason
  reeve observe --follow --json --peer 10.0.0.0/8

Exit codes: 0 all was shown, or the reader has gone; 1 no daemon answers, or it ended."
    )]
    Observe(Box<Observe>),

    /// Say what becomes of a connection, by which rule, or which rules came nearest
    #[command(
        long_about = "\
Say what becomes of a connection: the verdict of the source's egress and of the destination's \
ingress, as far as they are workloads of this node, the rule that gave it with its file and line, \
or \"no policy allows it\" with the rules that came nearest and what of them did not fit.

Asks the running daemon, and compares what it says with what the kernel's maps hold. With \
`--config`, it answers from the files alone.",
        after_help = "\
Examples:
  reeve explain --from web --to db --port 5432
  reeve explain --from spiffe://example.org/ns/shop/sa/web --to db --port 5432 --json
  reeve explain --from 10.0.0.7 --to web --port 80 --plaintext
  reeve explain --from web --to 1.1.1.1 --port 53 --protocol udp --config ./reeve.yaml

Exit codes: 0 allowed; 1 denied; 2 nothing could be said; 3 the kernel holds something else."
    )]
    Explain(Box<Explain>),

    /// Test policies, list those in force, and find what is probably not meant
    #[command(
        long_about = "\
Test policies, without a daemon and without root: do they allow and refuse what their tests \
expect? List those in force, and find what is not wrong and probably not meant.",
        after_help = "\
Examples:
  reeve policy test tests/*.yaml
  reeve policy test --format junit tests/shop.yaml > junit.xml
  reeve policy list
  reeve policy lint --config ./reeve.yaml

Exit codes: `reeve policy COMMAND --help` says them."
    )]
    Policy {
        /// What to do.
        #[command(subcommand)]
        command: PolicyCommand,
    },

    /// Remove what a stopped daemon left in the kernel: nothing is enforced any more
    #[command(
        long_about = "\
Remove what a stopped daemon left in the kernel.

reeve fails closed: its programs and maps are pinned, and go on refusing when the daemon is \
stopped. This command removes the pins, and with them all enforcement on this node; then the \
routing rule and table that reeve made in the workloads' network namespaces, and the cgroup that it \
made for itself. Each is named. The kernel settings tcp_fwmark_accept and fwmark_reflect of those \
namespaces stay on, since others may use them. Stop the daemon first. Needs root.",
        after_help = "\
Examples:
  systemctl stop reeve && reeve detach

Exit codes: 0 nothing of reeve is left, 1 something could not be removed."
    )]
    Detach {
        /// The configuration, for `node.bpffs` and `admin.socket`
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },

    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  reeve completions bash > /etc/bash_completion.d/reeve
  reeve completions zsh > /usr/share/zsh/site-functions/_reeve")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },

    /// Print the manual page of a command, or write those of all commands
    #[command(after_help = "\
Examples:
  reeve man run | man -l -
  reeve man ca issue > reeve-ca-issue.1
  reeve man --folder /usr/local/share/man/man1")]
    Man {
        /// The command, as in `ca issue`; reeve itself if not given
        #[arg(value_name = "COMMAND")]
        command: Vec<String>,
        /// Write the pages of all commands into this folder, which is there
        #[arg(long, value_name = "FOLDER", conflicts_with = "command")]
        folder: Option<PathBuf>,
    },
}

/// Whom to ask, and how the answer is to look.
#[derive(Debug, Args)]
pub struct Asking {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
    /// The daemon's admin socket (`admin.socket` of its configuration)
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub(super) socket: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string);
            assert!(
                help.is_some_and(|help| help.contains("Examples:")),
                "{}",
                command.get_name()
            );
        }
    }
}
