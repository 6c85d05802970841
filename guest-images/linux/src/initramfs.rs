//! The initramfs: a cpio archive in the format that the kernel unpacks (newc), not compressed.
//!
//! The same files make the same bytes: everything is root's, of the year 1970, and in the order of the
//! recipe.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use cpio::NewcBuilder;
use cpio::newc;
use thiserror::Error;

use crate::recipe::{FileSource, Recipe, link_path};

/// Files that the program which builds an image brings along, by the name that recipes call them.
pub type Given = BTreeMap<String, Vec<u8>>;

// File types of a mode, as in stat(2).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// Devices that are there before `/dev` is mounted, with their numbers as in the kernel's Documentation/admin-guide/devices.txt.
/// Without the console the kernel starts /init with no standard input or output; without either, a program of Rust
/// that has none ends at once, and with it the machine.
const DEVICES: [(&str, u32, u32); 2] = [("dev/console", 5, 1), ("dev/null", 1, 3)];

/// The archive of `recipe`.
pub(crate) fn archive(recipe: &Recipe, given: &Given) -> Result<Vec<u8>, InitramfsError> {
    let layout = recipe.initramfs();
    let mut archive = Archive::default();
    for path in &layout.directories {
        archive.directory(path)?;
    }
    archive.directory("dev")?;
    for (path, major, minor) in DEVICES {
        let device = NewcBuilder::new(path).mode(CHARACTER_DEVICE | 0o600);
        archive.add(device.rdev_major(major).rdev_minor(minor), &[])?;
    }
    for file in &layout.files {
        let path = Path::new(&file.path);
        archive.parents(path)?;
        let of_host;
        let bytes = match &file.source {
            FileSource::Recipe(name) => recipe.file(name),
            FileSource::Host { path, .. } => {
                of_host = fs::read(path).map_err(|source| InitramfsError::Read {
                    path: path.clone(),
                    source,
                })?;
                &of_host
            }
            FileSource::Given(name) => given
                .get(name)
                .ok_or_else(|| InitramfsError::NotGiven { name: name.clone() })?,
        };
        archive.add(
            NewcBuilder::new(&file.path).mode(REGULAR | file.mode),
            bytes,
        )?;
        for link in &file.links {
            let link = link_path(&file.path, link);
            archive.parents(&link)?;
            let target = match path.parent() == link.parent() {
                true => path.file_name().unwrap_or_default().into(),
                false => Path::new("/").join(path).into_os_string(),
            };
            archive.add(
                NewcBuilder::new(&link.to_string_lossy()).mode(LINK | 0o777),
                target.as_encoded_bytes(),
            )?;
        }
    }
    archive.finish()
}

/// An archive that grows.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    entries: u32,
}

impl Archive {
    /// A directory and those that it lies in, unless they are there.
    fn directory(&mut self, path: impl AsRef<Path>) -> Result<(), InitramfsError> {
        let path = path.as_ref();
        self.parents(path)?;
        if self.directories.insert(path.to_owned()) {
            let entry = NewcBuilder::new(&path.to_string_lossy())
                .mode(DIRECTORY | 0o755)
                .nlink(2);
            self.add(entry, &[])?;
        }
        Ok(())
    }

    fn parents(&mut self, path: &Path) -> Result<(), InitramfsError> {
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => self.directory(parent),
            _ => Ok(()),
        }
    }

    fn add(&mut self, entry: NewcBuilder, bytes: &[u8]) -> Result<(), InitramfsError> {
        let len = u32::try_from(bytes.len()).map_err(|_| InitramfsError::TooLarge)?;
        // Two entries of one inode number would be one file to the kernel.
        self.entries += 1;
        let entry = entry.ino(self.entries).uid(0).gid(0).mtime(0);
        let mut writer = entry.write(&mut self.bytes, len);
        writer
            .write_all(bytes)
            .and_then(|()| writer.finish().map(drop))
            .map_err(InitramfsError::Write)
    }

    fn finish(mut self) -> Result<Vec<u8>, InitramfsError> {
        newc::trailer(&mut self.bytes).map_err(InitramfsError::Write)?;
        Ok(self.bytes)
    }
}

