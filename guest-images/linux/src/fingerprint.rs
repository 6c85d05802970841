//! The hash that an image is kept under: of everything that goes into it.
//!
//! Each input is hashed by itself and listed by name, so that the description of an image can say by
//! which input two images of one recipe differ.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::initramfs::Given;
use crate::recipe::{FileSource, Recipe};

/// Raised when this crate makes another image of the same inputs.
const BUILDER: &str = "1";
/// Hexadecimal digits of the hash in names of directories.
const SHORT: usize = 16;

/// Hashes of all inputs of an image, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// Of what `recipe` makes on this host. Reads every input: the kernel's source is the largest,
    /// and takes a tenth of a second once it is in the page cache.
    pub fn of(recipe: &Recipe, given: &Given) -> Result<Fingerprint, FingerprintError> {
        let mut inputs = BTreeMap::from([("builder".to_owned(), BUILDER.to_owned())]);
        // What the image is called, not where its recipe lies.
        inputs.insert("name".to_owned(), recipe.name().to_owned());
        for (name, bytes) in recipe.files() {
            inputs.insert(format!("recipe/{name}"), hex(bytes));
        }
        inputs.insert(
            "kernel source".to_owned(),
            of_file(&recipe.kernel().source)?,
        );
        for file in &recipe.initramfs().files {
            match &file.source {
                FileSource::Recipe(_) => {}
                FileSource::Host { path, .. } => {
                    inputs.insert(format!("host{}", path.display()), of_file(path)?);
                }
                FileSource::Given(name) => {
                    // One that is not given is an error of the initramfs, which names it.
                    let bytes = given.get(name).map_or(&[][..], Vec::as_slice);
                    inputs.insert(format!("given/{name}"), hex(bytes));
                }
            }
        }
        for program in ["gcc", "ld"] {
            inputs.insert(program.to_owned(), version_of(program)?);
        }
        Ok(Fingerprint(inputs))
    }

    /// One hash of all, in hexadecimal.
    pub fn hash(&self) -> String {
        let pairs = self.0.iter();
        hash_of(pairs.flat_map(|(name, value)| [name.as_str(), value]))
    }

    /// A hash of what `recipe`'s kernel is made of, and of nothing else: an image whose initramfs alone has
    /// changed need not be compiled again.
    pub(crate) fn of_kernel(&self, recipe: &Recipe) -> String {
        let layout = recipe.kernel();
        let config = format!("recipe/{}", layout.config);
        let of_host = ["builder", "kernel source", "gcc", "ld", config.as_str()];
        let values = of_host
            .iter()
            .map(|name| self.0.get(*name).map_or("", String::as_str));
        let patterns = layout.leave_out.iter().map(String::as_str);
        hash_of(values.chain([layout.base.as_str()]).chain(patterns))
    }

    /// The part of the hash that names of directories carry.
    pub fn short(&self) -> String {
        self.hash().chars().take(SHORT).collect()
    }
}

impl Display for Fingerprint {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

fn hash_of<'a>(parts: impl Iterator<Item = &'a str>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        // With its length, so that no two lists are one text.
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}

