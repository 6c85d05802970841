//! make in the kernel's source: targets of its configuration, and the compilation.

use std::path::Path;
use std::process::Command;
use std::thread;

use super::KernelError;
use super::command::{self, Runner};
use crate::watch::{Step, Watch};

/// What the kernel would say of when, where and by whom it was built: the same of all, so that the same
/// inputs make the same kernel.
const BUILT: &[(&str, &str)] = &[
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_USER", "forkvm"),
    ("KBUILD_BUILD_HOST", "forkvm"),
    ("KBUILD_BUILD_VERSION", "1"),
];

/// The estimate of a recipe may be wrong by this part before somebody is told.
const TOLERANCE: u64 = 5;

/// `make TARGET` in the source `work`.
pub(super) fn target(target: &str, work: &Path) -> Command {
    let mut make = command::new("make", work);
    make.arg(target).arg("ARCH=x86_64");
    make.envs(BUILT.iter().copied());
    make
}

/// Compiles the configured source in `work`; `steps` is how many files are expected.
pub(super) fn compile(
    work: &Path,
    steps: u64,
    runner: &Runner,
    watch: &mut dyn Watch,
) -> Result<(), KernelError> {
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let mut make = target("vmlinux", work);
    make.arg("bzImage").arg(format!("-j{jobs}"));
    let mut done = 0;
    watch.at(Step::Compiling, 0, steps);
    runner.run(make, watch, |watch, line| {
        if line.is_some_and(is_step) {
            done += 1;
        }
        watch.at(Step::Compiling, done, steps.max(done));
    })?;
    if done.abs_diff(steps) > done / TOLERANCE {
        tracing::info!("make took {done} steps; the recipe's kernel.steps says {steps}");
    }
    Ok(())
}

/// Whether a line of make tells of a file, as in `  CC      init/main.o`.
fn is_step(line: &str) -> bool {
    let Some(rest) = line.strip_prefix("  ") else {
        return false;
    };
    let tool = rest.split(' ').next().unwrap_or_default();
    !tool.is_empty() && tool.bytes().all(|byte| byte.is_ascii_uppercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_counted_and_nothing_else() {
        for line in [
            "  CC      init/main.o",
            "  AR      built-in.a",
            "  LD      vmlinux",
            "  HOSTCC  scripts/mod/mk_elfconfig",
        ] {
            assert!(is_step(line), "{line}");
        }
        for line in [
            "",
            "Kernel: arch/x86/boot/bzImage is ready  (#1)",
            "    int a;",
            "make[1]: Entering directory",
            "  ",
            "  warning: x",
        ] {
            assert!(!is_step(line), "{line}");
        }
    }
}
