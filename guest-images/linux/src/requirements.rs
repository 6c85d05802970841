//! What a host needs to build an image: programs, headers, files of packages. All that is missing is
//! named at once, with the command that installs it, before anything starts.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::{self, Display, Formatter};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::recipe::{FileSource, Recipe};

/// Programs that building any kernel takes, and their Debian packages.
const PROGRAMS: &[(&str, &str)] = &[
    ("make", "make"),
    ("gcc", "gcc"),
    ("ld", "binutils"),
    ("strip", "binutils"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("perl", "perl"),
    ("tar", "tar"),
    ("xz", "xz-utils"),
];

/// Headers that programs of the kernel's build include, and their Debian packages.
const HEADERS: &[(&str, &str)] = &[
    ("/usr/include/stdlib.h", "libc6-dev"),
    ("/usr/include/libelf.h", "libelf-dev"),
    ("/usr/include/openssl/opensslv.h", "libssl-dev"),
];

/// Something that a host has or lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Requirement {
    what: What,
    package: String,
    /// Without it nobody knows which image is meant.
    identifies: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum What {
    /// To be found in PATH.
    Program(String),
    /// A file at this place.
    File(PathBuf),
}

impl Requirement {
    fn program(name: &str, package: &str) -> Requirement {
        Requirement {
            what: What::Program(name.to_owned()),
            package: package.to_owned(),
            // Their versions are inputs.
            identifies: ["gcc", "ld"].contains(&name),
        }
    }

    fn file(path: &Path, package: &str) -> Requirement {
        Requirement {
            what: What::File(path.to_owned()),
            package: package.to_owned(),
            identifies: false,
        }
    }

    /// The Debian package that brings it.
    pub fn package(&self) -> &str {
        &self.package
    }

    fn is_met(&self, search: &OsStr) -> bool {
        match &self.what {
            What::Program(name) => env::split_paths(search).any(|dir| is_program(&dir.join(name))),
            What::File(path) => path.is_file(),
        }
    }
}

impl Display for Requirement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.what {
            What::Program(name) => write!(f, "{name}"),
            What::File(path) => write!(f, "{}", path.display()),
        }
    }
}

fn is_program(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// All that building `recipe` takes.
fn of(recipe: &Recipe) -> Vec<Requirement> {
    let programs = PROGRAMS
        .iter()
        .map(|(name, package)| Requirement::program(name, package));
    let headers = HEADERS
        .iter()
        .map(|(path, package)| Requirement::file(Path::new(path), package));
    let mut all: Vec<_> = programs.chain(headers).collect();
    all.extend(inputs(recipe));
    all
}

/// Those that go into the image themselves.
fn inputs(recipe: &Recipe) -> Vec<Requirement> {
    let kernel = recipe.kernel();
    let mut all = vec![Requirement::file(&kernel.source, &kernel.package)];
    for file in &recipe.initramfs().files {
        if let FileSource::Host { path, package } = &file.source {
            all.push(Requirement::file(path, package));
        }
    }
    all.iter_mut()
        .for_each(|requirement| requirement.identifies = true);
    all
}

/// Fails with all that is missing here.
pub(crate) fn check(recipe: &Recipe) -> Result<(), Lacking> {
    missing(
        recipe.name(),
        of(recipe),
        &env::var_os("PATH").unwrap_or_default(),
    )
}

fn missing(image: &str, wanted: Vec<Requirement>, search: &OsStr) -> Result<(), Lacking> {
    let mut search = search.to_owned();
    // A plain user's PATH may leave out what root's has.
    search.push(OsString::from(":/usr/sbin:/sbin"));
    let missing: Vec<_> = wanted
        .into_iter()
        .filter(|requirement| !requirement.is_met(&search))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Lacking {
        image: image.to_owned(),
        missing,
    })
}

/// What a host lacks, all of it.
#[derive(Debug, Error)]
pub struct Lacking {
    image: String,
    missing: Vec<Requirement>,
}

impl Lacking {
    /// Each thing that is missing.
    pub fn missing(&self) -> &[Requirement] {
        &self.missing
    }

    /// Whether some of it is needed even to look for the image in the cache.
    pub(crate) fn hides_the_image(&self) -> bool {
        self.missing.iter().any(|missing| missing.identifies)
    }

    /// The command that installs it all.
    pub fn remedy(&self) -> String {
        let mut packages: Vec<_> = self.missing.iter().map(Requirement::package).collect();
        packages.sort_unstable();
        packages.dedup();
        format!(
            "apt-get update && apt-get install --no-install-recommends {}",
            packages.join(" ")
        )
    }
}

impl Display for Lacking {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let each: Vec<_> = self
            .missing
            .iter()
            .map(|missing| format!("{missing} (package {})", missing.package))
            .collect();
        write!(
            f,
            "building the image {} needs what this host lacks: {}; as root, run `{}`",
            self.image,
            each.join(", "),
            self.remedy()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use super::*;
    use crate::tests::Sample;

    #[test]
    fn all_that_is_missing_is_named_at_once_with_the_command_that_installs_it() {
        let bin = tempfile::tempdir().unwrap();
        for program in ["make", "gcc", "flex"] {
            fs::write(bin.path().join(program), "").unwrap();
            let mode = if program == "flex" { 0o644 } else { 0o755 };
            fs::set_permissions(bin.path().join(program), Permissions::from_mode(mode)).unwrap();
        }
        let wanted = vec![
            Requirement::program("make", "make"),
            Requirement::program("gcc", "gcc"),
            // There, but not to be run.
            Requirement::program("flex", "flex"),
            Requirement::program("no-such-bison", "bison"),
            Requirement::file(Path::new("/nowhere/libelf.h"), "libelf-dev"),
            Requirement::file(Path::new("/nowhere/gelf.h"), "libelf-dev"),
            Requirement::file(Path::new("/proc/self/status"), "procfs"),
        ];
        let lacking = missing("sample", wanted, bin.path().as_os_str()).unwrap_err();
        let text = lacking.to_string();
        for named in [
            "flex (package flex)",
            "no-such-bison (package bison)",
            "/nowhere/libelf.h",
        ] {
            assert!(text.contains(named), "{text}");
        }
        assert!(
            !text.contains("make (") && !text.contains("gcc (") && !text.contains("procfs"),
            "{text}"
        );
        assert!(
            !lacking.hides_the_image(),
            "a finished image is served without them"
        );
        let remedy = "apt-get install --no-install-recommends bison flex libelf-dev`";
        assert!(text.contains(remedy), "{text}");
    }

    #[test]
    fn files_that_a_recipe_takes_from_the_host_are_required() {
        let sample = Sample::new();
        let recipe = sample.recipe();
        let wanted: Vec<_> = of(&recipe).iter().map(ToString::to_string).collect();
        for path in [sample.source(), sample.busybox()] {
            assert!(wanted.contains(&path.display().to_string()), "{wanted:?}");
        }
        for (program, _) in PROGRAMS {
            assert!(wanted.contains(&(*program).to_owned()), "{wanted:?}");
        }
        fs::remove_file(sample.source()).unwrap();
        fs::remove_file(sample.busybox()).unwrap();
        let lacking = missing(recipe.name(), inputs(&recipe), OsStr::new("/nowhere")).unwrap_err();
        let packages: Vec<_> = lacking.missing().iter().map(Requirement::package).collect();
        assert_eq!(packages, ["linux-source", "busybox-static"]);
        assert!(lacking.hides_the_image());
    }
}
