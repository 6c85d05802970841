//! What tests of this crate share, and tests of whole builds. None needs a network or compiles a kernel.

mod builds;
mod recipes;

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use tempfile::{TempDir, tempdir};

use crate::recipe::Recipe;
use crate::watch::{Step, Watch};

/// A small recipe with all that it takes from the host, in a directory of its own.
pub(crate) struct Sample(TempDir);

impl Sample {
    pub(crate) fn new() -> Sample {
        let sample = Sample(tempdir().unwrap());
        fs::create_dir(sample.dir()).unwrap();
        let text = format!(
            r#"
about = "a sample"
cmdline = "console=ttyS0 quiet"

[kernel]
source = "{}"
package = "linux-source"
base = "tinyconfig"
config = "kernel.config"

[initramfs]
directories = ["proc"]

[[initramfs.file]]
path = "init"
recipe = "init"
mode = 0o755

[[initramfs.file]]
path = "usr/bin/busybox"
host = "{}"
package = "busybox-static"
mode = 0o755
links = ["sh"]
"#,
            sample.source().display(),
            sample.busybox().display()
        );
        fs::write(sample.dir().join("recipe.toml"), text).unwrap();
        fs::write(sample.dir().join("kernel.config"), "CONFIG_64BIT=y\n").unwrap();
        fs::write(sample.dir().join("init"), "#!/bin/sh\n").unwrap();
        fs::write(sample.source(), "an archive").unwrap();
        fs::write(sample.busybox(), "busybox of the host").unwrap();
        sample
    }

    /// The recipe's directory.
    pub(crate) fn dir(&self) -> PathBuf {
        self.0.path().join("sample")
    }

    pub(crate) fn source(&self) -> PathBuf {
        self.0.path().join("linux.tar.xz")
    }

    pub(crate) fn busybox(&self) -> PathBuf {
        self.0.path().join("busybox")
    }

    /// A cache that nobody has used.
    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.0.path().join("cache/images")
    }

    /// The recipe as it is now.
    pub(crate) fn recipe(&self) -> Recipe {
        Recipe::find(&format!("{}/", self.dir().display())).unwrap()
    }

    pub(crate) fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.dir().join(file)).unwrap()
    }

    pub(crate) fn append(&self, file: &str, text: &str) {
        let mut file = File::options()
            .append(true)
            .open(self.dir().join(file))
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }
}

/// Says stop when it was asked some times.
pub(crate) struct StopAfter(AtomicU32);

impl StopAfter {
    pub(crate) fn new(times: u32) -> StopAfter {
        StopAfter(AtomicU32::new(times))
    }
}

impl Watch for StopAfter {
    fn at(&mut self, _step: Step, _done: u64, _total: u64) {}

    fn stop(&self) -> bool {
        let less = |left: u32| left.checked_sub(1);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
            .is_err()
    }
}

/// Names of all that is in a directory.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
