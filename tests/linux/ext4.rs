//! Disks with an ext4 file system, made and judged without root by e2fsprogs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use forkvm::devices::block::BlockLayer;

/// Tools of an administrator, who may not be the user.
const PATH: &str = "/usr/sbin:/sbin:/usr/bin:/bin";

/// Loads programs, and tells what it would load for one.
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

/// Makes `image`, of `mib` MiB, with what is in `folder`.
pub(crate) fn make(folder: &Path, image: &Path, mib: u32) {
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.env("PATH", PATH).arg("-d").arg(folder);
    mke2fs.args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0"]);
    let ran = mke2fs.arg(image).arg(format!("{mib}M")).output().unwrap();
    assert!(ran.status.success(), "{ran:?}");
}

/// Copies a program of the host and the libraries that it needs below `folder`, each to its place.
pub(crate) fn install(program: &str, folder: &Path) {
    // As ldd(1) does, which is a script and not on every machine.
    let loader = Command::new(LOADER).arg("--list").arg(program).output();
    let text = String::from_utf8(loader.unwrap().stdout).unwrap();
    let libraries = text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    for file in [program].into_iter().chain(libraries) {
        let to = folder.join(&file[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(file, to).unwrap();
    }
}

/// Writes what a VM left on a disk to the file `copy`.
pub(crate) fn copy(disk: &dyn BlockLayer, copy: &Path) -> PathBuf {
    let file = File::create(copy).unwrap();
    let mut part = vec![0; 1 << 20];
    let mut at = 0;
    while at < disk.len() {
        let len = part.len().min((disk.len() - at) as usize);
        disk.read_at(at, &mut part[..len]).unwrap();
        file.write_all_at(&part[..len], at).unwrap();
        at += len as u64;
    }
    copy.to_owned()
}

/// Replays the journal of `image`, as the next mount would.
pub(crate) fn replay(image: &Path) {
    let status = e2fsck(&["-p"], image).0;
    assert!(status < 2, "{status}");
}

/// Requires that nothing is wrong with the file system.
#[track_caller]
pub(crate) fn expect_clean(image: &Path) {
    let (status, said) = e2fsck(&["-f", "-n"], image);
    assert_eq!(status, 0, "{said}");
}

fn e2fsck(arguments: &[&str], image: &Path) -> (i32, String) {
    let mut e2fsck = Command::new("e2fsck");
    let ran = e2fsck.env("PATH", PATH).args(arguments).arg(image).output();
    let ran = ran.unwrap();
    let said = String::from_utf8_lossy(&ran.stdout).into_owned();
    (ran.status.code().unwrap(), said)
}
