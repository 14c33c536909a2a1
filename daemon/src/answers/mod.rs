//! Answers about policies: what becomes of a connection and why, whether policies do what their
//! users' tests expect, what is in force, and what is probably not meant.
//!
//! In: a [`Snapshot`](crate::policy::Snapshot), of the running daemon or compiled from files.
//! Out: what `reeve explain` and `reeve policy` print. Every verdict is asked of the snapshot that
//! the kernel's tables and the tunnel's verdicts come from, so what is explained is what happens.

mod cases;
mod ends;
mod explain;
mod lint;
mod list;
mod offline;

pub use cases::{Expected, Outcome, run as run_cases};
pub use explain::{
    Enquiry, Explanation, Half, Kernel, KernelVerdict, LastFailure, NearRule, Verdict, explain,
};
pub use lint::{Finding, FindingKind, lint};
pub use list::{PolicyRow, RuleRow, list};
pub use offline::Offline;
