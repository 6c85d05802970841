//! Builds the freestanding guest in `bare/` and hands its ELF to `src/lib.rs`.
//!
//! It is a workspace of its own (other linker flags, another panic strategy), so it is built by a
//! Cargo of its own, with the lock file beside it. That Cargo shall know nothing of the flags of
//! this build: a code coverage run or a sanitizer would not even link there.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Target of the guest; `bare/.cargo/config.toml` names the same one.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What the guest is built from, relative to this crate.
const SOURCES: &[&str] = &[
    "bare/.cargo/config.toml",
    "bare/Cargo.lock",
    "bare/Cargo.toml",
    "bare/build.rs",
    "bare/link.ld",
    "bare/src",
    "abi/Cargo.toml",
    "abi/src",
    "read-mapper/Cargo.toml",
    "read-mapper/src",
];

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    let bare = Path::new(env!("CARGO_MANIFEST_DIR")).join("bare");
    let target_dir = PathBuf::from(variable("OUT_DIR")).join("bare");
    let mut cargo = Command::new(variable("CARGO"));
    // In its directory, so that its .cargo/config.toml counts.
    cargo
        .current_dir(&bare)
        .args(["build", "--release", "--locked", "--target", TARGET]);
    cargo.arg("--target-dir").arg(&target_dir);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_this_build) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status();
    if !status.as_ref().is_ok_and(|status| status.success()) {
        eprintln!(
            "building the guest in {} failed ({status:?}): {cargo:?}",
            bare.display()
        );
        exit(1);
    }
    let elf = target_dir.join(TARGET).join("release/forkvm-bare");
    println!("cargo::rustc-env=FORKVM_BARE_ELF={}", elf.display());
}

/// Whether a variable carries settings of the build that runs this script. What says where Cargo,
/// its cache and its registries are, or that there is no network, is the guest build's as well.
fn is_of_this_build(name: &str) -> bool {
    const FLAGS: [&str; 9] = [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_INCREMENTAL",
        "CARGO_TARGET_DIR",
        "LLVM_PROFILE_FILE",
        "RUSTC",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
    ];
    const PREFIXES: [&str; 5] = [
        "CARGO_BUILD_",
        "CARGO_FEATURE_",
        "CARGO_PKG_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
    ];
    FLAGS.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("Cargo sets {name} for build scripts: {error}"))
}