fn hex(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

fn of_file(path: &Path) -> Result<String, FingerprintError> {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_mmap_rayon(path)
        .map_err(|source| FingerprintError::Read {
            path: path.to_owned(),
            source,
        })?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// The first line of `PROGRAM --version`, which has the distribution's revision too.
fn version_of(program: &'static str) -> Result<String, FingerprintError> {
    let output = Command::new(program)
        .arg("--version")
        .env("LC_ALL", "C")
        .output()
        .map_err(|source| FingerprintError::Run { program, source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.to_owned()),
        _ => Err(FingerprintError::Version {
            program,
            said: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        }),
    }
}

/// An input could not be read.
#[derive(Debug, Error)]
pub enum FingerprintError {
    /// A file.
    #[error("reading {}, an input of the image", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program of the build.
    #[error("running `{program} --version`")]
    Run {
        /// The program.
        program: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It ran, and did not say.
    #[error("`{program} --version` printed no version, but: {said}")]
    Version {
        /// The program.
        program: &'static str,
        /// What it wrote to standard error.
        said: String,
    },
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::tests::Sample;

    #[test]
    fn the_hash_is_that_of_the_inputs_and_nothing_else() {
        let (one, other) = (Sample::new(), Sample::new());
        let hash = |sample: &Sample| {
            Fingerprint::of(&sample.recipe(), &Given::new())
                .unwrap()
                .hash()
        };
        assert_eq!(hash(&one), hash(&one));
        // The same recipe in another place makes the same image, but for host files' own paths.
        let inputs = |sample: &Sample| {
            let fingerprint = Fingerprint::of(&sample.recipe(), &Given::new()).unwrap();
            let of_recipe =
                |(name, _): &(&String, &String)| !name.starts_with("recipe/recipe.toml");
            let mut values: Vec<_> = fingerprint
                .0
                .iter()
                .filter(of_recipe)
                .map(|(_, value)| value.clone())
                .collect();
            values.sort();
            values
        };
        assert_eq!(inputs(&one), inputs(&other));
    }

    #[test]
    fn every_input_changes_the_hash() {
        let sample = Sample::new();
        let mut given = Given::from([("agent".to_owned(), b"first".to_vec())]);
        sample.append(
            "recipe.toml",
            "\n[[initramfs.file]]\npath = \"agent\"\ngiven = \"agent\"\n",
        );
        let mut seen = vec![Fingerprint::of(&sample.recipe(), &given).unwrap().hash()];
        let mut changed = |what: &str, given: &Given| {
            let hash = Fingerprint::of(&sample.recipe(), given).unwrap().hash();
            assert!(!seen.contains(&hash), "{what} does not count");
            seen.push(hash);
        };
        for file in ["recipe.toml", "kernel.config", "init"] {
            sample.append(file, "\n# more");
            changed(file, &given);
        }
        fs::write(sample.dir().join("notes"), "new").unwrap();
        changed("a file that nothing names", &given);
        fs::write(sample.source(), "another source").unwrap();
        changed("the source", &given);
        fs::write(sample.busybox(), "another busybox").unwrap();
        changed("busybox", &given);
        given.insert("agent".to_owned(), b"second".to_vec());
        changed("the agent", &given);
    }

    #[test]
    fn a_kernel_is_another_only_by_what_it_is_made_of() {
        let sample = Sample::new();
        let of_kernel = || {
            let recipe = sample.recipe();
            Fingerprint::of(&recipe, &Given::new())
                .unwrap()
                .of_kernel(&recipe)
        };
        let first = of_kernel();
        sample.append("init", "echo more");
        fs::write(sample.busybox(), "another busybox").unwrap();
        let text = String::from_utf8(sample.read("recipe.toml")).unwrap();
        let change = |from: &str, to: &str| {
            let text = text.replace(from, to);
            fs::write(sample.dir().join("recipe.toml"), text).unwrap();
        };
        change("quiet", "debug");
        assert_eq!(of_kernel(), first);

        let mut seen = vec![first];
        let mut changed = |what: &str| {
            let hash = of_kernel();
            assert!(!seen.contains(&hash), "{what} does not count");
            seen.push(hash);
        };
        change("tinyconfig", "defconfig");
        changed("kernel.base");
        change("[kernel]", "[kernel]\nleave-out = [\"sound/*\"]");
        changed("kernel.leave-out");
        sample.append("kernel.config", "CONFIG_SMP=y\n");
        changed("the options");
        fs::write(sample.source(), "another source").unwrap();
        changed("the source");
    }

    #[test]
    fn compilers_and_names_count() {
        let sample = Sample::new();
        let fingerprint = Fingerprint::of(&sample.recipe(), &Given::new()).unwrap();
        for name in ["gcc", "ld", "name", "builder"] {
            let mut other = fingerprint.clone();
            other
                .0
                .insert(name.to_owned(), "another".to_owned())
                .unwrap();
            assert_ne!(other.hash(), fingerprint.hash(), "{name}");
        }
        assert_eq!(fingerprint.short().len(), SHORT);
        assert!(fingerprint.hash().starts_with(&fingerprint.short()));
    }
}
