//! One build of an image, from recipe to cache.
//!
//! Everything is made in a directory of its own inside the cache, and moved to its place at the very end,
//! so an image is there whole or not at all. Whatever happens, that directory goes; only the log of a build
//! that failed stays.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::cache::{Cache, CacheError, Lock};
use crate::fingerprint::{Fingerprint, FingerprintError};
use crate::image::{Description, INITRAMFS, Image, ImageError};
use crate::initramfs::{self, Given, InitramfsError};
use crate::kernel::{KernelError, KernelMaker};
use crate::recipe::Recipe;
use crate::requirements::{self, Lacking};
use crate::watch::{Step, Watch};

/// What is to be built, of what, and where to.
pub struct Request<'a> {
    /// What the image is made of.
    pub recipe: &'a Recipe,
    /// Files that the recipe expects of its caller.
    pub given: &'a Given,
    /// Makes the kernel.
    pub kernel: &'a dyn KernelMaker,
    /// Where the image is kept.
    pub cache: &'a Cache,
}

/// An image, and how it came.
#[derive(Clone, Debug)]
pub struct Built {
    /// The image.
    pub image: Image,
    /// It was not in the cache.
    pub fresh: bool,
}

/// Finds the image in the cache, or builds it. All that the host lacks for that is said before anything
/// starts.
pub fn build(request: &Request<'_>, watch: &mut dyn Watch) -> Result<Built, BuildError> {
    find_or_make(request, requirements::check(request.recipe), watch)
}

/// [`build`] on a host of which is known what it lacks.
pub(crate) fn find_or_make(
    request: &Request<'_>,
    host: Result<(), Lacking>,
    watch: &mut dyn Watch,
) -> Result<Built, BuildError> {
    let Request { recipe, cache, .. } = request;
    let host = match host {
        Err(lacking) if lacking.hides_the_image() => return Err(lacking.into()),
        host => host,
    };
    let inputs = Fingerprint::of(recipe, request.given)?;
    if let Some(image) = cached(cache, recipe, &inputs) {
        return Ok(image);
    }
    host?;
    let Some(lock) = cache.lock(watch)? else {
        return Err(BuildError::Stopped);
    };
    // Whoever held the lock may have built it.
    if let Some(image) = cached(cache, recipe, &inputs) {
        return Ok(image);
    }
    for removed in cache.sweep(&lock)? {
        tracing::info!(path = %removed.path.display(), "removed what a dead builder left");
    }
    let place = make(request, &inputs, &lock, watch)?;
    let image = Image::open(&place)?;
    Ok(Built { image, fresh: true })
}

fn cached(cache: &Cache, recipe: &Recipe, inputs: &Fingerprint) -> Option<Built> {
    let image = cache.find(recipe.name(), inputs)?;
    if let Err(error) = image.touch() {
        tracing::warn!(%error, "it could not be noted that the image is in use");
    }
    Some(Built {
        image,
        fresh: false,
    })
}

/// Makes the image that is not there. Answers where it is.
fn make(
    request: &Request<'_>,
    inputs: &Fingerprint,
    lock: &Lock,
    watch: &mut dyn Watch,
) -> Result<PathBuf, BuildError> {
    let Request { recipe, cache, .. } = request;
    // First, since it fails at once or not at all.
    let initramfs = initramfs::archive(recipe, request.given)?;
    let directory = cache.work(lock)?;
    let (work, out) = (
        directory.path().join("source"),
        directory.path().join("image"),
    );
    for path in [&work, &out] {
        fs::create_dir(path).map_err(failed("making the directory", path))?;
    }
    let kernel_hash = inputs.of_kernel(recipe);
    let kernel_version = match reuse_kernel(cache, &kernel_hash, &out)? {
        Some(version) => version,
        None => {
            let log = cache.log(recipe.name(), inputs)?;
            let made = request.kernel.make(recipe, &work, &out, &log, watch);
            if matches!(made, Ok(_) | Err(KernelError::Stopped)) {
                remove_log(&log);
            }
            made?
        }
    };
    watch.at(Step::Packing, 0, 0);
    let path = out.join(INITRAMFS);
    fs::write(&path, initramfs).map_err(failed("writing", &path))?;
    let description = Description {
        format: 0,
        name: recipe.name().to_owned(),
        hash: inputs.hash(),
        kernel_hash,
        origin: recipe.origin().clone(),
        kernel_version,
        cmdline: recipe.cmdline().to_owned(),
        files: BTreeMap::new(),
        inputs: inputs.clone(),
    };
    Image::describe(&out, description).map_err(failed("describing the image in", &out))?;
    // A package may have been upgraded in these minutes: the image would have another's name.
    if Fingerprint::of(recipe, request.given)? != *inputs {
        return Err(BuildError::Changed);
    }
    if watch.stop() {
        return Err(BuildError::Stopped);
    }
    let place = cache.place(recipe.name(), inputs);
    cache.publish(lock, &out, &place)?;
    if let Err(error) = directory.close() {
        tracing::warn!(%error, "the directory of the build could not be removed; the next build will");
    }
    Ok(place)
}

/// Takes the kernel of an image that has the same. Answers its release.
fn reuse_kernel(cache: &Cache, hash: &str, out: &Path) -> Result<Option<String>, BuildError> {
    for image in cache.images()? {
        if image.kernel_hash() != hash {
            continue;
        }
        match image.copy_kernel(out) {
            Ok(true) => {
                tracing::info!(of = %image.directory().display(), "the kernel is there already");
                return Ok(Some(image.kernel_version().to_owned()));
            }
            Ok(false) => {
                tracing::warn!(image = %image.directory().display(), "its kernel is not as it was built: another is compiled");
            }
            // It may have been removed right now.
            Err(error) => {
                tracing::info!(%error, image = %image.directory().display(), "its kernel cannot be copied");
            }
        }
    }
    Ok(None)
}

/// Only the log of a build that failed is of use to anybody.
fn remove_log(log: &Path) {
    match fs::remove_file(log) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(%error, log = %log.display(), "the log could not be removed");
        }
        _ => {}
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io {
        action,
        path,
        source,
    }
}

/// There is no image.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The host cannot build it.
    #[error(transparent)]
    Lacking(#[from] Lacking),
    /// An input.
    #[error(transparent)]
    Fingerprint(#[from] FingerprintError),
    /// The directory that images are in.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The kernel.
    #[error("building the kernel")]
    Kernel(#[source] KernelError),
    /// The initramfs.
    #[error("making the initramfs")]
    Initramfs(#[from] InitramfsError),
    /// What was built cannot be read back.
    #[error("the image was built, and is not whole")]
    Image(#[from] ImageError),
    /// A file of the image.
    #[error("{action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Nothing was kept.
    #[error(
        "an input of the image changed while it was built (a package was upgraded?): build it again"
    )]
    Changed,
    /// Told to.
    #[error("the build was stopped; nothing of it was kept")]
    Stopped,
}

impl From<KernelError> for BuildError {
    fn from(error: KernelError) -> BuildError {
        match error {
            KernelError::Stopped => BuildError::Stopped,
            error => BuildError::Kernel(error),
        }
    }
}
