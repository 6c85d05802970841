//! The `forkvm` command as its users meet it: run as a program, with files, pipes and signals.

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod command_line;
mod control_socket;
mod damage;
mod demo;
mod disk_commit;
mod doctor;
mod harness;
mod image;
mod machines;
mod named;
mod names;
mod saved_machines;
mod signals;
mod terminal;
mod trace;
