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
