//! The rules of policies, one by one; then all of them together against something simpler.

mod documents;
mod kernel;
mod kinds;
mod nearest;
mod network_policy;
mod property;
mod room;
mod rules;
mod world;
