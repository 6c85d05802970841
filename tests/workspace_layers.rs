//! The crates of the workspace depend on each other in one direction, and on others sparingly.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use cargo_metadata::{CargoOpt, DependencyKind, Metadata, MetadataCommand, PackageId};

/// Each crate, and those of the workspace that it may build on. What is tested may use more.
const MAY_USE: &[(&str, &[&str])] = &[
    ("forkvm-abi", &[]),
    ("forkvm-agent-protocol", &[]),
    ("forkvm-agent", &["forkvm-abi", "forkvm-agent-protocol"]),
    ("forkvm-read-mapper", &[]),
    ("forkvm-linux-image", &[]),
    ("forkvm-guest-images", &["forkvm-abi"]),
    ("forkvm-devices", &["forkvm-abi"]),
    ("forkvm-vmm", &["forkvm-abi", "forkvm-devices"]),
    (
        "forkvm-clone-engine",
        &["forkvm-abi", "forkvm-devices", "forkvm-vmm"],
    ),
    (
        "forkvm",
        &[
            "forkvm-abi",
            "forkvm-agent-protocol",
            "forkvm-clone-engine",
            "forkvm-devices",
            "forkvm-guest-images",
            "forkvm-linux-image",
            "forkvm-read-mapper",
            "forkvm-vmm",
        ],
    ),
];

/// The rust-vmm crates that do real work here.
const RUST_VMM: &[&str] = &[
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "virtio-bindings",
    "virtio-queue",
    "virtio-vsock",
    "vm-memory",
    "vm-superio",
    "vmm-sys-util",
];

/// The one that forkvm is for.
const PLATFORM: &str = "x86_64-unknown-linux-gnu";

fn metadata(features: Option<CargoOpt>) -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"));
    // What was built is there; crates for other platforms need not be.
    let options = ["--offline", "--filter-platform", PLATFORM];
    command.other_options(options.map(str::to_owned));
    if let Some(features) = features {
        command.features(features);
    }
    command.exec().unwrap()
}

fn id_of<'a>(metadata: &'a Metadata, name: &str) -> &'a PackageId {
    let package = metadata
        .workspace_packages()
        .into_iter()
        .find(|package| package.name == name);
    &package
        .unwrap_or_else(|| panic!("the workspace has no {name}"))
        .id
}

/// Names of all crates that `name` is built with, directly or not, tests and build scripts apart.
fn built_with(metadata: &Metadata, name: &str) -> BTreeSet<String> {
    let nodes: BTreeMap<_, _> = metadata
        .resolve
        .as_ref()
        .unwrap()
        .nodes
        .iter()
        .map(|node| (&node.id, node))
        .collect();
    let mut seen = BTreeSet::new();
    let mut waiting = vec![id_of(metadata, name)];
    while let Some(id) = waiting.pop() {
        let normal = nodes[id].deps.iter().filter(|dep| {
            dep.dep_kinds
                .iter()
                .any(|kind| kind.kind == DependencyKind::Normal)
        });
        waiting.extend(normal.map(|dep| &dep.pkg).filter(|id| seen.insert(*id)));
    }
    seen.into_iter()
        .map(|id| metadata[id].name.to_string())
        .collect()
}

#[test]
fn dependencies_point_one_way() {
    let metadata = metadata(None);
    let members: BTreeSet<_> = metadata
        .workspace_packages()
        .iter()
        .map(|package| package.name.to_string())
        .collect();
    let known: BTreeSet<_> = MAY_USE.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(members, known, "every crate of the workspace has its place");
    for (name, may_use) in MAY_USE {
        let used = built_with(&metadata, name)
            .intersection(&members)
            .cloned()
            .collect();
        let allowed = may_use
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<BTreeSet<_>>();
        let more = BTreeSet::difference(&used, &allowed).collect::<Vec<_>>();
        assert!(more.is_empty(), "{name} must not build on {more:?}");
    }
}

#[test]
fn there_is_one_version_of_each_rust_vmm_crate_and_each_is_used_directly() {
    let metadata = metadata(None);
    let direct: BTreeSet<_> = metadata
        .workspace_packages()
        .iter()
        .flat_map(|package| &package.dependencies)
        .filter(|dependency| dependency.kind == DependencyKind::Normal)
        .map(|dependency| dependency.name.clone())
        .collect();
    for name in RUST_VMM {
        let versions: Vec<_> = metadata
            .packages
            .iter()
            .filter(|package| package.name == *name)
            .map(|package| package.version.to_string())
            .collect();
        assert_eq!(versions.len(), 1, "{name}: {versions:?}");
        assert!(direct.contains(*name), "{name} is not used");
    }
}

#[test]
fn devices_know_no_kvm() {
    let used = built_with(&metadata(None), "forkvm-devices");
    let kvm: Vec<_> = used
        .iter()
        .filter(|name| name.starts_with("kvm-"))
        .collect();
    assert!(kvm.is_empty(), "forkvm-devices is built with {kvm:?}");
}

#[test]
fn the_library_alone_needs_nothing_of_the_command_line() {
    let metadata = metadata(Some(CargoOpt::NoDefaultFeatures));
    let root = &metadata[id_of(&metadata, "forkvm")];
    let optional: BTreeSet<_> = root
        .dependencies
        .iter()
        .filter(|dependency| dependency.optional)
        .map(|dependency| dependency.name.clone())
        .collect();
    assert!(optional.contains("clap"), "{optional:?}");
    // Those that some layer below needs for itself are not the command line's.
    let below = built_with(&metadata, "forkvm-clone-engine");
    let used = built_with(&metadata, "forkvm");
    let of_the_command_line = |name: &&String| optional.contains(*name) && !below.contains(*name);
    let drawn_in: Vec<_> = used.iter().filter(of_the_command_line).collect();
    assert!(
        drawn_in.is_empty(),
        "the library is built with {drawn_in:?}"
    );
}
