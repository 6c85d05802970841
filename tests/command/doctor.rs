//! `forkvm doctor`.

use std::os::unix::fs::MetadataExt;

use serde_json::Value;
use tempfile::tempdir;

use super::common::has_kvm;
use super::harness::forkvm;

#[test]
fn every_check_has_a_purpose_and_every_lack_a_remedy() {
    let dir = tempdir().unwrap();
    let ended = forkvm(dir.path(), &["doctor", "--json", "-"]);
    // 3 on a host where a VM cannot run.
    assert_eq!(
        ended.code(),
        if has_kvm() { 0 } else { 3 },
        "{}",
        ended.stderr()
    );
    let report: Value = serde_json::from_str(&ended.stdout()).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let names: Vec<&str> = checks
        .iter()
        .map(|check| check["name"].as_str().unwrap())
        .collect();
    for name in [
        "kvm",
        "boot",
        "memfd",
        "nofile",
        "max_map_count",
        "memory",
        "userfaultfd",
        "rewind",
    ] {
        assert!(names.contains(&name), "{name} is not in {names:?}");
    }
    for check in checks {
        assert_ne!(check["needed_for"], "", "{check}");
        assert_ne!(check["detail"], "", "{check}");
        assert_eq!(
            check["ok"].as_bool().unwrap(),
            check["mend"] == "",
            "{check}"
        );
    }
}

#[test]
fn people_get_a_table() {
    let dir = tempdir().unwrap();
    let text = forkvm(dir.path(), &["doctor"]).stdout();
    assert!(
        text.contains("userfaultfd") && text.contains("needed for"),
        "{text}"
    );
}

/// The command in a mount namespace of its own, where /dev is empty.
fn without_devices(args: &str) -> Option<std::process::Output> {
    in_empty_dev(&format!("exec {} {args}", env!("CARGO_BIN_EXE_forkvm")))
}

/// The same for a user who is not root, who may run the copy of the command that is in /dev then.
fn as_nobody(args: &str) -> Option<std::process::Output> {
    as_nobody_after("true", args)
}

/// The same where that user may use KVM. `None`, with the reason printed, where that cannot be had, or where all may have a userfaultfd.
pub(crate) fn as_nobody_with_kvm(args: &str) -> Option<std::process::Output> {
    if everybody_has_userfaultfd() {
        return None;
    }
    let kvm = std::fs::metadata("/dev/kvm").unwrap().rdev();
    let (major, minor) = (libc::major(kvm), libc::minor(kvm));
    // An identity takes random bytes.
    let nodes =
        format!("mknod -m 666 /dev/kvm c {major} {minor} && mknod -m 666 /dev/urandom c 1 9");
    as_nobody_after(&nodes, args)
}

fn as_nobody_after(prepared: &str, args: &str) -> Option<std::process::Output> {
    let forkvm = env!("CARGO_BIN_EXE_forkvm");
    in_empty_dev(&format!(
        "{prepared} && cp {forkvm} /dev/forkvm && chmod 755 /dev/forkvm && cd /dev \
         && exec setpriv --reuid=65534 --clear-groups --inh-caps=-all /dev/forkvm {args}"
    ))
}

fn everybody_has_userfaultfd() -> bool {
    let setting = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let allowed = setting.is_ok_and(|value| value.trim() == "1");
    if allowed {
        println!("skipped: vm.unprivileged_userfaultfd is 1 here");
    }
    allowed
}

fn in_empty_dev(script: &str) -> Option<std::process::Output> {
    let script = format!("mount -t tmpfs none /dev && {script}");
    let unshare = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output();
    let output = unshare.ok()?;
    let refused = String::from_utf8_lossy(&output.stderr).into_owned();
    let lacking = ["unshare", "mount:", "mknod", "setpriv"];
    if lacking.iter().any(|command| refused.contains(command)) {
        println!("skipped: no mount namespace, or no other user, can be had here: {refused}");
        return None;
    }
    Some(output)
}

#[test]
fn a_host_without_kvm_ends_with_status_3_and_says_what_to_do() {
    let Some(output) = without_devices("run --guest hello") else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("/dev/kvm does not exist"), "{said}");
    assert!(said.contains("forkvm doctor"), "{said}");
    let doctor = without_devices("doctor").unwrap();
    assert_eq!(doctor.status.code(), Some(3));
}

#[test]
fn a_user_without_userfaultfd_learns_what_works_and_what_to_do() {
    if everybody_has_userfaultfd() {
        return;
    }
    let Some(doctor) = as_nobody("doctor --json -") else {
        return;
    };
    let text = String::from_utf8_lossy(&doctor.stdout);
    let report: Value = serde_json::from_str(&text).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let check = checks
        .iter()
        .find(|check| check["name"] == "userfaultfd")
        .unwrap();
    assert_eq!(check["ok"], false, "{check}");
    for (key, said) in [
        ("needed_for", "remap"),
        ("needed_for", "copy"),
        ("detail", "no /dev/userfaultfd"),
        ("detail", "vm.unprivileged_userfaultfd"),
        ("mend", "sysctl vm.unprivileged_userfaultfd=1"),
        ("mend", "/dev/userfaultfd"),
    ] {
        assert!(
            check[key].as_str().unwrap().contains(said),
            "{key}: {check}"
        );
    }
    // Refused before anything is built, and as what the host lacks.
    let lazy = as_nobody("run --guest hello --memory-mode lazy").unwrap();
    let said = String::from_utf8_lossy(&lazy.stderr);
    assert_eq!(lazy.status.code(), Some(3), "{said}");
    assert!(said.contains("no userfaultfd for kernel mode"), "{said}");
}
