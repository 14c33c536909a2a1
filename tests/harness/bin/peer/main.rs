//! What the tests run inside of workloads: the launcher of every program, clients and servers that
//! tell exactly what they saw, and programs that misbehave.

mod connect_rate;
mod enter;
mod flood;
mod heartbeat;
mod hog_inotify;
mod hold;
mod ping;
mod probe;
mod raw;
mod send;
mod send_calls;
mod serve;
mod udp;

use std::io;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "peer", about = "Clients and servers of reeve's tests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Become another program, in a cgroup and a network namespace
    Enter(enter::Options),
    /// Wait for the end of standard input and remove what a test process made
    Reap {
        /// The test process's name for what it made
        run: String,
    },
    /// Serve TCP connections
    Serve(serve::Options),
    /// Send data over one TCP connection and tell what came back
    Send(send::Options),
    /// Open many TCP connections at once
    Flood(flood::Options),
    /// Open, use and close TCP connections as fast as can be, and tell how fast that was
    ConnectRate(connect_rate::Options),
    /// Send datagrams that nothing answers, and tell what a call costs or when its verdict turns
    SendCalls(send_calls::Options),
    /// Answer UDP datagrams
    UdpServe(udp::ServeOptions),
    /// Send a UDP datagram and print the answer
    UdpSend(udp::SendOptions),
    /// Send a packet through a raw socket
    Raw(raw::Options),
    /// Send an ICMP echo request and wait for the reply
    Ping(ping::Options),
    /// Open, use and close TCP connections without end, and tell what became of them
    Probe(probe::Options),
    /// Hold a connection on which nothing is said, and tell when it ends
    Hold(hold::Options),
    /// Hold every inotify instance that this user may have
    HogInotify,
    /// Send a few bytes over one TCP connection again and again, and read their echo
    Heartbeat(heartbeat::Options),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Enter(options) => enter::run(&options),
        Command::Reap { run } => Ok(harness::run::reap(&run, io::stdin())?),
        Command::Serve(options) => serve::run(&options),
        Command::Send(options) => send::run(&options),
        Command::Flood(options) => flood::run(&options),
        Command::ConnectRate(options) => connect_rate::run(&options),
        Command::SendCalls(options) => send_calls::run(&options),
        Command::UdpServe(options) => udp::serve(&options),
        Command::UdpSend(options) => udp::send(&options),
        Command::Raw(options) => raw::run(&options),
        Command::Ping(options) => ping::run(&options),
        Command::Probe(options) => probe::run(&options),
        Command::HogInotify => hog_inotify::run(),
        Command::Hold(options) => hold::run(&options),
        Command::Heartbeat(options) => heartbeat::run(&options),
    }
}
