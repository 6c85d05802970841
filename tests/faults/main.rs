//! Lazy memory when something goes wrong, and when pages are given back: what a family may rely on
//! whatever its sources, its fault handler and its guests do.

#[path = "../common/mod.rs"]
mod common;

mod discard;
mod family;
mod handler_death;
mod killed;
mod mid_request;
mod model;
mod replay;
mod sources;
mod whole;
