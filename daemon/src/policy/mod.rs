//! Who may talk: policies, compiled once into what both the kernel and the tunnel execute.
//!
//! In: workloads, peers and policy documents. Out: a [`Snapshot`] that judges connections, and
//! [`KernelTables`] that hold the same verdicts for the kernel.
//!
//! Documents of every kind become rules of one form (`document`, `lower`, `rule`). Compiling
//! (`compile`) gives each far end the set of the rules' selectors that match it (`far_ends`); a
//! *class* is a number for the sets that stand in the same rules. What the rules say for a set (`verdicts`) answers the
//! snapshot's questions and fills the kernel's tables (`tables`).

mod compile;
mod document;
mod far_ends;
mod identities;
mod implicit;
mod load;
mod lower;
mod named_ports;
mod narrowed;
mod nearest;
mod number;
mod parts;
mod population;
mod rule;
mod selector;
mod sets;
mod snapshot;
mod tables;
mod verdicts;

#[cfg(test)]
mod tests;

pub(crate) use nearest::Ports;
pub(crate) use rule::{Effect, FarEnd, Mode, PortMatch, Rule};

pub use load::{Head, Known, PolicySet, PolicySources};
pub use nearest::{Misfit, Near, Part, Question};
pub use rule::Unselected;
pub use snapshot::{Decision, Inputs, KernelTables, RulePlace, Snapshot};
