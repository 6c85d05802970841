//! Builds the programs that run inside guests and hands them to `src/lib.rs`.
//!
//! Each is built by a Cargo of its own, since it needs other flags than the rest: `bare/` is freestanding and a workspace of its
//! own, `agent/` is a member of this one, but static, small, and with panics that abort. That Cargo shall know nothing of
//! the flags of this build: a code coverage run or a sanitizer would not even link there.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// Target of the guests; `bare/.cargo/config.toml` names the same one.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// What the guests are built from, relative to this crate.
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
    "agent/Cargo.toml",
    "agent/src",
    "agent-protocol/Cargo.toml",
    "agent-protocol/src",
    // Profile and versions of the agent.
    "../Cargo.toml",
    "../Cargo.lock",
];

/// Flags of the agent: it finds no library in a guest, and lies where it is linked to (nothing is relocated at its start).
const AGENT_FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

fn main() {
    for source in SOURCES {
        println!("cargo::rerun-if-changed={source}");
    }
    // Of the run, not of the build: a target directory may serve two checkouts, and a script that is the same in both is built once.
    let here = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    // In its directory, so that its .cargo/config.toml counts.
    let elf = build(
        &here.join("bare"),
        "bare",
        "forkvm-bare",
        &["--release"],
        "",
    );
    println!("cargo::rustc-env=FORKVM_BARE_ELF={}", elf.display());
    let agent = build(
        &here.join("agent"),
        "agent",
        "forkvm-agent",
        &["--profile", "guest", "-p", "forkvm-agent"],
        AGENT_FLAGS,
    );
    println!("cargo::rustc-env=FORKVM_AGENT={}", agent.display());
}

/// Builds `program` in `directory`, in a target directory of its own called `name`: the file that comes of it.
fn build(directory: &Path, name: &str, program: &str, options: &[&str], flags: &str) -> PathBuf {
    let target_dir = PathBuf::from(variable("OUT_DIR")).join(name);
    let mut cargo = Command::new(variable("CARGO"));
    cargo
        .current_dir(directory)
        .args(["build", "--locked", "--target", TARGET])
        .args(options)
        .arg("--target-dir")
        .arg(&target_dir);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_this_build) {
            cargo.env_remove(name);
        }
    }
    if !flags.is_empty() {
        // With a target named, they reach the guest and not its build scripts.
        cargo.env("RUSTFLAGS", flags);
    }
    let status = cargo.status();
    if !status.as_ref().is_ok_and(|status| status.success()) {
        eprintln!(
            "building the guest in {} failed ({status:?}): {cargo:?}",
            directory.display()
        );
        exit(1);
    }
    let profile = if options.contains(&"--release") {
        "release"
    } else {
        "guest"
    };
    target_dir.join(TARGET).join(profile).join(program)
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
