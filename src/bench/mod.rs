//! The laboratory: what forkvm does, measured so that it can be quoted and repeated.
//!
//! A [`Scenario`] answers one question by [`measure::Experiment`]s; each repetition of one gives a
//! sample to each of its cases. The [`runner`] warms up, shuffles the repetitions of all experiments
//! by a seed, and makes a [`report::Report`] of the samples: percentiles, outliers ([`outliers`]) and
//! under which circumstances. [`export`] and [`chart`] write it down, [`page`] for a browser, with the words of [`glossary`];
//! [`compare`] holds two against each other.
//!
//! A scenario is one file in [`scenarios`] and one line in [`SCENARIOS`]. What the engine can be set
//! up as is in [`setting`], the VM that is measured in [`subject`], several that are frozen in turn in
//! [`parents`], and a Linux machine in [`linux`].
//!
//! It prints nothing and hears no signals: that is the command's. Figures come from where things
//! happen (the engine's trace, reports of guests, the kernel's accounts), never from options.

pub mod chart;
pub mod compare;
pub mod export;
pub mod glossary;
pub mod linux;
pub mod measure;
pub mod outliers;
pub mod page;
pub mod parents;
pub mod report;
pub mod runner;
pub mod scenarios;
pub mod setting;
pub mod subject;

pub use scenarios::SCENARIOS;

use chart::Chart;
use measure::Experiment;
use report::Row;

/// One question to the engine, and how it is answered.
#[derive(Debug)]
pub struct Scenario {
    /// What the command takes.
    pub name: &'static str,
    /// The question, in a line.
    pub about: &'static str,
    /// What its figures count and from when on, for whoever reads them.
    pub reading: &'static str,
    /// What is done for it.
    pub experiments: fn(Scale) -> Vec<Box<dyn Experiment>>,
    /// What it looks like; takes its rows.
    pub charts: fn(&[Row]) -> Vec<Chart>,
}

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// For figures that are quoted.
    Full,
    /// Seconds: to see that it works, and roughly what it costs.
    Quick,
    /// As quick, where everything takes fifty times as long.
    Small,
}

impl Scale {
    /// One of three, by scale.
    pub fn pick<T>(self, full: T, quick: T, small: T) -> T {
        match self {
            Scale::Full => full,
            Scale::Quick => quick,
            Scale::Small => small,
        }
    }
}
