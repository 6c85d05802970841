//! `forkvm doctor`.

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

/// In a mount namespace of its own, where /dev is empty but for what `make` puts there.
fn without_kvm(make: &str, args: &str) -> Option<std::process::Output> {
    let forkvm = env!("CARGO_BIN_EXE_forkvm");
    let script = format!("mount -t tmpfs none /dev && {make} && exec {forkvm} {args}");
    let unshare = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", &script])
        .output();
    let output = unshare.ok()?;
    let refused = String::from_utf8_lossy(&output.stderr).into_owned();
    if refused.contains("unshare") || refused.contains("mount:") {
        println!("skipped: no mount namespace can be made here: {refused}");
        return None;
    }
    Some(output)
}

#[test]
fn a_host_without_kvm_ends_with_status_3_and_says_what_to_do() {
    let Some(output) = without_kvm("true", "run --guest hello") else {
        return;
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("/dev/kvm does not exist"), "{said}");
    assert!(said.contains("forkvm doctor"), "{said}");
    let doctor = without_kvm("true", "doctor").unwrap();
    assert_eq!(doctor.status.code(), Some(3));
}
