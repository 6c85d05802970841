//! The main job on real input: what is mapped, and how its answers are judged.
//!
//! [`input`] makes the disks that the guests read: real genomes and reads from Debian packages
//! ([`references`]), simulated reads ([`simulate`]), as archives ([`disks`]). [`answers`] judges
//! the records that the guests wrote: against the same algorithm on the host ([`expected`]), and
//! against another program's algorithm on a sample ([`independent`]), and merges them to one file
//! ([`sam`]). None of these knows a virtual machine; all of it is deterministic, given a seed.
//!
//! [`run`] boots the guests and lets them work, watched by [`observer`]; [`report`] puts the figures
//! together.

pub mod answers;
pub mod disks;
pub mod expected;
pub mod independent;
pub mod input;
pub mod observer;
pub mod reads;
pub mod references;
pub mod report;
pub mod run;
pub mod sam;
pub mod simulate;
