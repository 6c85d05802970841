//! The text of `recipe.toml`: its keys, and what they may be. docs/images.md explains them to users.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::{self, Utf8Error};

use serde::Deserialize;
use thiserror::Error;

/// The whole file. A key that is not known is refused by name: it would otherwise be a wish that
/// nobody hears.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct Layout {
    pub(crate) about: String,
    pub(crate) cmdline: String,
    pub(crate) kernel: KernelLayout,
    pub(crate) initramfs: InitramfsLayout,
}

/// `[kernel]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct KernelLayout {
    /// The source, an archive that tar and xz unpack.
    pub(crate) source: PathBuf,
    /// The Debian package that brings it.
    pub(crate) package: String,
    /// Target of the kernel's Makefile that makes the configuration which `config` is put on.
    pub(crate) base: String,
    /// Name of the list of options, a file of the recipe.
    pub(crate) config: String,
    /// Patterns of files that are not unpacked, relative to the source; `*` stands for slashes too.
    #[serde(default)]
    pub(crate) leave_out: Vec<String>,
    /// How many files are compiled and linked.
    #[serde(default)]
    pub(crate) steps: u64,
}

/// `[initramfs]`
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(crate) struct InitramfsLayout {
    /// Empty directories; those of files and links come by themselves.
    #[serde(default)]
    pub(crate) directories: Vec<String>,
    #[serde(default, rename = "file")]
    pub(crate) files: Vec<InitramfsFile>,
}

/// `[[initramfs.file]]`
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "RawFile")]
pub(crate) struct InitramfsFile {
    /// Where it goes, without a slash in front.
    pub(crate) path: String,
    pub(crate) source: FileSource,
    /// Permissions.
    pub(crate) mode: u32,
    /// Symbolic links to it: names in the same directory, or paths like `path`, with a slash in them.
    pub(crate) links: Vec<String>,
}

/// Where a file comes from: one of three keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FileSource {
    /// A file of the recipe.
    Recipe(String),
    /// A file of the host, and the package that brings it.
    Host { path: PathBuf, package: String },
    /// The program that builds the image has it.
    Given(String),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct RawFile {
    path: String,
    recipe: Option<String>,
    host: Option<PathBuf>,
    package: Option<String>,
    given: Option<String>,
    #[serde(default = "plain_mode")]
    mode: u32,
    #[serde(default)]
    links: Vec<String>,
}

fn plain_mode() -> u32 {
    0o644
}

impl TryFrom<RawFile> for InitramfsFile {
    type Error = String;

    fn try_from(raw: RawFile) -> Result<InitramfsFile, String> {
        let path = raw.path;
        let source = match (raw.recipe, raw.host, raw.package, raw.given) {
            (Some(name), None, None, None) => FileSource::Recipe(name),
            (None, Some(host), Some(package), None) if host.is_absolute() => FileSource::Host {
                path: host,
                package,
            },
            (None, None, None, Some(name)) => FileSource::Given(name),
            _ => {
                return Err(format!(
                    "the file {path:?} needs exactly one of `recipe`, `given`, and `host` (an absolute path) with the `package` that brings it"
                ));
            }
        };
        if raw.mode > 0o7777 {
            return Err(format!("the file {path:?} has no mode {:#o}", raw.mode));
        }
        Ok(InitramfsFile {
            path,
            source,
            mode: raw.mode,
            links: raw.links,
        })
    }
}

/// Where the link that a recipe calls `link` lies, of the file at `path`.
pub(crate) fn link_path(path: &str, link: &str) -> PathBuf {
    if link.contains('/') {
        PathBuf::from(link)
    } else {
        Path::new(path).with_file_name(link)
    }
}

impl Layout {
    pub(crate) fn parse(text: &[u8]) -> Result<Layout, LayoutError> {
        let layout: Layout = toml::from_str(str::from_utf8(text)?)?;
        layout.check()?;
        Ok(layout)
    }

    /// Names of files of the recipe that the text names.
    pub(crate) fn recipe_files(&self) -> impl Iterator<Item = &str> {
        let of_files = self
            .initramfs
            .files
            .iter()
            .filter_map(|file| match &file.source {
                FileSource::Recipe(name) => Some(name.as_str()),
                FileSource::Host { .. } | FileSource::Given(_) => None,
            });
        of_files.chain([self.kernel.config.as_str()])
    }

    fn check(&self) -> Result<(), LayoutError> {
        if !self.kernel.source.is_absolute() {
            return Err(LayoutError::Relative(self.kernel.source.clone()));
        }
        let base = &self.kernel.base;
        let word = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
        if !base.ends_with("config") || !base.bytes().all(word) || base.starts_with('-') {
            return Err(LayoutError::Base(base.clone()));
        }
        // The kernel's command line is one line.
        if self.cmdline.contains(['\n', '\0']) {
            return Err(LayoutError::Cmdline);
        }
        let mut seen = BTreeSet::new();
        for path in &self.initramfs.directories {
            inside(path)?;
        }
        for file in &self.initramfs.files {
            inside(&file.path)?;
            let mut paths = vec![PathBuf::from(&file.path)];
            for link in &file.links {
                inside(link)?;
                paths.push(link_path(&file.path, link));
            }
            for path in paths {
                if !seen.insert(path.clone()) {
                    return Err(LayoutError::Twice(path));
                }
            }
        }
        for path in &self.initramfs.directories {
            if seen.contains(Path::new(path)) {
                return Err(LayoutError::Twice(PathBuf::from(path)));
            }
        }
        Ok(())
    }
}

/// Paths of the archive are relative, and stay inside it.
fn inside(path: &str) -> Result<(), LayoutError> {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    if path.contains('\0') || !path.split('/').all(plain) {
        return Err(LayoutError::Path(path.to_owned()));
    }
    Ok(())
}

/// What is wrong with a recipe's text.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// Its syntax, a key that is not known, one that is missing.
    #[error("recipe.toml: {0}")]
    Toml(#[from] toml::de::Error),
    /// No text.
    #[error("recipe.toml is not UTF-8: {0}")]
    Utf8(#[from] Utf8Error),
    /// A file that it names, or itself.
    #[error("there is no file {0:?} in it; recipe.toml and all files that it names belong there")]
    Missing(String),
    /// A source that depends on where one stands.
    #[error("kernel.source: {0:?} is not an absolute path")]
    Relative(PathBuf),
    /// Something else would be built.
    #[error("kernel.base: {0:?} is no target that makes a configuration, such as tinyconfig")]
    Base(String),
    /// More than a line.
    #[error("cmdline is not one line of text")]
    Cmdline,
    /// A path that leaves the archive.
    #[error("{0:?} is no path of an initramfs: write it as bin/sh, with no slash in front")]
    Path(String),
    /// Two things at one path.
    #[error("the initramfs has {0:?} twice")]
    Twice(PathBuf),
}
