//! An ext4 disk with the program, its libraries and its input, made without root.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::input::{Input, InputError, ended_well, files_of_program};

/// Size of the disk: the files take some 8 MiB, and the rest is room for what clones write.
const SIZE: &str = "64M";

/// Makes the disk `image`. `stage` is an empty directory to lay its files out in.
///
/// # Errors
/// A file that cannot be copied; mke2fs is not there, or fails.
pub fn make(input: &Input, stage: &Path, image: &Path) -> Result<(), InputError> {
    for file in files_of_program()? {
        let below = file.strip_prefix("/").unwrap_or(&file);
        copy(&file, &stage.join(below))?;
    }
    for folder in ["in", "out"] {
        let path = stage.join(folder);
        fs::create_dir(&path).map_err(failed("making", &path))?;
    }
    for (number, share) in (1..).zip(&input.shares) {
        let path = stage.join(format!("in/{number}.fa"));
        fs::write(&path, share).map_err(failed("writing", &path))?;
    }
    let mut mke2fs = Command::new("mke2fs");
    // An unprivileged user finds it only there.
    mke2fs.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"]);
    mke2fs.arg(stage).arg(image).arg(SIZE);
    let what = "running mke2fs, of the package e2fsprogs, for";
    let ran = mke2fs.output().map_err(failed(what, image))?;
    ended_well("mke2fs", &ran)
}

/// With the folders that it lies in. Permissions come along.
fn copy(from: &Path, to: &Path) -> Result<(), InputError> {
    let folder = to.parent().unwrap_or(to);
    fs::create_dir_all(folder).map_err(failed("making", folder))?;
    fs::copy(from, to)
        .map(drop)
        .map_err(failed("copying", from))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> InputError {
    let path = path.to_owned();
    move |source| InputError::Io { what, path, source }
}
