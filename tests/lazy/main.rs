//! Lazy memory of whole guests: clones that fetch their pages while their parent runs on and writes,
//! or has ended.

#[path = "../common/mod.rs"]
mod common;

mod choice;
mod depth;
mod feeders;
mod fetched;
mod holes;
mod mid_fault;
mod pause;
mod populating;
mod room;
mod torn;
