//! Every KVM and memory call of a clone's path, alone: the floor under everything else.

mod host;
mod kick;
mod machine;
mod own_pages;

use crate::bench::measure::Experiment;
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "calls",
    about: "each KVM and memory call of a clone's path, alone: what the floor is",
    reading: "One call, from before it to its return, on a VM that is made for the repetition. Nothing of forkvm's engine runs but in \
              kick-to-barrier: from the request until all 16 spinning vCPUs stand at the pause barrier.",
    experiments,
    charts: |_| Vec::new(),
};

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let measured = scale.pick(200, 30, 3);
    vec![
        Box::new(machine::Calls::whole_life(measured)),
        Box::new(machine::Calls::late_slot(measured.min(50))),
        Box::new(host::Mappings::new(measured)),
        Box::new(own_pages::OwnPages::new(measured)),
        Box::new(host::Watched::new(measured)),
        Box::new(host::ThreadSpawn::new(measured)),
        Box::new(kick::KickToBarrier::new(
            scale.pick(200, 30, 2),
            scale.pick(16, 16, 2),
        )),
    ]
}
