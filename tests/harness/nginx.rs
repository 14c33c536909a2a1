//! A real web server, which can balance between others.

use std::{ffi::OsStr, fmt::Write as _, fs, net::SocketAddr, path::PathBuf};

use crate::{Place, Process, eventually, run::Run};

/// A running nginx that serves one page.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    folder: PathBuf,
}

impl Nginx {
    /// Starts it on a port of all addresses; every path answers with the page.
    #[must_use]
    pub fn start(place: &Place, port: u16, page: &str) -> Self {
        Self::with_log(place, port, page, "access.log")
    }

    /// The same, but no request is logged: a bench should not measure that.
    #[must_use]
    pub fn start_without_log(place: &Place, port: u16, page: &str) -> Self {
        Self::with_log(place, port, page, "off")
    }

    /// Starts one that passes each request to the next of these, with nginx's own defaults for those
    /// that fail.
    #[must_use]
    pub fn balance(place: &Place, port: u16, among: &[SocketAddr]) -> Self {
        let mut servers = String::new();
        for server in among {
            let _ = write!(servers, "server {server}; ");
        }
        let upstream = format!("upstream far {{ {servers}}}");
        Self::with(place, port, &upstream, "proxy_pass http://far;", "off")
    }

    fn with_log(place: &Place, port: u16, page: &str, log: &str) -> Self {
        let page: String = page.chars().flat_map(char::escape_default).collect();
        let answer = format!("return 200 \"{page}\";");
        Self::with(place, port, "", &answer, log)
    }

    fn with(place: &Place, port: u16, before: &str, answer: &str, log: &str) -> Self {
        let folder = place.folder().join(Run::this().unique("nginx"));
        fs::create_dir(&folder).expect("making a folder for nginx");
        let settings = format!(
            "daemon off;\nuser root;\nworker_processes 1;\npid nginx.pid;\nerror_log error.log;\n\
             events {{ worker_connections 8192; }}\n\
             http {{\n  access_log {log};\n  keepalive_requests 1000000000;\n\
             client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;\n\
             uwsgi_temp_path uwsgi; scgi_temp_path scgi;\n  {before}\n\
             server {{\n    listen {port} backlog=4096;\n    listen [::]:{port} backlog=4096;\n    \
             default_type text/plain;\n    location / {{ {answer} }}\n  }}\n}}\n"
        );
        fs::write(folder.join("nginx.conf"), settings).expect("writing nginx's settings");
        let mut process = place.spawn([
            OsStr::new("nginx"),
            OsStr::new("-p"),
            folder.as_os_str(),
            OsStr::new("-c"),
            OsStr::new("nginx.conf"),
            // Until it has read its settings it would log to a folder of the machine.
            OsStr::new("-e"),
            OsStr::new("error.log"),
        ]);
        eventually("nginx runs", || {
            assert!(
                process.ended().is_none(),
                "nginx ended: {}",
                process.stderr()
            );
            fs::metadata(folder.join("nginx.pid")).is_ok_and(|file| file.len() > 0)
        });
        Self { process, folder }
    }

    /// The requests that it has answered, one line each, the client's address first.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        let log = fs::read_to_string(self.folder.join("access.log")).expect("reading nginx's log");
        log.lines().map(str::to_owned).collect()
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }
}
