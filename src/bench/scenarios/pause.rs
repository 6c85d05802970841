//! How long a parent stands still, by how its memory is kept and how much there is.

use forkvm_clone_engine::FreezeKind;

use crate::bench::chart::{Chart, Marks, Series};
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::parents::Parents;
use crate::bench::report::Row;
use crate::bench::subject::{PAGES_PER_MIB, SubjectSpec};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "pause",
    about: "how long the parent stands still, by freeze, RAM, populated and dirty memory",
    reading: "From the closing of the gate until the parent's vCPUs may run again. FREEZE/RAM/POPULATED; for delta 4 MiB are dirty unless the \
              name ends in another amount. Populated memory is one piece, or scattered: one page in 16 of an area 16 times as large. \
              remap is measured on a VM freshly booted each time.",
    experiments,
    charts,
};

/// A parent.
#[derive(Clone, Copy, Debug)]
struct Parent {
    memory_mib: u64,
    populated_mib: u32,
    dirty_mib: u32,
    scattered: bool,
}

/// Dirty memory of a parent that is forked by delta, unless it is what varies.
const DIRTY_MIB: u32 = 4;

const SMALL: [Parent; 1] = [Parent::of(512, 16, DIRTY_MIB)];

const PARENTS: [Parent; 5] = [
    Parent::of(512, 16, DIRTY_MIB),
    Parent::of(512, 64, DIRTY_MIB),
    Parent::of(512, 256, DIRTY_MIB),
    Parent::of(2048, 64, DIRTY_MIB),
    Parent::of(8192, 64, DIRTY_MIB),
];

/// One for write-protect, the freeze whose walk goes from one populated extent to the next.
const SCATTERED: Parent = Parent {
    scattered: true,
    ..Parent::of(8192, 64, DIRTY_MIB)
};

/// Where populated memory is scattered, one page in so many is: each in a chunk of 64 KiB of its own.
const SCATTERED_EVERY: u32 = 16;

/// Further ones for delta: what varies is what is dirty. The first is the one for a quick look.
const DIRTY: [Parent; 4] = [
    Parent::of(512, 64, 8),
    Parent::of(512, 64, 1),
    Parent::of(512, 64, 16),
    Parent::of(512, 64, 64),
];

const FREEZES: [FreezeKind; 4] = [
    FreezeKind::WriteProtect,
    FreezeKind::Remap,
    FreezeKind::Copy,
    FreezeKind::Delta,
];

impl Parent {
    const fn of(memory_mib: u64, populated_mib: u32, dirty_mib: u32) -> Parent {
        Parent {
            memory_mib,
            populated_mib,
            dirty_mib,
            scattered: false,
        }
    }

    /// What it writes before each pause: for delta what is to be found; otherwise everything, so that all
    /// its memory is mapped when it is frozen.
    fn written_mib(&self, freeze: FreezeKind) -> u32 {
        match freeze {
            FreezeKind::Delta => self.dirty_mib,
            _ => self.populated_mib,
        }
    }

    /// VMs like that, to be frozen by `freeze`.
    fn parents(&self, freeze: FreezeKind) -> Parents {
        let spec = SubjectSpec {
            memory_mib: self.memory_mib,
            populated_mib: self.populated_mib,
            every: if self.scattered { SCATTERED_EVERY } else { 1 },
            dirty_pages: self.written_mib(freeze) * PAGES_PER_MIB,
            ..SubjectSpec::USUAL
        };
        Parents::new(freeze, spec)
    }
}

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let parents = scale.pick(&PARENTS[..], &PARENTS[..2], &SMALL[..]);
    let dirty = scale.pick(&DIRTY[..], &DIRTY[..1], &[]);
    let mut all: Vec<Box<dyn Experiment>> = Vec::new();
    let mut add = |freeze, parent: &Parent| {
        all.push(Box::new(Pause {
            freeze,
            parent: *parent,
            measured: match freeze {
                FreezeKind::Remap => scale.pick(5, 2, 1),
                FreezeKind::Copy => scale.pick(6, 3, 1),
                _ => scale.pick(16, 5, 1),
            },
            parents: parent.parents(freeze),
        }));
    };
    for freeze in FREEZES {
        parents.iter().for_each(|parent| add(freeze, parent));
    }
    dirty
        .iter()
        .for_each(|parent| add(FreezeKind::Delta, parent));
    if scale.pick(true, true, false) {
        add(FreezeKind::WriteProtect, &SCATTERED);
    }
    all
}

struct Pause {
    freeze: FreezeKind,
    parent: Parent,
    measured: u32,
    parents: Parents,
}

impl Experiment for Pause {
    fn name(&self) -> String {
        let Parent {
            memory_mib,
            populated_mib,
            dirty_mib,
            scattered,
        } = self.parent;
        let scattered = if scattered { "-scattered" } else { "" };
        let name = format!(
            "{}/{memory_mib}-MiB/{populated_mib}-MiB{scattered}",
            self.freeze
        );
        if dirty_mib == DIRTY_MIB {
            name
        } else {
            format!("{name}/{dirty_mib}-MiB-dirty")
        }
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        self.parents.prepare()
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (freeze, dirty_mib) = (self.freeze, self.parent.written_mib(self.freeze));
        // The mode is no part of the pause; the last one that it serves does not fill the image.
        let mode = freeze.serves().last().copied().unwrap_or_default();
        let (point, traced) = self.parents.with_next(|parent| {
            let point = parent.point(freeze, mode)?;
            Ok((point, parent.trace()))
        })?;
        let name = self.name();
        for pause in traced.pauses {
            samples
                .time(&name, Unit::Us, pause)
                .column("memory_mib", self.parent.memory_mib as f64)
                .column("populated_mib", point.populated_mib())
                .column("dirty_mib", f64::from(dirty_mib));
        }
        Ok(())
    }
}

/// The pause against populated memory, for the RAM that there are most cases of; against dirty
/// memory for delta.
fn charts(rows: &[Row]) -> Vec<Chart> {
    let by = |column: &'static str, wanted: &dyn Fn(&Row) -> bool| {
        let point = |row: &Row| Some((*row.columns.get(column)?, row.percentiles.p50 / 1000.0));
        let mut points: Vec<_> = rows
            .iter()
            .filter(|row| wanted(row))
            .filter_map(point)
            .collect();
        points.sort_by(|one, next| one.0.total_cmp(&next.0));
        points
    };
    let of_usual_ram = |row: &Row| row.columns.get("memory_mib") == Some(&512.0);
    let series = |freeze: FreezeKind| Series {
        name: freeze.to_string(),
        points: by("populated_mib", &|row: &Row| {
            row.case.starts_with(&format!("{freeze}/"))
                && !row.case.ends_with("-dirty")
                && of_usual_ram(row)
        }),
        marked: true,
    };
    let populated = Chart {
        name: "pause-by-populated-memory".into(),
        title: "How long the parent stands still, 512 MiB of RAM".into(),
        x: "populated memory, MiB".into(),
        y: "median pause, ms".into(),
        log: (true, true),
        marks: Marks::Lines(FREEZES.map(series).to_vec()),
    };
    let dirty = Chart {
        name: "pause-by-dirty-memory".into(),
        title: "How long the parent stands still, by delta, 64 MiB populated".into(),
        x: "dirty memory, MiB".into(),
        y: "median pause, ms".into(),
        log: (false, false),
        marks: Marks::Lines(vec![Series {
            name: "delta".into(),
            points: by("dirty_mib", &|row: &Row| {
                row.case.starts_with("delta/512-MiB/64-MiB")
            }),
            marked: true,
        }]),
    };
    vec![populated, dirty]
}