/// Why there is no initramfs.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// A file of the host.
    #[error("reading {}, a file of the initramfs", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The program that builds does not have it.
    #[error(
        "the recipe wants {name:?} to be given by the program that builds the image, which has no such file; take it from the host (`host`) instead"
    )]
    NotGiven {
        /// As the recipe calls it.
        name: String,
    },
    /// The format counts in 32 bits.
    #[error("a file of the initramfs has 4 GiB or more: put it on a disk")]
    TooLarge,
    /// Memory, since the archive is made there.
    #[error("writing the cpio archive")]
    Write(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use cpio::NewcReader;

    use super::*;
    use crate::tests::Sample;

    /// All that an independent reader finds: mode and content by path, in order.
    fn entries(archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut rest = Cursor::new(archive);
        let mut found = Vec::new();
        loop {
            let reader = NewcReader::new(rest).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                return found;
            }
            assert_eq!((entry.uid(), entry.gid(), entry.mtime()), (0, 0, 0));
            let (name, mode) = (entry.name().to_owned(), entry.mode());
            let mut content = Vec::new();
            rest = reader.to_writer(&mut content).unwrap();
            found.push((name, mode, content));
        }
    }

    #[test]
    fn the_archive_holds_what_the_recipe_says() {
        let sample = Sample::new();
        let bytes = archive(&sample.recipe(), &Given::new()).unwrap();
        let found = entries(&bytes);
        let names: Vec<_> = found.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "proc",
                "dev",
                "dev/console",
                "dev/null",
                "init",
                "usr",
                "usr/bin",
                "usr/bin/busybox",
                "usr/bin/sh"
            ]
        );
        let find = |path: &str| found.iter().find(|(name, ..)| name == path).unwrap();
        assert_eq!(find("proc").1, 0o040_755);
        assert_eq!(find("dev/console").1, 0o020_600);
        assert_eq!(find("init").1, 0o100_755);
        assert_eq!(find("init").2, sample.read("init"));
        assert_eq!(find("usr/bin/busybox").1, 0o100_755);
        assert_eq!(find("usr/bin/busybox").2, b"busybox of the host");
        assert_eq!(
            find("usr/bin/sh"),
            &("usr/bin/sh".into(), 0o120_777, b"busybox".to_vec())
        );
    }

    #[test]
    fn a_link_elsewhere_names_its_file_from_the_root() {
        let sample = Sample::new();
        sample.append(
            "recipe.toml",
            "\n[[initramfs.file]]\npath = \"agent\"\ngiven = \"agent\"\nlinks = [\"sbin/guest\", \"guest\"]\n",
        );
        let given = Given::from([("agent".to_owned(), b"an agent".to_vec())]);
        let found = entries(&archive(&sample.recipe(), &given).unwrap());
        let find = |path: &str| &found.iter().find(|(name, ..)| name == path).unwrap().2;
        assert_eq!(find("sbin/guest"), b"/agent");
        assert_eq!(find("guest"), b"agent");
        assert!(find("sbin").is_empty());
    }

    #[test]
    fn the_same_files_make_the_same_bytes() {
        let sample = Sample::new();
        let first = archive(&sample.recipe(), &Given::new()).unwrap();
        assert_eq!(archive(&sample.recipe(), &Given::new()).unwrap(), first);
        assert_eq!(
            first.len() % 4,
            0,
            "the kernel reads entries at multiples of 4"
        );
    }

    #[test]
    fn a_file_can_be_given_by_the_program_that_builds() {
        let sample = Sample::new();
        sample.append(
            "recipe.toml",
            "\n[[initramfs.file]]\npath = \"sbin/agent\"\ngiven = \"agent\"\n",
        );
        let error = archive(&sample.recipe(), &Given::new()).unwrap_err();
        assert!(error.to_string().contains("\"agent\""), "{error}");
        let given = Given::from([("agent".to_owned(), b"an agent".to_vec())]);
        let found = entries(&archive(&sample.recipe(), &given).unwrap());
        assert_eq!(
            found.last().unwrap(),
            &("sbin/agent".into(), 0o100_644, b"an agent".to_vec())
        );
    }

    #[test]
    fn a_file_that_went_away_is_named() {
        let sample = Sample::new();
        fs::remove_file(sample.busybox()).unwrap();
        let error = archive(&sample.recipe(), &Given::new()).unwrap_err();
        assert!(error.to_string().contains("busybox"), "{error}");
    }
}
