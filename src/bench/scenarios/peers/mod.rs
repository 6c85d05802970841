//! A clone of a fork point beside what else one could do: start a program, restore a VM with QEMU,
//! or restore one by hand with the same crates.
//!
//! A peer is one file here that says how it starts once ([`Peer`]), and a line in [`experiments`].
//! Each repetition of a peer starts clones of ours beside it ([`beside`]), so that ratios are
//! pair by pair. A peer that this host lacks is left out by name; the others go on.

mod beside;
mod naive;
mod ours;
mod program;
mod qemu;

use std::time::Duration;

use crate::bench::chart::{self, Chart};
use crate::bench::measure::{BenchError, Experiment, Unit, Version};
use crate::bench::report::Row;
use crate::bench::setting::POOLS;
use crate::bench::{Scale, Scenario};

use beside::Beside;
use naive::{Naive, Way};
use ours::{Clones, Ours};
use program::Program;
use qemu::Restore;

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "peers",
    about: "a clone beside a program's start, a restore by QEMU, and one written by hand with the same crates",
    reading: "Until the first action. forkvm: from the spawn request on a fork point that exists. fork+exec: from the call that starts \
              /bin/echo to its first byte. qemu: from the start of QEMU with -incoming to the first byte on the guest's console. naive: from \
              before the memory is had, saved state in hand; read: the populated memory is read from the file, map-private: the \
              file is mapped. The same guest everywhere: 512 MiB of RAM, 64 MiB populated, 1 vCPU, halted when it was saved. \
              over-pooled, over-unpooled: the peer's time divided by that of a clone made right beside it.",
    experiments,
    charts,
};

/// What a clone is compared with.
trait Peer {
    /// The name of its case.
    fn name(&self) -> &'static str;

    /// Makes what each start needs. An error means that there is no such peer on this host.
    fn prepare(&mut self) -> Result<(), BenchError>;

    /// The version of the program, once it is prepared. `None` where forkvm's own says it all.
    fn version(&self) -> Option<&Version> {
        None
    }

    /// Starts one, and ends it once it has done its work. How long it took to its first action.
    fn start(&mut self) -> Result<Duration, BenchError>;
}

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let ours = Ours::default();
    let mut all: Vec<Box<dyn Experiment>> = Vec::new();
    for &pool in POOLS {
        all.push(Box::new(Clones {
            ours: ours.clone(),
            pool,
            measured: scale.pick(200, 20, 2),
        }));
    }
    let mut beside = |peer: Box<dyn Peer>, measured| {
        all.push(Box::new(Beside {
            peer,
            ours: ours.clone(),
            measured,
            done: 0,
        }));
    };
    let [many, some, few] = scale.pick([100, 40, 30], [10, 5, 3], [2, 1, 1]);
    beside(Box::new(Program), many);
    beside(Box::<Restore>::default(), few);
    for way in [Way::Read, Way::MapPrivate] {
        beside(Box::new(Naive::by(way)), some);
    }
    all
}

/// All on one axis.
fn charts(rows: &[Row]) -> Vec<Chart> {
    let times = rows.iter().filter(|row| row.unit == Unit::Us);
    let curves = times.map(|row| (row.case.clone(), row.values.as_slice()));
    vec![chart::distribution(
        "peers",
        "Until the first action: a clone and its peers",
        "time, us",
        curves,
    )]
}
