//! The words of cases and columns, for whoever has only the page. docs/benchmarks.md has the whole.

/// Words that mean something together, and what each of them is.
#[derive(Debug)]
pub struct Entry {
    /// As they stand in names of cases.
    pub words: &'static str,
    /// In a sentence.
    pub meaning: &'static str,
}

const fn entry(words: &'static str, meaning: &'static str) -> Entry {
    Entry { words, meaning }
}

/// In the order in which a reader meets them.
pub const GLOSSARY: &[Entry] = &[
    entry(
        "clock fork, clock instantiate",
        "Where the time begins: at the request on a running parent, or at the spawn request on a fork point that exists already.",
    ),
    entry(
        "built",
        "The clone's VM object exists: memory slots, vCPUs, devices, threads. (Pooled: a shell was taken.)",
    ),
    entry(
        "restored",
        "State of vCPUs and devices, and memory, are in place.",
    ),
    entry("first_run", "The first KVM_RUN is about to be entered."),
    entry(
        "first_action",
        "The clone's first doorbell exit was seen by the host: guest code has run.",
    ),
    entry(
        "first_answer",
        "The guest's program has read and checked its pages, and its report was seen.",
    ),
    entry(
        "pooled, unpooled",
        "The clone takes a shell, a VM that was built ahead; or its VM is built when it is asked for.",
    ),
    entry(
        "in-process, process",
        "The clone lives in the parent's process, or in a worker that was started before.",
    ),
    entry(
        "cow",
        "All of the parent's memory is in the image that the clone maps.",
    ),
    entry(
        "lazy",
        "Pages come into the image as they are touched. sibling: an earlier clone has touched the same ones. replayed: the engine brings \
         what an earlier clone touched.",
    ),
    entry(
        "remap, copy, write-protect, delta",
        "How a fork keeps the parent's memory: the file that it lies in becomes the image; it is copied; it is protected, and a page copied \
         before it is written; that, but only of the parent's own pages: all that it has written since it maps an image.",
    ),
    entry(
        "request, pause, save, freeze, resume, publish",
        "Phases of a fork: limits are checked; the vCPUs stop; their state is read; disks and memory are made immutable; the parent runs \
         on; the image is sealed, or its first pages are brought.",
    ),
    entry(
        "spawn, memory, restore, identity, run",
        "Phases of each clone: a VM is taken or built; its memory is mapped; the state is put in; it is told who it is; it is let go.",
    ),
    entry(
        "p50, p90, p99, n",
        "Percentiles of n values, p50 the median. With n below 100, p99 is the maximum.",
    ),
    entry(
        "outliers",
        "Values far off the others, counted and kept; - where there are too few values to tell.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::setting::Place;
    use crate::bench::subject::END_POINTS;
    use crate::{FreezeKind, MemoryMode};
    use forkvm_clone_engine::Phase;

    #[test]
    fn every_end_point_phase_freeze_mode_and_place_has_its_words() {
        let words: Vec<&str> = GLOSSARY
            .iter()
            .flat_map(|entry| entry.words.split(", "))
            .collect();
        let freezes = [
            FreezeKind::Remap,
            FreezeKind::Copy,
            FreezeKind::WriteProtect,
            FreezeKind::Delta,
        ];
        let due = END_POINTS
            .into_iter()
            .chain(Phase::ALL.map(Phase::as_str))
            .chain(freezes.map(FreezeKind::as_str))
            .chain([MemoryMode::Cow, MemoryMode::Lazy].map(MemoryMode::as_str))
            .chain([Place::InProcess, Place::Process].map(Place::as_str));
        for word in due {
            assert!(words.contains(&word), "{word} is not explained");
        }
    }
}
