//! What a clone takes of the host's memory.

use std::sync::Arc;
use std::time::Instant;

use forkvm_clone_engine::accounting::{FamilyUse, HostKernelUse, MemoryUse, ProcessUse};
use forkvm_clone_engine::limits;
use forkvm_clone_engine::{ForkError, ForkPoint, FreezeKind, Member, MemoryMode};

use crate::bench::chart::{Chart, Marks, Series};
use crate::bench::linux::LinuxSubject;
use crate::bench::measure::{BenchError, Experiment, Repetitions, Samples, Unit, call};
use crate::bench::report::Row;
use crate::bench::setting::Setting;
use crate::bench::subject::{Subject, SubjectSpec, Work, end, wait_answer};
use crate::bench::{Scale, Scenario};

/// See the module's text.
pub(super) const SCENARIO: Scenario = Scenario {
    name: "memory",
    about: "what a clone takes of the host's memory: idle, by pages touched, and of its descriptor",
    reading: "Growth while N clones are alive, divided by N. private: Anonymous of smaps_rollup; page-tables: VmPTE; kernel: Slab, VmallocUsed, \
              PageTables, SecPageTables and Percpu of the host. idle: after the first action, nothing touched. idle-1000/host: what \
              MemAvailable lost to 1000 of them. accounts: what the library says of a clone, on average; family: of the parent and all clones. 512 MiB of RAM each, 64 MiB populated. linux: machines of 64 MiB, once their agents have \
              answered.",
    experiments,
    charts,
};

/// Pages that clones touch, beside none.
const TOUCHED: [u32; 4] = [16, 256, 1024, 4096];

fn experiments(scale: Scale) -> Vec<Box<dyn Experiment>> {
    let measured = scale.pick(3, 2, 1);
    let clones = scale.pick(32, 8, 2);
    let grown = |what, spec| -> Box<dyn Experiment> {
        Box::new(Growth {
            what,
            spec,
            clones,
            measured,
            subject: None,
            point: None,
        })
    };
    let mut all = vec![grown(What::Idle, IDLE)];
    if scale == Scale::Full {
        // What a vCPU adds, and what RAM does.
        all.push(grown(What::Idle, SubjectSpec { vcpus: 4, ..IDLE }));
        let small = SubjectSpec {
            memory_mib: 64,
            populated_mib: 16,
            ..IDLE
        };
        all.push(grown(What::Idle, small));
    }
    for &pages in scale.pick(&TOUCHED[..], &TOUCHED[..2], &TOUCHED[..1]) {
        let doing = |read_pages, write_pages| SubjectSpec {
            work: Work {
                read_pages,
                write_pages,
                ..Work::default()
            },
            ..IDLE
        };
        all.push(grown(What::Read(pages), doing(pages, 0)));
        all.push(grown(What::Written(pages), doing(0, pages)));
    }
    all.push(Box::new(Descriptor {
        memory_mib: scale.pick(1024, 1024, 64),
        measured: 1,
    }));
    if scale == Scale::Full {
        // Not what is quick: where KVM is software its boot alone takes a minute.
        all.push(Box::new(Linux {
            point: None,
            subject: None,
        }));
        all.push(grown_host());
    }
    all
}

