//! What a clone takes of the host's memory.

use std::fs;
use std::sync::Arc;

use forkvm_clone_engine::{ForkError, ForkPoint, FreezeKind, Member, MemoryMode};

use crate::bench::chart::{Chart, Marks, Series};
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit};
use crate::bench::report::Row;
use crate::bench::subject::{Subject, SubjectSpec, Work, end, wait_answer};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "memory",
    about: "what a clone takes of the host's memory: idle, by pages touched, and of its descriptor",
    reading: "Growth while N clones are alive, divided by N. private: Anonymous of smaps_rollup; page-tables: VmPTE; kernel: Slab, VmallocUsed, \
              PageTables, SecPageTables and Percpu of the host. idle: after the first action, nothing touched. idle-1000/host: what \
              MemAvailable lost to 1000 of them. 512 MiB of RAM each, 64 MiB populated.",
    experiments,
    charts,
};

/// Pages that clones touch, beside none.
const TOUCHED: [u32; 4] = [16, 256, 1024, 4096];

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let measured = scale.pick(5, 2, 1);
    let clones = scale.pick(32, 8, 2);
    let grown = |what, work| -> Box<dyn Experiment> {
        Box::new(Growth {
            what,
            work,
            clones,
            measured,
            subject: None,
            point: None,
        })
    };
    let mut all = vec![grown(What::Idle, Work::default())];
    for &pages in scale.pick(&TOUCHED[..], &TOUCHED[..2], &TOUCHED[..1]) {
        let read = Work {
            read_pages: pages,
            ..Work::default()
        };
        let written = Work {
            write_pages: pages,
            ..Work::default()
        };
        all.push(grown(What::Read(pages), read));
        all.push(grown(What::Written(pages), written));
    }
    all.push(Box::new(Descriptor {
        memory_mib: scale.pick(1024, 1024, 64),
        measured: 1,
    }));
    if scale == Scale::Full {
        all.push(grown_host());
    }
    all
}

fn grown_host() -> Box<dyn Experiment> {
    Box::new(Growth {
        what: What::Host,
        work: Work::default(),
        clones: 1000,
        measured: 2,
        subject: None,
        point: None,
    })
}

/// What clones do, and what is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    /// Nothing.
    Idle,
    /// Read so many pages.
    Read(u32),
    /// Write so many.
    Written(u32),
    /// Nothing, and the whole host is looked at.
    Host,
}

struct Growth {
    what: What,
    work: Work,
    clones: u32,
    measured: u32,
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<Subject>,
}

impl Experiment for Growth {
    fn name(&self) -> String {
        match self.what {
            What::Idle => "idle".into(),
            What::Read(pages) => format!("read-{pages}-pages"),
            What::Written(pages) => format!("written-{pages}-pages"),
            What::Host => format!("idle-{}", self.clones),
        }
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            // The allocator's own grows once.
            warm_up: 1,
            measured: self.measured,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            work: self.work,
            ..SubjectSpec::USUAL
        })?;
        self.point = Some(subject.point(FreezeKind::Remap, MemoryMode::Cow)?);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let Some(point) = &self.point else {
            return Ok(());
        };
        let before = Usage::now()?;
        let clones = match point.spawn(self.clones) {
            Ok(clones) => clones,
            Err(ForkError::Limits(limit)) => return Err(BenchError::Lacks(limit.to_string())),
            Err(error) => return Err(error.into()),
        };
        let after = all_answered(&clones).and_then(|()| Usage::now());
        end(&clones);
        let after = after?;
        let name = self.name();
        let count = f64::from(self.clones);
        let mut note = |case: &str, unit, grown: f64| {
            let case = samples.value(&format!("{name}/{case}"), unit, grown.max(0.0));
            case.column("clones", count);
            if let What::Read(pages) | What::Written(pages) = self.what {
                case.column("pages", f64::from(pages));
            }
        };
        if self.what == What::Host {
            note(
                "host",
                Unit::Mib,
                (before.available_kib - after.available_kib) / 1024.0,
            );
            return Ok(());
        }
        note(
            "private",
            Unit::Kib,
            (after.private_kib - before.private_kib) / count,
        );
        note(
            "page-tables",
            Unit::Kib,
            (after.page_tables_kib - before.page_tables_kib) / count,
        );
        note(
            "kernel",
            Unit::Kib,
            (after.kernel_kib - before.kernel_kib) / count,
        );
        Ok(())
    }
}

fn all_answered(clones: &[Arc<Member>]) -> Result<(), BenchError> {
    clones
        .iter()
        .try_for_each(|clone| wait_answer(clone, 1).map(drop))
}

/// Size of all that a clone needs beside memory.
struct Descriptor {
    memory_mib: u64,
    measured: u32,
}

impl Experiment for Descriptor {
    fn name(&self) -> String {
        format!("descriptor/1-vcpu/{}-MiB", self.memory_mib)
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 0,
            measured: self.measured,
        }
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let subject = Subject::boot(&SubjectSpec {
            memory_mib: self.memory_mib,
            ..SubjectSpec::USUAL
        })?;
        let point = subject.point(FreezeKind::Remap, MemoryMode::Cow)?;
        samples.value(&self.name(), Unit::Kib, point.state_bytes() as f64 / 1024.0);
        Ok(())
    }
}

/// What the kernel accounts at one instant, in KiB.
struct Usage {
    /// Written by this process: clones, heap, stacks.
    private_kib: f64,
    /// Page tables of this process.
    page_tables_kib: f64,
    /// The kernel's own, of the whole host.
    kernel_kib: f64,
    /// What the host could still give.
    available_kib: f64,
}

impl Usage {
    fn now() -> Result<Usage, BenchError> {
        let (rollup, status, host) = (
            "/proc/self/smaps_rollup",
            "/proc/self/status",
            "/proc/meminfo",
        );
        let kernel = ["Slab", "VmallocUsed", "PageTables", "Percpu"];
        let mut kernel_kib = 0.0;
        for name in kernel {
            kernel_kib += account(host, name)?;
        }
        // Since Linux 6.1.
        kernel_kib += account(host, "SecPageTables").unwrap_or(0.0);
        Ok(Usage {
            private_kib: account(rollup, "Anonymous")?,
            page_tables_kib: account(status, "VmPTE")?,
            kernel_kib,
            available_kib: account(host, "MemAvailable")?,
        })
    }
}

/// The line `field: N kB` of a file.
fn account(path: &'static str, field: &'static str) -> Result<f64, BenchError> {
    let lacks = || BenchError::Account { path, field };
    let text =
        fs::read_to_string(path).map_err(|source| BenchError::Call { call: path, source })?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let kib = value.and_then(|value| value.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.ok_or_else(lacks)
}

fn charts(rows: &[Row]) -> Vec<Chart> {
    let series = |kind: &str| {
        let of_kind = rows
            .iter()
            .filter(|row| row.case.starts_with(kind) && row.case.ends_with("/private"));
        let mut points: Vec<_> = of_kind
            .filter_map(|row| Some((*row.columns.get("pages")?, row.percentiles.p50)))
            .collect();
        points.sort_by(|one, next| one.0.total_cmp(&next.0));
        Series {
            name: format!("{kind} by the clone"),
            points,
            marked: true,
        }
    };
    vec![Chart {
        name: "memory-per-clone".into(),
        title: "Private memory of a clone, by the pages that it touched".into(),
        x: "pages of 4 KiB".into(),
        y: "private memory per clone, KiB".into(),
        log: (true, true),
        marks: Marks::Lines(vec![series("read"), series("written")]),
    }]
}
