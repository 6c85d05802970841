//! One vCPU: its KVM object, its thread's loop, and its state.

pub mod kick;
pub(crate) mod msrs;
mod named_pages;
mod run;
mod state;
mod sys;

pub(crate) use kick::{Kick, allow_kicks, prepare_signal};
pub(crate) use msrs::{MsrCatalogue, read_one as read_msr, restore as restore_msrs};
pub(crate) use named_pages::named_pages;
pub use run::RunError;
pub(crate) use run::{Stop, Vcpu};
pub use state::StateError;
pub(crate) use state::{
    Abilities, Clock, VcpuState, flush_tlb, reading, reading_io, writing, writing_io,
};
pub(crate) use sys::{get_xsave, set_xsave};