fn grown_host() -> Box<dyn Experiment> {
    Box::new(Growth {
        what: What::Host,
        spec: IDLE,
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

/// A parent whose clones do nothing.
const IDLE: SubjectSpec = SubjectSpec {
    work: Work {
        read_pages: 0,
        ..SubjectSpec::USUAL.work
    },
    ..SubjectSpec::USUAL
};

struct Growth {
    what: What,
    spec: SubjectSpec,
    clones: u32,
    measured: u32,
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<Subject>,
}

impl Experiment for Growth {
    fn name(&self) -> String {
        match self.what {
            What::Idle => match (self.spec.memory_mib, self.spec.vcpus) {
                (512, 1) => "idle".into(),
                (memory_mib, vcpus) => format!("idle-{vcpus}-vcpus-{memory_mib}-MiB"),
            },
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
        let subject = Subject::boot(&self.spec)?;
        self.point = Some(subject.point(FreezeKind::Remap, MemoryMode::Cow)?);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (Some(subject), Some(point)) = (&self.subject, &self.point) else {
            return Ok(());
        };
        let before = Usage::now()?;
        let clones = match point.spawn(self.clones) {
            Ok(clones) => clones,
            Err(ForkError::Limits(limit)) => return Err(BenchError::Lacks(limit.to_string())),
            Err(error) => return Err(error.into()),
        };
        let after = all_answered(&clones).and_then(|()| Usage::now());
        // One after the other: a thousand would take longer than all else.
        let family = match self.what {
            What::Host => Ok(FamilyUse::default()),
            _ => subject.memory_use(),
        };
        end(&clones);
        let (after, family) = (after?, family?);
        let name = self.name();
        if self.what == What::Host {
            let lost = each(after.available_kib, before.available_kib, 1) / 1024.0;
            samples.value(&format!("{name}/host"), Unit::Mib, lost);
            return Ok(());
        }
        let grown = |of: fn(&Usage) -> u64| each(of(&before), of(&after), self.clones);
        let mut note = |case: &str, grown: f64| {
            let case = samples.value(&format!("{name}/{case}"), Unit::Kib, grown);
            case.column("clones", f64::from(self.clones));
            if let What::Read(pages) | What::Written(pages) = self.what {
                case.column("pages", f64::from(pages));
            }
        };
        note("private", grown(|usage| usage.process.anonymous_kib));
        note("page-tables", grown(|usage| usage.process.page_tables_kib));
        note("kernel", grown(|usage| usage.kernel.total_kib()));
        if self.what == What::Idle {
            note("kernel/slab", grown(|usage| usage.kernel.slab_kib));
            note("kernel/vmalloc", grown(|usage| usage.kernel.vmalloc_kib));
            note(
                "kernel/page-tables",
                grown(|usage| usage.kernel.page_tables_kib),
            );
            note(
                "kernel/guest-page-tables",
                grown(|usage| usage.kernel.guest_page_tables_kib),
            );
            note("kernel/percpu", grown(|usage| usage.kernel.percpu_kib));
        }
        self.note_accounts(samples, &clones, &family);
        Ok(())
    }
}

impl Growth {
    /// What the library's own accounts say of the clones and of their family.
    fn note_accounts(&self, samples: &mut Samples, clones: &[Arc<Member>], family: &FamilyUse) {
        let name = self.name();
        let of_clones = || {
            clones
                .iter()
                .filter_map(|clone| family.members.get(clone.name()))
        };
        let mut each = |case: &str, of: fn(&MemoryUse) -> u64| {
            let mean = of_clones().map(of).sum::<u64>() as f64 / f64::from(self.clones);
            samples.value(&format!("{name}/accounts/{case}"), Unit::Kib, mean);
        };
        each("private", |taken| taken.private_kib);
        each("shared", |taken| taken.shared_kib);
        each("page-tables", |taken| taken.page_tables_kib);
        each("kernel", |taken| taken.kernel.total_kib());
        // Where KVM counts them (KVM_GET_STATS_FD).
        if of_clones().all(|taken| taken.kernel.paging_kib.is_some()) {
            each("kernel/paging", |taken| {
                taken.kernel.paging_kib.unwrap_or(0)
            });
        }
        let mut whole = |case: &str, kib: u64| {
            let case = samples.value(&format!("{name}/family/{case}"), Unit::Kib, kib as f64);
            case.column("clones", f64::from(self.clones));
        };
        whole("files", family.files_kib);
        whole("guest", family.guest_kib());
        whole("total", family.total_kib());
    }
}

fn all_answered(clones: &[Arc<Member>]) -> Result<(), BenchError> {
    clones
        .iter()
        .try_for_each(|clone| wait_answer(clone, 1).map(drop))
}

/// Linux machines that are alive at once.
const LINUX_CLONES: u32 = 8;

/// Linux machines, each of which has become itself.
struct Linux {
    // Before the subject: its family ends with that.
    point: Option<Arc<ForkPoint>>,
    subject: Option<LinuxSubject>,
}

impl Experiment for Linux {
    fn name(&self) -> String {
        "linux/idle".into()
    }

    fn repetitions(&self) -> Repetitions {
        Repetitions {
            warm_up: 1,
            measured: 2,
        }
    }

    fn prepare(&mut self) -> Result<(), BenchError> {
        let subject = LinuxSubject::restore(Setting::PLAIN)?;
        self.point = Some(subject.point(MemoryMode::Cow)?);
        self.subject = Some(subject);
        Ok(())
    }

    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError> {
        let (Some(subject), Some(point)) = (&self.subject, &self.point) else {
            return Ok(());
        };
        let before = Usage::now()?;
        let clones = point.spawn(LINUX_CLONES)?;
        let met = clones
            .iter()
            .try_for_each(|clone| subject.meet(clone.clone(), Instant::now()).map(drop));
        let after = met.and_then(|()| Usage::now());
        end(&clones);
        let after = after?;
        let mut note = |case: &str, of: fn(&Usage) -> u64| {
            let grown = each(of(&before), of(&after), LINUX_CLONES);
            samples
                .value(&format!("linux/idle/{case}"), Unit::Kib, grown)
                .column("clones", f64::from(LINUX_CLONES));
        };
        note("private", |usage| usage.process.anonymous_kib);
        note("page-tables", |usage| usage.process.page_tables_kib);
        note("kernel", |usage| usage.kernel.total_kib());
        Ok(())
    }
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
        let bytes = point.descriptor_bytes()?;
        samples.value(&self.name(), Unit::Kib, bytes as f64 / 1024.0);
        Ok(())
    }
}

/// What the kernel accounts at one instant.
struct Usage {
    process: ProcessUse,
    kernel: HostKernelUse,
    /// What the host could still give, in KiB.
    available_kib: u64,
}

impl Usage {
    fn now() -> Result<Usage, BenchError> {
        Ok(Usage {
            process: ProcessUse::now()?,
            kernel: HostKernelUse::now()?,
            available_kib: limits::available_kib().map_err(call("reading MemAvailable"))?,
        })
    }
}

/// Growth from `before` to `after` for each of `clones`; none where it shrank.
fn each(before: u64, after: u64, clones: u32) -> f64 {
    after.saturating_sub(before) as f64 / f64::from(clones)
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
