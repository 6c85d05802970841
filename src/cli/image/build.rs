//! `forkvm image build`.

use std::io::Write;
use std::time::Instant;

use anyhow::Context;
use clap::Args;
use forkvm_guest_images as guest_images;
use forkvm_linux_image::{
    BuildError, Built, Cache, Given, Recipe, RecipeError, Request, SourceKernel, build,
};

use super::progress::Bar;
use super::{kib, to_json};
use crate::cli::errors::Usage;
use crate::cli::output::{Outcome, Output};
use crate::cli::stop::Stop;

/// What recipes call forkvm's agent.
const AGENT: &str = "agent";

/// Options of `image build`.
#[derive(Debug, Args)]
pub(crate) struct Build {
    /// A recipe of forkvm's (`minimal`), or the path of a recipe's directory, with a slash in it
    #[arg(value_name = "NAME|DIR")]
    recipe: String,
}

impl Build {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let start = Instant::now();
        let stop = Stop::on_signals().context("hearing signals")?;
        let built = match find_or_build(&self.recipe, &stop, output) {
            Err(error) if error.is::<BuildError>() => return stop.outcome(error),
            built => built?,
        };
        let took = start.elapsed();
        print(&mut output.text(), &built, took.as_secs_f64())?;
        let mut report = to_json(&built.image);
        report["built"] = built.fresh.into();
        report["took_ms"] = u64::try_from(took.as_millis())?.into();
        Ok(Outcome::done(report))
    }
}

/// The image of `recipe`, from the cache or built, until `stop` is asked for.
pub(crate) fn find_or_build(recipe: &str, stop: &Stop, output: &Output) -> anyhow::Result<Built> {
    let recipe = Recipe::find(recipe).map_err(|error| match error {
        RecipeError::Unknown { .. } => Usage(error.to_string()).into(),
        error => anyhow::Error::from(error),
    })?;
    let cache = Cache::of_user()?;
    let request = Request {
        recipe: &recipe,
        given: &Given::from([(AGENT.to_owned(), guest_images::AGENT.to_vec())]),
        kernel: &SourceKernel,
        cache: &cache,
    };
    let mut bar = Bar::new(output.text(), stop.asked());
    Ok(build(&request, &mut bar)?)
}

fn print(out: &mut dyn Write, built: &Built, seconds: f64) -> anyhow::Result<()> {
    let image = &built.image;
    let how = if built.fresh {
        "built"
    } else {
        "found in the cache"
    };
    let (name, version) = (image.name(), image.kernel_version());
    writeln!(out, "{name}, Linux {version}, {how} in {seconds:.1} s")?;
    for (name, file) in image.files() {
        let path = image.directory().join(name);
        writeln!(out, "  {:>8} KiB  {}", kib(file.bytes), path.display())?;
    }
    writeln!(
        out,
        "to boot it: forkvm run --kernel {} --initrd {} --cmdline '{}'",
        image.vmlinux().display(),
        image.initramfs().display(),
        image.cmdline()
    )?;
    Ok(())
}
