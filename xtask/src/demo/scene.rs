//! What the demo plays on: two nodes with a daemon each, a shop's workloads, and a stranger.

use std::sync::Arc;

use harness::{Cgroup, Daemon, Network, Nginx, Node, Place, Workload};

use super::stage::Stage;

/// The trust domain of both nodes.
pub(crate) const TRUST_DOMAIN: &str = "shop.example";

/// What only `cart` may read.
pub(crate) const SECRET: &str = "The ledger holds 42 gold pieces.";

/// Both nodes get the same policies, as they would from one repository.
pub(crate) const POLICIES: &str = include_str!("policies.yaml");

/// Everything on stage. The order of the fields is the order in which it is struck.
pub(crate) struct Scene {
    pub(crate) ledger_server: Nginx,
    pub(crate) vault_server: Nginx,
    pub(crate) alpha_daemon: Daemon,
    pub(crate) beta_daemon: Daemon,
    /// On alpha: may call `ledger`.
    pub(crate) cart: Workload,
    /// On alpha: thinks that it may call `ledger`.
    pub(crate) report: Workload,
    /// On beta: nginx with the secret, for `cart` only.
    pub(crate) ledger: Workload,
    /// On beta: nginx that nobody may call.
    pub(crate) vault: Workload,
    /// On the same network, known to nobody.
    pub(crate) stranger: Workload,
    /// In cart's network namespace, in no cgroup that anybody knows.
    pub(crate) impostor: Place,
    pub(crate) network: Network,
    _nodes: [Node; 3],
}

impl Scene {
    /// Sets it all up.
    pub(crate) fn set(stage: &mut Stage) -> Self {
        stage.act(
            "The stage",
            "Two nodes, alpha and beta, with one reeve each. Every workload is a cgroup with a \
             network namespace of its own, as a pod is. cart and report run on alpha; ledger and \
             vault, both real nginx, on beta. A stranger has found its way onto the same network.",
        );
        let network = Network::new();
        let alpha = Node::new(&network, "alpha");
        let beta = Node::new(&network, "beta");
        let nowhere = Node::new(&network, "nowhere");
        let (cart, report) = (alpha.pod("cart"), alpha.pod("report"));
        let (ledger, vault) = (beta.pod("ledger"), beta.pod("vault"));
        let stranger = nowhere.pod("stranger");

        let ledger_server = Nginx::start(&ledger, 80, SECRET);
        let vault_server = Nginx::start(&vault, 80, "You should not read this.");
        let domain = serde_json::json!(TRUST_DOMAIN);
        let alpha_daemon = alpha
            .reeve()
            .set("/trustDomain", domain.clone())
            .enrol(&cart)
            .enrol(&report)
            .peer(&ledger)
            .peer(&vault)
            .policy(POLICIES)
            .start();
        let beta_daemon = beta
            .reeve()
            .set("/trustDomain", domain)
            .enrol(&ledger)
            .enrol(&vault)
            .peer(&cart)
            .peer(&report)
            .policy(POLICIES)
            .start();

        for (workload, node) in [
            (&cart, "alpha"),
            (&report, "alpha"),
            (&ledger, "beta"),
            (&vault, "beta"),
        ] {
            stage.output(&format!(
                "{:<8} on {node:<5}  {:<11} {}",
                workload.name(),
                workload.addresses().v4,
                workload.spiffe_id(TRUST_DOMAIN)
            ));
        }
        stage.output(&format!(
            "stranger           {:<11} no identity at all",
            stranger.addresses().v4
        ));
        println!();
        stage.say("The policies, the same on both nodes; whatever they do not name is refused:");
        stage.output(POLICIES);
        Self {
            ledger_server,
            vault_server,
            alpha_daemon,
            beta_daemon,
            report,
            ledger,
            vault,
            impostor: cart.with_cgroup(Arc::new(Cgroup::outside("impostor"))),
            cart,
            stranger,
            network,
            _nodes: [alpha, beta, nowhere],
        }
    }
}
