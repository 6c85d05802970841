//! Where clones live: in the engine's process or in workers. What every spawner has to do, and what
//! only processes can suffer.

#[path = "../common/mod.rs"]
mod common;

mod crashes;
mod engine_killed;
mod kit;
mod memory_pressure;
mod mid_fault;
mod own_steps;
mod pool;
mod refusals;
mod spread;
mod test_worker;
mod thousand;
