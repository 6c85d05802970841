//! What this process holds, by kind and number, as the kernel tells it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread that was joined may still be listed, and a descriptor that KVM closes late.
const SETTLES: Duration = Duration::from_secs(5);

/// How many there are of each name.
type Counts = BTreeMap<String, usize>;

/// What can leak.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Census {
    /// Open descriptors, by what they are open on.
    descriptors: Counts,
    /// Threads, by name.
    threads: Counts,
    /// Mappings of memfds and KVM objects, by access and name.
    mappings: Counts,
    /// 512-byte blocks that all open memfds have together. Each counts once.
    memfd_blocks: u64,
    /// Names and lengths of the files in the watched folder.
    files: BTreeMap<String, u64>,
}

impl Census {
    /// Of now. `folder` is where the disks of the VMs are.
    pub(crate) fn take(folder: &Path) -> Census {
        let mut descriptors = Counts::new();
        let mut memfds = BTreeMap::new();
        for entry in fs::read_dir("/proc/self/fd").unwrap() {
            let path = entry.unwrap().path();
            // The descriptor that reads the directory is gone by now.
            let Ok(target) = fs::read_link(&path) else {
                continue;
            };
            let target = target.to_string_lossy().into_owned();
            if target.starts_with("/memfd:")
                && let Ok(metadata) = fs::metadata(&path)
            {
                memfds.insert(metadata.ino(), metadata.blocks());
            }
            if !target.ends_with("/fd") {
                *descriptors.entry(target).or_default() += 1;
            }
        }
        let threads = fs::read_dir("/proc/self/task").unwrap();
        let threads = threads.filter_map(|entry| {
            let name = fs::read_to_string(entry.unwrap().path().join("comm")).ok()?;
            Some(name.trim().to_owned())
        });
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let mappings = maps.lines().filter_map(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let (access, name) = (words.next()?, words.nth(3)?);
            let counts = name.contains("memfd:") || name.contains("anon_inode:");
            counts.then(|| format!("{access} {name}"))
        });
        let files = fs::read_dir(folder).unwrap().map(|entry| {
            let entry = entry.unwrap();
            (
                entry.file_name().into_string().unwrap(),
                entry.metadata().unwrap().len(),
            )
        });
        Census {
            descriptors,
            threads: count(threads),
            mappings: count(mappings),
            memfd_blocks: memfds.values().sum(),
            files: files.collect(),
        }
    }

    /// The names of the files in the watched folder.
    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// The same, but for what a parent that has run on keeps of a fork: its overlay beside its disk,
    /// open and locked, the mark there, and memory that it maps privately.
    pub(crate) fn of_parent_that_ran_on(mut self, disk: &Path) -> Census {
        let disk = disk.to_str().unwrap();
        self.descriptors.retain(|name, _| !name.starts_with(disk));
        self.files.clear();
        let private = self
            .mappings
            .into_iter()
            .map(|(name, times)| (name.replacen("rw-s /memfd", "rw-p /memfd", 1), times));
        self.mappings = private.fold(Counts::new(), |mut counts, (name, times)| {
            *counts.entry(name).or_default() += times;
            counts
        });
        self
    }
}

fn count(names: impl Iterator<Item = String>) -> Counts {
    names.fold(Counts::new(), |mut counts, name| {
        *counts.entry(name).or_default() += 1;
        counts
    })
}

/// What `take` sees once it is `before` again, or what it sees at last.
pub(crate) fn settled(before: Option<&Census>, take: impl Fn() -> Census) -> Census {
    let start = Instant::now();
    loop {
        let now = take();
        if Some(&now) == before || start.elapsed() > SETTLES {
            return now;
        }
        thread::sleep(Duration::from_millis(2));
    }
}

/// What `take` sees once it does not change by itself: what came before may still be going. On a slow host that takes longer, as
/// does a look.
pub(crate) fn stable(take: impl Fn() -> Census) -> Census {
    let look = || {
        let start = Instant::now();
        (take(), start.elapsed())
    };
    let (mut last, mut took) = look();
    loop {
        thread::sleep(Duration::from_millis(20).max(took * 10));
        let (now, again) = look();
        if now == last {
            return now;
        }
        (last, took) = (now, again);
    }
}

/// What `take` sees comes to be `before` again.
pub(crate) fn expect_again(before: &Census, take: impl Fn() -> Census, what: &str) {
    let now = settled(Some(before), take);
    assert!(now == *before, "{what}\nbefore {before:#?}\nafter {now:#?}");
}

/// A line of /proc/self/status, in KiB.
pub(crate) fn status_kib(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// Mappings of all kinds.
pub(crate) fn mapping_count() -> usize {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}
