//! The workloads, peers and namespaces of the configuration, as a source of them.

use std::sync::Arc;

use tokio::sync::watch;

use super::Config;
use crate::workload::{Roster, RosterSource};

/// Tells whom the configuration declares, each time that it is read again.
#[derive(Debug)]
pub struct Declared {
    rosters: watch::Sender<Arc<Roster>>,
}

// === impl Declared ===

impl Declared {
    /// Whom a configuration declares.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self {
            rosters: watch::Sender::new(Arc::new(config.roster())),
        }
    }

    /// Tells whom another configuration declares; nothing where they are the same.
    pub fn replace(&self, config: &Config) {
        let new = config.roster();
        self.rosters.send_if_modified(|roster| {
            let different = **roster != new;
            if different {
                *roster = Arc::new(new);
            }
            different
        });
    }
}

impl RosterSource for Declared {
    fn rosters(&self) -> watch::Receiver<Arc<Roster>> {
        self.rosters.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(workload: &str) -> Config {
        let text = format!(
            "trustDomain: example.org\nnamespaces: [{{name: shop}}]\n\
             workloads: [{{name: {workload}, cgroup: /w}}]\n"
        );
        Config::parse(Path::new("reeve.yaml"), &text).unwrap()
    }

    #[test]
    fn who_follows_hears_of_what_is_different_and_gets_the_newest() {
        let declared = Declared::new(&config("web"));
        let source: &dyn RosterSource = &declared;
        let mut rosters = source.rosters();
        let name = |roster: &Roster| roster.workloads[0].name.clone();
        assert_eq!(name(&rosters.borrow_and_update()), "web");
        declared.replace(&config("web"));
        assert!(!rosters.has_changed().unwrap());
        declared.replace(&config("db"));
        declared.replace(&config("queue"));
        assert!(rosters.has_changed().unwrap());
        assert_eq!(name(&rosters.borrow_and_update()), "queue");
        assert!(rosters.borrow().namespaces.0.contains_key("shop"));
        drop(declared);
        assert!(rosters.has_changed().is_err(), "there will be no other");
    }
}
