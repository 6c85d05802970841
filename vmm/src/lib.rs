//! KVM machines of forkvm.

pub mod state_file;
