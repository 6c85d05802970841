//! Forks of live guests on KVM: what a parent, its clones and its host may rely on.

#[path = "../common/mod.rs"]
mod common;

mod disks;
mod ends;
mod fork_call;
mod fork_matrix;
mod held;
mod hostile_guest;
mod limits;
mod lineage;
mod memory_use;
mod pool;
mod pool_limits;
mod registers;
mod several_vcpus_ring_at_once;
mod state_size;
