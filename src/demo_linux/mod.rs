//! The demo of Linux machines: a program of Debian's on input of Debian's, in clones of a machine that was booted once.
//!
//! ClustalW aligns protein sequences, one share of them in each clone. [`input`] takes program and sequences from the host and
//! aligns the same shares there; [`disk`] puts them on an ext4 disk; [`run`] makes the template, forks it and has the clones
//! work; [`report`] puts the figures together.

pub mod disk;
pub mod input;
pub mod report;
pub mod run;
