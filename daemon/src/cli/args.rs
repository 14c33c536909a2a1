//! The words of the command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use super::{CaCommand, observe::Observe};

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
SIGHUP reads the configuration again: workloads, peers and policies change at once, for other \
settings the log says that a restart is needed. Needs root.",
        after_help = "\
Examples:
  reeve run
  reeve run --config ./reeve.yaml

The log goes to standard error. Exit codes: 0 stopped in good order, 1 failed, 2 the \
configuration is wrong."
    )]
    Run {
        /// The configuration
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
    },

    /// Check a configuration and its policies, without running anything
    #[command(after_help = "\
Examples:
  reeve check --config ./reeve.yaml && systemctl reload reeve

Every mistake is printed with its file, line and field. Exit codes: 0 no mistakes, 2 mistakes.")]
    Check {
        /// The configuration
        #[arg(long, short, value_name = "FILE", default_value = DEFAULT_CONFIG)]
        config: PathBuf,
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
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The daemon's admin socket (`admin.socket` of its configuration)
        #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
        socket: PathBuf,
    },

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

    /// Remove what a stopped daemon left in the kernel: nothing is enforced any more
    #[command(
        long_about = "\
Remove what a stopped daemon left in the kernel.

reeve fails closed: its programs and maps are pinned, and go on refusing when the daemon is \
stopped. This command removes the pins, and with them all enforcement on this node. \
Stop the daemon first. Needs root.",
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
