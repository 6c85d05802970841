//! The kernel of an image: from Debian's source package to `vmlinux`, `bzImage` and its configuration.
//!
//! [`SourceKernel`] does it, in a directory that its caller removes: unpack (`source`), configure
//! (`options`), compile (`make`). It is behind a trait so that tests of all else need no compiler.

mod command;
mod make;
mod options;
mod source;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

pub use command::CommandError;
pub use options::OptionsError;

use crate::image::{BZIMAGE, CONFIG, VMLINUX};
use crate::recipe::Recipe;
use crate::watch::{Step, Watch};
use command::Runner;
use options::Options;

/// Makes kernels.
pub trait KernelMaker {
    /// Makes the kernel of `recipe` in the empty directory `work`, puts `vmlinux`, `bzImage` and
    /// `kernel.config` into the directory `out`, and answers the kernel's release. What programs print goes to
    /// `log`.
    fn make(
        &self,
        recipe: &Recipe,
        work: &Path,
        out: &Path,
        log: &Path,
        watch: &mut dyn Watch,
    ) -> Result<String, KernelError>;
}

/// Compiles the source that the recipe names.
#[derive(Clone, Copy, Debug)]
pub struct SourceKernel;

impl KernelMaker for SourceKernel {
    fn make(
        &self,
        recipe: &Recipe,
        work: &Path,
        out: &Path,
        log: &Path,
        watch: &mut dyn Watch,
    ) -> Result<String, KernelError> {
        let layout = recipe.kernel();
        let log_file = File::create(log).map_err(failed("making the log", log))?;
        let runner = Runner::new(log.to_owned(), log_file);
        source::unpack(layout, work, &runner, watch)?;

        watch.at(Step::Configuring, 0, 0);
        let asked = Options::parse(recipe.file(&layout.config))?;
        let list = work.join("forkvm.config");
        fs::write(&list, recipe.file(&layout.config)).map_err(failed("writing", &list))?;
        let mut merge = command::new("scripts/kconfig/merge_config.sh", work);
        merge.args(["-m", ".config", "forkvm.config"]);
        for step in [
            make::target(&layout.base, work),
            merge,
            make::target("olddefconfig", work),
        ] {
            runner.run(step, watch, |_, _| {})?;
        }
        let config = work.join(".config");
        let result = fs::read(&config).map_err(failed("reading", &config))?;
        asked.check(&Options::parse(&result)?)?;

        make::compile(work, layout.steps, &runner, watch)?;
        let release = work.join("include/config/kernel.release");
        let release = fs::read_to_string(&release).map_err(failed("reading", &release))?;
        let mut strip = command::new("strip", work);
        strip
            .args(["--strip-all", "vmlinux", "-o"])
            .arg(out.join(VMLINUX));
        runner.run(strip, watch, |_, _| {})?;
        for (from, to) in [("arch/x86/boot/bzImage", BZIMAGE), (".config", CONFIG)] {
            let from = work.join(from);
            fs::copy(&from, out.join(to)).map_err(failed("copying", &from))?;
        }
        Ok(release.trim().to_owned())
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KernelError {
    let path = path.to_owned();
    move |source| KernelError::Io {
        action,
        path,
        source,
    }
}

/// There is no kernel.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A program of the build failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The options are not what was asked for.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// A file of the build.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Told to.
    #[error("the build was stopped")]
    Stopped,
}
