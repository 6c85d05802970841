//! The demo keeps its contract: the object that other programs read, and records that are right.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::common;
use super::harness::forkvm;

/// What the demo maps; from the package bowtie-examples.
const GENOME: &str = "/usr/share/doc/bowtie/examples/genomes";

/// Runs a small demo; `None`, with the reason printed, where it cannot be run.
fn demo(options: &[&str]) -> Option<(TempDir, Value)> {
    if !common::has_kvm() {
        return None;
    }
    if !Path::new(GENOME).exists() {
        println!("skipped: {GENOME} is missing (apt-get install bowtie-examples bowtie2-examples)");
        return None;
    }
    let dir = TempDir::new().unwrap();
    let args = [
        &["demo", "--target", ".", "--json", "-", "--seed", "7"],
        options,
    ]
    .concat();
    let ended = forkvm(dir.path(), &args);
    ended.expect(0, "");
    let object = serde_json::from_str(&ended.stdout()).unwrap();
    Some((dir, object))
}

/// An input that is mapped at once.
const SMALL: &[&str] = &["--reads", "1000", "--lambda-pairs", "100", "--checks", "1"];

#[test]
fn a_guest_that_forks_itself_maps_all_reads_as_the_host_does() {
    let Some((dir, object)) = demo(&[SMALL, &["--clones", "3", "--vcpus", "2"]].concat()) else {
        return;
    };
    for (key, expected) in [
        ("guest", Value::from("bare")),
        ("job", "map-reads".into()),
        ("forked_by", "guest".into()),
        ("clones", 3.into()),
        ("vcpus", 2.into()),
        ("memory_mib", 512.into()),
        ("depth", 1.into()),
        ("memory_mode", "cow".into()),
        ("freeze", "remap".into()),
        ("spawner", "in-process".into()),
        ("answers_match", true.into()),
        ("records", 1200.into()),
        ("pages_fetched", 0.into()),
        ("fetch_us", Value::Null),
    ] {
        assert_eq!(object[key], expected, "{key}");
    }
    assert!(object["simulated_placed_percent"].as_f64().unwrap() >= 95.0);
    assert!(
        object["state_bytes"].as_u64().unwrap() <= 32 * 1024,
        "two vCPUs"
    );
    for end_point in [
        "built",
        "restored",
        "first_run",
        "first_action",
        "first_answer",
    ] {
        assert_eq!(object["end_points_us"][end_point]["n"], 3, "{end_point}");
    }
    for phase in [
        "request", "pause", "save", "freeze", "resume", "publish", "run",
    ] {
        assert_eq!(object["phases_us"][phase]["n"], 1, "{phase}");
    }
    let written: Value =
        serde_json::from_slice(&fs::read(dir.path().join("demo.json")).unwrap()).unwrap();
    assert_eq!(written["records"], object["records"]);
    let sam = fs::read_to_string(dir.path().join("demo.sam")).unwrap();
    assert!(sam.starts_with("@HD\tVN:1.6"), "{}", &sam[..40]);
    assert_eq!(
        sam.lines().filter(|line| !line.starts_with('@')).count(),
        1200
    );
}

#[test]
fn the_host_forks_it_by_copying_and_the_answers_are_the_same() {
    let options = ["--clones", "2", "--forked-by", "host", "--freeze", "copy"];
    let Some((_dir, object)) = demo(&[SMALL, &options].concat()) else {
        return;
    };
    assert_eq!(object["forked_by"], "host");
    assert_eq!(object["freeze"], "copy");
    assert_eq!(object["answers_match"], true);
}

#[test]
fn clones_in_workers_map_all_reads_as_the_host_does() {
    let options = ["--clones", "4", "--vcpus", "2", "--spawner", "process"];
    let Some((_dir, object)) = demo(&[SMALL, &options].concat()) else {
        return;
    };
    for (key, expected) in [
        ("spawner", Value::from("process")),
        ("freeze", "remap".into()),
        ("clones", 4.into()),
        ("records", 1200.into()),
        ("answers_match", true.into()),
    ] {
        assert_eq!(object[key], expected, "{key}");
    }
    for end_point in [
        "built",
        "restored",
        "first_run",
        "first_action",
        "first_answer",
    ] {
        assert_eq!(object["end_points_us"][end_point]["n"], 4, "{end_point}");
    }
    for phase in ["memory", "spawn", "restore", "identity"] {
        assert_eq!(object["phases_us"][phase]["n"], 4, "{phase}");
    }
    assert!(object["private_kib_per_clone"].as_u64().unwrap() > 0);
    assert!(object["blk_read_kib_per_clone"].as_u64().unwrap() > 0);
}

