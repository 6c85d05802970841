//! What a template is made of, file by file.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use forkvm_clone_engine::saved::SavedFile;
use serde::{Deserialize, Serialize};

use super::{TemplateError, failed};

/// The layout of this version.
const FORMAT: u32 = 1;

/// How much is read at once.
const CHUNK: usize = 1 << 20;

/// See the module's text. As JSON it is `template.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// 1.
    format: u32,
    /// The version of forkvm that made it.
    pub forkvm: String,
    /// When, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// What its maker says of it: kernel, memory and the like.
    pub about: serde_json::Value,
    /// All files. Paths are absolute, or below the template's directory.
    pub files: Vec<HashedFile>,
}

/// A file as it was when the template was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HashedFile {
    /// How it looked.
    #[serde(flatten)]
    pub file: SavedFile,
    /// BLAKE3 of its content, in hexadecimal digits.
    pub blake3: String,
}

impl Manifest {
    pub(super) fn new(about: serde_json::Value, files: Vec<HashedFile>) -> Manifest {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Manifest {
            format: FORMAT,
            forkvm: env!("CARGO_PKG_VERSION").into(),
            created_unix_ms: now.unwrap_or_default().as_millis() as u64,
            about,
            files,
        }
    }

    pub(super) fn read(path: &Path) -> Result<Manifest, TemplateError> {
        let damaged = |what: String| TemplateError::Damaged {
            path: path.into(),
            what,
        };
        let text = fs::read_to_string(path).map_err(failed("reading", path))?;
        let manifest: Manifest =
            serde_json::from_str(&text).map_err(|error| damaged(error.to_string()))?;
        if manifest.format != FORMAT {
            let text = format!(
                "it has format {}, and this forkvm reads {FORMAT}",
                manifest.format
            );
            return Err(damaged(text));
        }
        Ok(manifest)
    }

    pub(super) fn to_json(&self) -> io::Result<Vec<u8>> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.file.len).sum()
    }
}

impl HashedFile {
    /// The file at `path` as it is now, which is below `directory` or absolute.
    pub(super) fn of(directory: &Path, path: &Path) -> Result<HashedFile, TemplateError> {
        let place = directory.join(path);
        let look = || SavedFile::look(&place).map_err(failed("looking at", &place));
        let before = look()?;
        let blake3 = hash(&place, &mut |_| {}).map_err(failed("reading", &place))?;
        let file = look()?;
        if file != before {
            return Err(TemplateError::Changed {
                name: "that is being made".into(),
                path: place,
                what: "somebody writes to it".into(),
            });
        }
        Ok(HashedFile {
            file: SavedFile {
                path: path.into(),
                ..file
            },
            blake3,
        })
    }

    /// Whether it looks other than it did; then which file, and in what.
    pub(super) fn looks_changed(&self, directory: &Path) -> Result<(), (PathBuf, String)> {
        let place = directory.join(&self.file.path);
        let what = match fs::metadata(&place) {
            Ok(metadata) => self.file.difference(&metadata),
            Err(error) => Some(format!("it cannot be looked at ({error})")),
        };
        what.map_or(Ok(()), |what| Err((place, what)))
    }

    /// Whether its content is another one.
    pub(super) fn reads_changed(
        &self,
        directory: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(), (PathBuf, String)> {
        let place = directory.join(&self.file.path);
        match hash(&place, progress) {
            Ok(found) if found == self.blake3 => Ok(()),
            Ok(_) => Err((place, "its content differs (BLAKE3)".into())),
            Err(error) => Err((place, format!("it cannot be read ({error})"))),
        }
    }
}

/// BLAKE3 of a file. `progress` is told of each piece that was read.
fn hash(path: &Path, progress: &mut dyn FnMut(u64)) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; CHUNK];
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(read) => {
                hasher.update_rayon(&chunk[..read]);
                progress(read as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
