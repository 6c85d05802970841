//! Recipes: what an image is made of.
//!
//! A recipe is a directory with `recipe.toml` and the files that it names. forkvm carries its own
//! inside the binary ([`built_in`]); others are read from a path. This module reads and checks them;
//! it makes nothing. All files of the directory count as inputs of the image, named or not.

mod layout;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use include_dir::{Dir, include_dir};
use thiserror::Error;

use layout::Layout;
pub use layout::LayoutError;
pub(crate) use layout::{FileSource, InitramfsLayout, KernelLayout, link_path};

use crate::image::Origin;

/// Name of the file that makes a directory a recipe.
const RECIPE: &str = "recipe.toml";
/// Far more than any recipe has; a home directory given by mistake has more.
const MOST_BYTES: u64 = 16 << 20;

static BUILT_IN: Dir<'static> = include_dir!("$CARGO_MANIFEST_DIR/recipes");

/// A recipe that was read and checked.
#[derive(Clone, Debug)]
pub struct Recipe {
    name: String,
    origin: Origin,
    layout: Layout,
    files: BTreeMap<String, Vec<u8>>,
}

/// Names of the recipes that forkvm carries.
pub fn built_in() -> Vec<&'static str> {
    let mut names: Vec<_> = BUILT_IN
        .dirs()
        .filter_map(|dir| dir.path().to_str())
        .collect();
    names.sort_unstable();
    names
}

impl Recipe {
    /// The recipe that `name` means: a path to a recipe's directory when it has a slash in it, else one of
    /// [`built_in`].
    pub fn find(name: &str) -> Result<Recipe, RecipeError> {
        if name.contains('/') {
            Recipe::read(Path::new(name))
        } else {
            Recipe::of_forkvm(name)
        }
    }

    /// One of [`built_in`].
    fn of_forkvm(name: &str) -> Result<Recipe, RecipeError> {
        let dir = BUILT_IN.get_dir(name).ok_or_else(|| RecipeError::Unknown {
            name: name.to_owned(),
            known: built_in().join(", "),
        })?;
        let mut files = BTreeMap::new();
        for file in dir.files() {
            if let Some(name) = file.path().file_name().and_then(|name| name.to_str()) {
                files.insert(name.to_owned(), file.contents().to_vec());
            }
        }
        Recipe::new(name, Origin::BuiltIn, files)
    }

    /// A recipe of the user's: the directory's name is the image's.
    fn read(dir: &Path) -> Result<Recipe, RecipeError> {
        let reading = |path: &Path| {
            let path = path.to_owned();
            move |source| RecipeError::Read { path, source }
        };
        let dir = fs::canonicalize(dir).map_err(reading(dir))?;
        let name = dir
            .file_name()
            .and_then(|name| name.to_str())
            .filter(|name| is_plain(name))
            .ok_or_else(|| RecipeError::Name { path: dir.clone() })?
            .to_owned();
        let mut files = BTreeMap::new();
        let mut bytes = 0;
        for entry in fs::read_dir(&dir).map_err(reading(&dir))? {
            let path = entry.map_err(reading(&dir))?.path();
            // As it is opened, not as it is named: a link to a file is a file.
            let kind = fs::metadata(&path).map_err(reading(&path))?;
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            if !kind.is_file() || name.starts_with('.') || name.ends_with('~') {
                continue;
            }
            bytes += kind.len();
            if bytes > MOST_BYTES {
                return Err(RecipeError::TooLarge { path: dir });
            }
            files.insert(name.to_owned(), fs::read(&path).map_err(reading(&path))?);
        }
        Recipe::new(&name, Origin::Directory(dir.clone()), files)
    }

    pub(crate) fn new(
        name: &str,
        origin: Origin,
        files: BTreeMap<String, Vec<u8>>,
    ) -> Result<Recipe, RecipeError> {
        let named = |fault| RecipeError::Invalid {
            name: name.to_owned(),
            fault,
        };
        let text = files
            .get(RECIPE)
            .ok_or_else(|| named(LayoutError::Missing(RECIPE.into())))?;
        let layout = Layout::parse(text).map_err(named)?;
        for file in layout.recipe_files() {
            if !files.contains_key(file) {
                return Err(named(LayoutError::Missing(file.to_owned())));
            }
        }
        Ok(Recipe {
            name: name.to_owned(),
            origin,
            layout,
            files,
        })
    }

    /// The image's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the image is for, in one line.
    pub fn about(&self) -> &str {
        &self.layout.about
    }

    /// The kernel's command line, unless the user has another.
    pub fn cmdline(&self) -> &str {
        &self.layout.cmdline
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    pub(crate) fn kernel(&self) -> &KernelLayout {
        &self.layout.kernel
    }

    pub(crate) fn initramfs(&self) -> &InitramfsLayout {
        &self.layout.initramfs
    }

    /// Files beside `recipe.toml`, and itself, by name.
    pub(crate) fn files(&self) -> &BTreeMap<String, Vec<u8>> {
        &self.files
    }

    /// The file that a key of the recipe names; it was found there when the recipe was read.
    pub(crate) fn file(&self, name: &str) -> &[u8] {
        self.files.get(name).map_or(&[], Vec::as_slice)
    }
}

/// Names become part of names of directories.
fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    !name.is_empty() && !name.starts_with('.') && name.bytes().all(plain)
}

/// Why a recipe cannot be used.
#[derive(Debug, Error)]
pub enum RecipeError {
    /// No recipe of forkvm's has that name.
    #[error(
        "there is no recipe {name:?}, only {known}; a recipe of your own is given by a path with a slash in it, such as ./{name}"
    )]
    Unknown {
        /// As it was given.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// A directory or a file in it.
    #[error("reading the recipe {}", path.display())]
    Read {
        /// What was read.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The directory's name is the image's.
    #[error(
        "{} cannot be an image's name: rename the directory, to letters, digits and -_. only", path.display()
    )]
    Name {
        /// The directory.
        path: PathBuf,
    },
    /// Probably not a recipe.
    #[error(
        "{} holds more than {} MiB: put recipe.toml and the files that it names into a directory of their own",
        path.display(), MOST_BYTES >> 20
    )]
    TooLarge {
        /// The directory.
        path: PathBuf,
    },
    /// What the text says.
    #[error("the recipe {name} is wrong")]
    Invalid {
        /// Name of the recipe.
        name: String,
        /// What is wrong.
        #[source]
        fault: LayoutError,
    },
}