#[test]
fn lazy_clones_in_workers_fetch_their_pages_and_map_every_read() {
    let mode = ["--memory-mode", "lazy"];
    let options = ["--clones", "4", "--spawner", "process"];
    let Some((_dir, object)) = demo(&[SMALL, &options, &mode].concat()) else {
        return;
    };
    assert_eq!(object["memory_mode"], "lazy");
    assert_eq!(object["spawner"], "process");
    assert_eq!(object["answers_match"], true);
    assert!(object["pages_fetched"].as_u64().unwrap() > 0);
    assert!(object["fetch_us"]["p50"].as_f64().unwrap() > 0.0);
}

#[test]
fn a_clone_in_a_worker_forks_the_clones_that_map_every_read() {
    let freeze = ["--freeze", "delta", "--memory-mode", "lazy"];
    let options = ["--clones", "4", "--spawner", "process"];
    let Some((_dir, object)) = demo(&[SMALL, &options, &freeze].concat()) else {
        return;
    };
    for (key, expected) in [
        ("spawner", Value::from("process")),
        ("freeze", "delta".into()),
        ("depth", 2.into()),
        ("clones", 4.into()),
        ("answers_match", true.into()),
    ] {
        assert_eq!(object[key], expected, "{key}");
    }
}

#[test]
fn one_clone_maps_everything() {
    let Some((_dir, object)) = demo(&[SMALL, &["--clones", "1"]].concat()) else {
        return;
    };
    assert_eq!(object["clones"], 1);
    assert_eq!(object["answers_match"], true);
}

#[test]
fn guests_with_ram_beyond_4_gib_map_as_well() {
    let options = ["--clones", "2", "--memory-mib", "6144"];
    let Some((_dir, object)) = demo(&[SMALL, &options].concat()) else {
        return;
    };
    assert_eq!(object["memory_mib"], 6144);
    assert_eq!(object["answers_match"], true);
}

#[test]
fn lazy_clones_fetch_what_they_touch_and_answer_the_same() {
    let options = ["--clones", "4", "--vcpus", "2", "--memory-mode", "lazy"];
    let Some((_dir, object)) = demo(&[SMALL, &options].concat()) else {
        return;
    };
    assert_eq!(object["memory_mode"], "lazy");
    assert_eq!(object["freeze"], "write-protect");
    assert_eq!(object["depth"], 1);
    assert_eq!(object["clones"], 4);
    assert!(object["pages_fetched"].as_u64().unwrap() > 0);
    let fetch = &object["fetch_us"];
    assert!(fetch["n"].as_u64().unwrap() > 0, "{fetch}");
    assert!(fetch["p50"].as_f64() <= fetch["p99"].as_f64(), "{fetch}");
    assert_eq!(object["answers_match"], true);
}

#[test]
fn with_delta_a_clone_of_the_parent_forks_the_workers() {
    for mode in ["cow", "lazy"] {
        for who in ["guest", "host"] {
            let options = ["--clones", "3", "--freeze", "delta", "--memory-mode", mode];
            let Some((_dir, object)) = demo(&[SMALL, &options, &["--forked-by", who]].concat())
            else {
                return;
            };
            for (key, expected) in [
                ("freeze", Value::from("delta")),
                ("memory_mode", mode.into()),
                ("forked_by", who.into()),
                ("depth", 2.into()),
                ("clones", 3.into()),
                ("answers_match", true.into()),
            ] {
                assert_eq!(object[key], expected, "{key}, {mode}, {who}");
            }
            // The figures are of the fork that made the workers, and of no other.
            assert_eq!(object["phases_us"]["request"]["n"], 1);
            assert_eq!(object["phases_us"]["restore"]["n"], 3);
            let fetched = object["pages_fetched"].as_u64().unwrap() > 0;
            assert_eq!(fetched, mode == "lazy", "{mode}");
        }
    }
}

#[test]
fn a_pair_of_freeze_and_memory_mode_that_does_not_exist_is_a_usage_error() {
    let dir = TempDir::new().unwrap();
    for (freeze, mode) in [
        ("remap", "lazy"),
        ("copy", "lazy"),
        ("write-protect", "cow"),
    ] {
        let args = ["demo", "--freeze", freeze, "--memory-mode", mode];
        forkvm(dir.path(), &args)
            .expect(2, "remap and copy give memory mode cow")
            .expect(2, "write-protect gives lazy");
    }
    // Before anything is built.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
#[ignore = "searches the whole genomes for 2,000 reads: a minute"]
fn two_thousand_reads_are_where_an_independent_search_finds_them() {
    let Some((_dir, object)) = demo(&["--checks", "2000"]) else {
        return;
    };
    assert_eq!(object["independent_checks"], 2000);
    assert_eq!(object["answers_match"], true);
}
