//! `forkvm image`: Linux images to boot, built from recipes and kept in the user's cache.

mod build;
mod progress;

use std::io::Write;
use std::time::SystemTime;

use clap::{Args, Subcommand};
use comfy_table::{Table, presets};
use forkvm_linux_image::{Cache, Image as LinuxImage, Removed};
use serde_json::{Value, json};

use super::output::{Outcome, Output};

pub(crate) use build::find_or_build;

const BUILD: &str = "\
Examples:
  forkvm image build minimal                     forkvm's own Linux: 6.1, virtio-mmio, busybox
  forkvm image build ./my-recipe                 a recipe of your own: a directory with recipe.toml
  forkvm image build minimal --json - | jq -r .directory

The image is kept in $XDG_CACHE_HOME/forkvm/images (or ~/.cache/forkvm/images) under a hash of all that went
into it; when nothing of that has changed it is found there. docs/images.md says more.

Ends with 3 when the host lacks something: all of it is named, with the command that installs it.";

const RM: &str = "\
Examples:
  forkvm image rm minimal                        all images of that name
  forkvm image rm minimal-0123456789abcdef       one of them
  forkvm image rm --stale                        of each name all but the one that was used last,
                                                 and what builds that failed or died have left";

/// Subcommands of `image`.
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    /// Build an image, or find it in the cache
    #[command(after_help = BUILD)]
    Build(build::Build),
    /// List the images in the cache
    Ls,
    /// Remove images from the cache
    #[command(after_help = RM)]
    Rm(Rm),
}

/// Options of `image rm`.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Rm {
    /// An image's name, or that of its directory
    name: Option<String>,
    /// Remove what nobody is likely to ask for again
    #[arg(long)]
    stale: bool,
}

impl Image {
    pub(crate) fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        match self {
            Image::Build(command) => command.run(output),
            Image::Ls => list(output),
            Image::Rm(command) => command.run(output),
        }
    }
}

fn list(output: &Output) -> anyhow::Result<Outcome> {
    let cache = Cache::of_user()?;
    let images = cache.images()?;
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["image", "kernel", "size", "last used"]);
    for image in &images {
        let size = format!("{:.1} MiB", image.bytes() as f64 / f64::from(1 << 20));
        table.add_row([
            directory_name(image),
            image.kernel_version().to_owned(),
            size,
            last_used(image),
        ]);
    }
    let mut text = output.text();
    if images.is_empty() {
        writeln!(text, "no images in {}", cache.directory().display())?;
    } else {
        writeln!(text, "{table}")?;
        writeln!(text, "in {}", cache.directory().display())?;
    }
    let images: Vec<_> = images.iter().map(to_json).collect();
    Ok(Outcome::done(
        json!({ "cache": cache.directory(), "images": images }),
    ))
}

impl Rm {
    fn run(self, output: &Output) -> anyhow::Result<Outcome> {
        let cache = Cache::of_user()?;
        let removed = match &self.name {
            Some(name) => cache.remove(name)?,
            None => cache.remove_stale()?,
        };
        let mut text = output.text();
        for Removed { path, bytes } in &removed {
            writeln!(text, "removed {}, {} KiB", path.display(), kib(*bytes))?;
        }
        if removed.is_empty() {
            writeln!(text, "nothing to remove")?;
        }
        let removed: Vec<_> = removed
            .iter()
            .map(|removed| json!({ "path": removed.path, "kib": kib(removed.bytes) }))
            .collect();
        Ok(Outcome::done(json!({ "removed": removed })))
    }
}

/// What is said of an image wherever one is.
fn to_json(image: &LinuxImage) -> Value {
    let files: serde_json::Map<_, _> = image
        .files()
        .iter()
        .map(|(name, file)| (name.clone(), kib(file.bytes).into()))
        .collect();
    json!({
        "name": image.name(),
        "hash": image.hash(),
        "directory": image.directory(),
        "kernel_version": image.kernel_version(),
        "cmdline": image.cmdline(),
        "files": files,
    })
}

fn directory_name(image: &LinuxImage) -> String {
    let name = image.directory().file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn last_used(image: &LinuxImage) -> String {
    let ago = image
        .used()
        .ok()
        .and_then(|used| SystemTime::now().duration_since(used).ok())
        .unwrap_or_default()
        .as_secs();
    match ago {
        0..120 => "just now".into(),
        120..7_200 => format!("{} minutes ago", ago / 60),
        7_200..172_800 => format!("{} hours ago", ago / 3_600),
        _ => format!("{} days ago", ago / 86_400),
    }
}

fn kib(bytes: u64) -> u64 {
    bytes.div_ceil(1024)
}
