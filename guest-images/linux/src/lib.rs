//! Builds the Linux images that forkvm boots.
//!
//! A [`Recipe`] says what an image is made of: a kernel from Debian's source package with a list of
//! options, and an initramfs of files. [`build`] makes it, and keeps it in the [`Cache`] under a hash of
//! everything that went into it, so that a second build is a look-up. What comes out is an [`Image`]: a
//! directory with `vmlinux`, `bzImage`, `initramfs.cpio` and a description.
//!
//! This runs on the host, knows no KVM and starts no machine. The `forkvm image` command calls it.

mod build;
mod cache;
mod fingerprint;
mod image;
mod initramfs;
mod kernel;
mod recipe;
mod requirements;
mod watch;

#[cfg(test)]
mod tests;

pub use build::{BuildError, Built, Request, build};
pub use cache::{Cache, CacheError, Removed};
pub use fingerprint::{Fingerprint, FingerprintError};
pub use image::{FileRecord, Image, ImageError, Origin};
pub use initramfs::{Given, InitramfsError};
pub use kernel::{CommandError, KernelError, KernelMaker, OptionsError, SourceKernel};
pub use recipe::{LayoutError, Recipe, RecipeError, built_in};
pub use requirements::{Lacking, Requirement};
pub use watch::{Step, Watch};
