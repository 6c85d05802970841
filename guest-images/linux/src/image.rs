//! A finished image: a directory with the files that a machine boots, and `image.json`, which
//! describes them. This module reads and writes the description; `cache` knows where images are.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::fingerprint::Fingerprint;

/// The kernel as an ELF file, stripped.
pub(crate) const VMLINUX: &str = "vmlinux";
/// The same kernel, compressed, for boot loaders.
pub(crate) const BZIMAGE: &str = "bzImage";
pub(crate) const INITRAMFS: &str = "initramfs.cpio";
/// The kernel's final configuration.
pub(crate) const CONFIG: &str = "kernel.config";
/// What a kernel is in an image.
pub(crate) const KERNEL_FILES: [&str; 3] = [VMLINUX, BZIMAGE, CONFIG];
/// The description.
const DESCRIPTION: &str = "image.json";

/// Version of `image.json`; a newer one is refused.
const FORMAT: u32 = 1;

/// An image in the cache.
#[derive(Clone, Debug)]
pub struct Image {
    directory: PathBuf,
    description: Description,
}

/// `image.json`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Description {
    pub(crate) format: u32,
    pub(crate) name: String,
    /// Of all inputs.
    pub(crate) hash: String,
    /// Of the inputs of its kernel.
    pub(crate) kernel_hash: String,
    pub(crate) origin: Origin,
    /// `uname -r` of a machine that runs it.
    pub(crate) kernel_version: String,
    pub(crate) cmdline: String,
    pub(crate) files: BTreeMap<String, FileRecord>,
    pub(crate) inputs: Fingerprint,
}

/// Where a recipe lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// In forkvm's binary.
    BuiltIn,
    /// In a directory of the user's.
    Directory(PathBuf),
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its length.
    pub bytes: u64,
    /// The blake3 hash of its content, in hexadecimal.
    pub blake3: String,
}

impl FileRecord {
    fn of(path: &Path) -> io::Result<FileRecord> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_mmap_rayon(path)?;
        Ok(FileRecord {
            bytes: fs::metadata(path)?.len(),
            blake3: hasher.finalize().to_hex().to_string(),
        })
    }
}

impl Image {
    /// The image in `directory`. All its files must be there, as long as they are described; their
    /// content is not read.
    pub fn open(directory: &Path) -> Result<Image, ImageError> {
        let path = directory.join(DESCRIPTION);
        let text = fs::read(&path).map_err(|source| ImageError::Read {
            path: path.clone(),
            source,
        })?;
        let invalid = |source| ImageError::Description {
            path: path.clone(),
            source,
        };
        // A later format may look otherwise, so its number is read first.
        let Format { format } = serde_json::from_slice(&text).map_err(invalid)?;
        if format > FORMAT {
            return Err(ImageError::Newer { path, format });
        }
        let description: Description = serde_json::from_slice(&text).map_err(invalid)?;
        for (name, record) in &description.files {
            let path = directory.join(name);
            let found = fs::metadata(&path).map_err(|source| ImageError::Read {
                path: path.clone(),
                source,
            })?;
            if found.len() != record.bytes {
                return Err(ImageError::Length {
                    path,
                    bytes: record.bytes,
                    found: found.len(),
                });
            }
        }
        Ok(Image {
            directory: directory.to_owned(),
            description,
        })
    }

    /// Describes the files in `directory`, and brings all of it to the disk. Nothing of it may be
    /// seen under its final name before.
    pub(crate) fn describe(directory: &Path, mut description: Description) -> io::Result<()> {
        description.format = FORMAT;
        for name in [VMLINUX, BZIMAGE, INITRAMFS, CONFIG] {
            let path = directory.join(name);
            File::open(&path)?.sync_all()?;
            description
                .files
                .insert(name.to_owned(), FileRecord::of(&path)?);
        }
        let mut text = serde_json::to_vec_pretty(&description)?;
        text.push(b'\n');
        let path = directory.join(DESCRIPTION);
        fs::write(&path, text)?;
        File::open(&path)?.sync_all()?;
        File::open(directory)?.sync_all()
    }

    /// Copies its kernel into the directory `out`. Answers whether what is there now is what was built.
    pub(crate) fn copy_kernel(&self, out: &Path) -> io::Result<bool> {
        let mut whole = true;
        for name in KERNEL_FILES {
            let copy = out.join(name);
            // Not a link: removing an image would change times of another's kernel, which templates look at.
            fs::copy(self.directory.join(name), &copy)?;
            whole &= self.files().get(name) == Some(&FileRecord::of(&copy)?);
        }
        Ok(whole)
    }

    /// Of the inputs of its kernel: images that agree in it have the same kernel.
    pub(crate) fn kernel_hash(&self) -> &str {
        &self.description.kernel_hash
    }

    /// Notes that the image is used now.
    pub(crate) fn touch(&self) -> io::Result<()> {
        // The description's, so that the kernel's times, which templates look at, stay as they are.
        File::open(self.directory.join(DESCRIPTION))?.set_modified(SystemTime::now())
    }

    /// When the image was built, or last asked for.
    pub fn used(&self) -> io::Result<SystemTime> {
        fs::metadata(self.directory.join(DESCRIPTION))?.modified()
    }

    /// The recipe's name.
    pub fn name(&self) -> &str {
        &self.description.name
    }

    /// Of all inputs, in hexadecimal.
    pub fn hash(&self) -> &str {
        &self.description.hash
    }

    /// Where its recipe was.
    pub fn origin(&self) -> &Origin {
        &self.description.origin
    }

    /// What `uname -r` says in a machine that runs it.
    pub fn kernel_version(&self) -> &str {
        &self.description.kernel_version
    }

    /// The kernel's command line, unless the user has another.
    pub fn cmdline(&self) -> &str {
        &self.description.cmdline
    }

    /// Where the files are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The kernel as an ELF file: what forkvm boots.
    pub fn vmlinux(&self) -> PathBuf {
        self.directory.join(VMLINUX)
    }

    /// The kernel for other boot loaders.
    pub fn bzimage(&self) -> PathBuf {
        self.directory.join(BZIMAGE)
    }

    /// The initial RAM file system.
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join(INITRAMFS)
    }

    /// Its files, by name, the description apart.
    pub fn files(&self) -> &BTreeMap<String, FileRecord> {
        &self.description.files
    }

    /// Length of all files together, in bytes.
    pub fn bytes(&self) -> u64 {
        self.files().values().map(|file| file.bytes).sum()
    }
}

#[derive(Deserialize)]
struct Format {
    format: u32,
}

/// What is in the cache is not a whole image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// A file is missing, or cannot be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// No description.
    #[error("{} describes no image", path.display())]
    Description {
        /// The description.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Made by a later forkvm.
    #[error("{} has format {format}, and this forkvm knows none above {FORMAT}", path.display())]
    Newer {
        /// The description.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// A file was cut off, or replaced.
    #[error("{} has {found} bytes, not the {bytes} that it was made with", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// As described.
        bytes: u64,
        /// As it is.
        found: u64,
    },
}
