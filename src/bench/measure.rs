//! What a scenario is made of: experiments, and the samples that they give.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use forkvm_abi::doorbell::report;
use forkvm_clone_engine::accounting::AccountingError;
use forkvm_clone_engine::spawn::SpawnError;
use forkvm_clone_engine::{DescriptorError, End, ForkError, MemberError, UserfaultError};
use forkvm_vmm::{KvmError, MemoryError, PauseError, VmError};
use serde::Serialize;
use thiserror::Error;

/// Something that is done again and again. Each repetition gives one sample, or several, to each of
/// its cases.
pub trait Experiment {
    /// What is at work, for people who wait; the cases' names begin like it.
    fn name(&self) -> String;

    /// How often it is done.
    fn repetitions(&self) -> Repetitions;

    /// Makes what the repetitions need, once, before the warm-up.
    fn prepare(&mut self) -> Result<(), BenchError> {
        Ok(())
    }

    /// Does it once.
    fn repeat(&mut self, samples: &mut Samples) -> Result<(), BenchError>;
}

/// How often an experiment is done.
#[derive(Clone, Copy, Debug)]
pub struct Repetitions {
    /// Before anything counts.
    pub warm_up: u32,
    /// That count.
    pub measured: u32,
}

/// In what a case is measured. Less is better, but of a ratio.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Unit {
    /// Microseconds.
    #[serde(rename = "us")]
    Us,
    /// Milliseconds.
    #[serde(rename = "ms")]
    Ms,
    /// KiB.
    #[serde(rename = "KiB")]
    Kib,
    /// MiB.
    #[serde(rename = "MiB")]
    Mib,
    /// Percent more than what it is compared with; less than 0 is possible.
    #[serde(rename = "percent")]
    Percent,
    /// How many times as long as forkvm something else takes.
    #[serde(rename = "ratio")]
    Ratio,
}

impl Unit {
    /// The word in outputs.
    pub fn as_str(self) -> &'static str {
        match self {
            Unit::Us => "us",
            Unit::Ms => "ms",
            Unit::Kib => "KiB",
            Unit::Mib => "MiB",
            Unit::Percent => "percent",
            Unit::Ratio => "ratio",
        }
    }

    /// No value is below it.
    pub fn least(self) -> f64 {
        match self {
            Unit::Percent => -100.0,
            _ => 0.0,
        }
    }

    fn of(self, time: Duration) -> f64 {
        match self {
            Unit::Ms => time.as_secs_f64() * 1e3,
            _ => time.as_secs_f64() * 1e6,
        }
    }
}

/// Version of a program that takes part.
#[derive(Clone, Debug)]
pub struct Version {
    /// The program, as its column is called.
    pub of: &'static str,
    /// What it says itself.
    pub text: String,
}

/// What one case has given.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name: parts joined by `/`, without blanks.
    pub name: String,
    /// In what its values are.
    pub unit: Unit,
    /// The values, in the order in which they were measured.
    pub values: Vec<f64>,
    /// What was seen beside them, each as often as it was told.
    pub columns: BTreeMap<&'static str, Vec<f64>>,
    /// Versions of what else was at work, by the name of their column.
    pub versions: BTreeMap<&'static str, String>,
}

impl Case {
    /// Notes `value` of the column `name`, which goes with the values; the row has their median.
    pub fn column(&mut self, name: &'static str, value: f64) -> &mut Case {
        self.columns.entry(name).or_default().push(value);
        self
    }

    /// Notes the version of something that is at work here beside forkvm.
    pub fn version(&mut self, version: &Version) -> &mut Case {
        self.versions.insert(version.of, version.text.clone());
        self
    }
}

/// What the repetitions of an experiment have given, case by case in the order in which they came up.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    cases: Vec<Case>,
}

impl Samples {
    /// One more time of `case`, in `unit`, which is one of time.
    pub fn time(&mut self, case: &str, unit: Unit, took: Duration) -> &mut Case {
        self.value(case, unit, unit.of(took))
    }

    /// One more value of `case`.
    pub fn value(&mut self, case: &str, unit: Unit, value: f64) -> &mut Case {
        let known = self.cases.iter().position(|known| known.name == case);
        let index = known.unwrap_or_else(|| {
            self.cases.push(Case {
                name: case.to_owned(),
                unit,
                values: Vec::new(),
                columns: BTreeMap::new(),
                versions: BTreeMap::new(),
            });
            self.cases.len() - 1
        });
        let case = &mut self.cases[index];
        case.values.push(value);
        case
    }

    /// The cases so far.
    pub fn cases(&self) -> &[Case] {
        &self.cases
    }

    /// The same, to note what goes with them.
    pub fn cases_mut(&mut self) -> &mut [Case] {
        &mut self.cases
    }
}

/// Why an experiment could not be done.
#[derive(Debug, Error)]
pub enum BenchError {
    /// This host cannot do it: it is left out, and that is no failure.
    #[error("{0}")]
    Lacks(String),
    /// KVM cannot be used.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A VM could not be booted or forked.
    #[error(transparent)]
    Vm(#[from] crate::Error),
    /// A Linux machine could not be had.
    #[error(transparent)]
    Linux(#[from] crate::linux::LinuxError),
    /// Its agent did not do what it was asked.
    #[error(transparent)]
    Agent(#[from] crate::agent::AgentError),
    /// The saved one cannot be opened.
    #[error(transparent)]
    Saved(#[from] forkvm_clone_engine::saved::OpenError),
    /// A VM did not do what it was asked.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// A fork point spawned no clone.
    #[error("spawning failed")]
    Fork(#[from] ForkError),
    /// A fork point could not be described.
    #[error(transparent)]
    Descriptor(#[from] DescriptorError),
    /// No shells could be had.
    #[error(transparent)]
    Shells(#[from] SpawnError),
    /// A bare machine could not be built.
    #[error(transparent)]
    Machine(#[from] VmError),
    /// Its memory could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It did not stand still.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// A call of the path, alone, failed.
    #[error("{call} failed")]
    Call {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel's accounts could not be read.
    #[error(transparent)]
    Accounting(#[from] AccountingError),
    /// A guest went another way than its job.
    #[error("VM {name} {end} instead of going on")]
    Ended {
        /// Its name.
        name: String,
        /// How it ended.
        end: End,
    },
    /// An end point was not seen although a later one was.
    #[error("VM {name}: no {end_point} was seen")]
    Unseen {
        /// Its name.
        name: String,
        /// Which.
        end_point: &'static str,
    },
}

impl From<UserfaultError> for BenchError {
    fn from(error: UserfaultError) -> BenchError {
        BenchError::Lacks(error.to_string())
    }
}

/// A call of the path that failed with a KVM error.
pub(super) fn call<E: Into<io::Error>>(call: &'static str) -> impl Fn(E) -> BenchError {
    move |source| BenchError::Call {
        call,
        source: source.into(),
    }
}

/// Value of a guest's report beyond [`report::USER`], if it is one.
pub(super) fn told(value: u32) -> Option<u32> {
    value.checked_sub(report::USER)
}
