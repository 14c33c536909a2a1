//! A real load balancer.

use std::{ffi::OsStr, fmt::Write as _, fs, net::SocketAddr};

use crate::{Place, Process, eventually, run::Run};

/// A running HAProxy, until it is dropped.
#[derive(Debug)]
pub struct HaProxy {
    _process: Process,
}

impl HaProxy {
    /// Starts one that passes each request at a port of loopback to the next of these, and tries
    /// another one where a connection is not made: no checks, as many distributions' examples have it.
    #[must_use]
    pub fn balance(place: &Place, port: u16, among: &[SocketAddr]) -> Self {
        let folder = place.folder().join(Run::this().unique("haproxy"));
        fs::create_dir(&folder).expect("making a folder for HAProxy");
        let mut settings = format!(
            "global\n  maxconn 100\ndefaults\n  mode http\n  timeout connect 5s\n  timeout client 10s\n  \
             timeout server 10s\n  retries 3\n  option redispatch 1\n  option http-server-close\n\
             listen near\n  bind 127.0.0.1:{port}\n  balance roundrobin\n"
        );
        for (number, server) in among.iter().enumerate() {
            let _ = writeln!(settings, "  server far{number} {server}");
        }
        let file = folder.join("haproxy.cfg");
        fs::write(&file, settings).expect("writing HAProxy's settings");
        let mut process = place.spawn([
            OsStr::new("haproxy"),
            OsStr::new("-db"),
            OsStr::new("-f"),
            file.as_os_str(),
        ]);
        eventually("HAProxy listens", || {
            assert!(
                process.ended().is_none(),
                "HAProxy ended: {}",
                process.stderr()
            );
            let ask = [
                "curl",
                "--silent",
                "--output",
                "/dev/null",
                &format!("http://127.0.0.1:{port}/"),
            ];
            place.exec(ask).status.success()
        });
        Self { _process: process }
    }
}
