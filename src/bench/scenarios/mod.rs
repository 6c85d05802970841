//! The scenarios. Each is a file here and a line in [`SCENARIOS`].

mod calls;
mod depth;
mod fanout;
mod fault;
mod fork;
mod instantiate;
mod memory;
mod overhead;
mod pause;
mod peers;
mod rewind;

use super::Scenario;

/// Every scenario, in the order in which `all` runs them.
pub const SCENARIOS: &[&Scenario] = &[
    &calls::SCENARIO,
    &instantiate::SCENARIO,
    &peers::SCENARIO,
    &fork::SCENARIO,
    &fanout::SCENARIO,
    &pause::SCENARIO,
    &fault::SCENARIO,
    &rewind::SCENARIO,
    &memory::SCENARIO,
    &depth::SCENARIO,
    &overhead::SCENARIO,
];
