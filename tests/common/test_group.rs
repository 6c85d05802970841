//! A cgroup of a test's own, where the test may make one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Removed with the value.
pub struct TestGroup {
    folder: PathBuf,
    version_2: bool,
}

impl TestGroup {
    /// Below the group of this process, limited by `controller`; says so and is `None` where this
    /// process may not make one (no root, a read-only mount, a group of version 2 that has processes
    /// and so cannot pass its controllers on).
    pub fn new(controller: &str) -> Option<TestGroup> {
        match TestGroup::make(controller) {
            Ok(group) => Some(group),
            Err(error) => {
                println!("skipped: no cgroup with {controller} can be made here: {error}");
                None
            }
        }
    }

    fn make(controller: &str) -> io::Result<TestGroup> {
        let lines = fs::read_to_string("/proc/self/cgroup")?;
        let path_of = |wanted: &str| {
            lines.lines().find_map(|line| {
                let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
                (controllers == wanted).then(|| path.trim_start_matches('/').to_owned())
            })
        };
        let (above, version_2) = match (path_of(controller), path_of("")) {
            (Some(path), _) => (
                Path::new("/sys/fs/cgroup").join(controller).join(path),
                false,
            ),
            (None, Some(path)) => (Path::new("/sys/fs/cgroup").join(path), true),
            (None, None) => return Err(io::Error::other("this process is in no such group")),
        };
        if version_2 {
            fs::write(
                above.join("cgroup.subtree_control"),
                format!("+{controller}"),
            )?;
        }
        // Tests of one process may each have some.
        static NUMBERS: AtomicU32 = AtomicU32::new(0);
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let folder = above.join(format!("forkvm-test-{}-{number}", process::id()));
        fs::create_dir(&folder)?;
        Ok(TestGroup { folder, version_2 })
    }

    pub fn set(&self, file: &str, value: &str) {
        fs::write(self.folder.join(file), value).unwrap();
    }

    /// The file with the limit of memory.
    pub fn memory_limit(&self) -> &'static str {
        if self.version_2 {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        }
    }

    /// Moves a process in; what it has of memory stays where it came from.
    pub fn take_in(&self, process: u32) {
        self.set("cgroup.procs", &process.to_string());
    }

    /// What a shell does to get in, with all that it starts.
    pub fn enter(&self) -> String {
        format!("echo $$ > {}/cgroup.procs", self.folder.display())
    }
}

impl Drop for TestGroup {
    fn drop(&mut self) {
        // The kernel may still be taking the last thread out of it.
        let start = Instant::now();
        while let Err(error) = fs::remove_dir(&self.folder) {
            if start.elapsed() > Duration::from_secs(5) {
                println!("{} stays: {error}", self.folder.display());
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    }
}
