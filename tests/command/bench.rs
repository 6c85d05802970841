//! The laboratory keeps its contract: rows that other programs read, whatever happens meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::tempdir;

use super::common::{LONG, need_kvm};
use super::harness::{Running, forkvm, names_in};

/// Columns of every row.
const COLUMNS: [&str; 14] = [
    "case", "unit", "p50", "p90", "p99", "min", "max", "n", "outliers", "forkvm", "kvm", "kernel",
    "host_cpu", "load1",
];

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn rows(report: &Value) -> &Vec<Value> {
    report["rows"].as_array().unwrap()
}

fn row<'a>(report: &'a Value, case: &str) -> &'a Value {
    let found = rows(report).iter().find(|row| row["case"] == case);
    found.unwrap_or_else(|| panic!("no case {case} in {report:#}"))
}

#[track_caller]
fn expect_contract(report: &Value, scenario: &str) {
    for key in ["forkvm", "host", "scenario", "seed", "partial", "rows"] {
        assert!(!report[key].is_null(), "{key}");
    }
    assert_eq!(report["scenario"], scenario);
    for row in rows(report) {
        for column in COLUMNS {
            assert!(!row[column].is_null(), "{column} is not in {row}");
        }
        let case = row["case"].as_str().unwrap();
        assert!(!case.contains(char::is_whitespace), "{case:?}");
        let number = |name: &str| row[name].as_f64().unwrap();
        let rising = ["min", "p50", "p90", "p99", "max"].map(number);
        assert!(rising.is_sorted(), "{case}: {rising:?}");
        assert!(number("n") >= 1.0, "{case}");
        assert_eq!(row["kernel"], report["host"]["kernel"], "{case}");
    }
}

#[test]
fn instantiate_reports_each_end_point_by_contract_and_in_its_order() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let ended = forkvm(
        dir.path(),
        &[
            "bench",
            "instantiate",
            "--quick",
            "--seed",
            "7",
            "--json",
            "-",
        ],
    );
    ended.expect(0, "seed 7");
    let report = parse(&ended.stdout());
    expect_contract(&report, "instantiate");
    assert_eq!(report["seed"], 7);
    assert_eq!(report["partial"], false);
    let skipped = report["skipped"].as_array().unwrap().len();
    let ways = [
        "cow/in-process",
        "cow/process",
        "lazy/in-process",
        "lazy/process",
        "sibling/in-process",
        "sibling/process",
        "replayed/in-process",
        "replayed/process",
    ];
    for (pool, way) in ["pooled", "unpooled"]
        .into_iter()
        .flat_map(|pool| ways.map(|way| (pool, way)))
    {
        if !way.starts_with("cow") && skipped > 0 {
            continue;
        }
        let points = [
            "built",
            "restored",
            "first_run",
            "first_action",
            "first_answer",
        ];
        let p50 = |point| {
            let row = row(&report, &format!("{pool}/{way}/{point}"));
            assert_eq!(row["unit"], "us");
            row["p50"].as_f64().unwrap()
        };
        assert!(
            points.map(p50).is_sorted(),
            "{pool}/{way}: {:?}",
            points.map(p50)
        );
    }
}

/// Runs `scenario` quickly and returns its report, which has `case` among its rows, as its table and its page have.
fn rows_and_files(scenario: &str, case: &str) -> Value {
    let dir = tempdir().unwrap();
    let args = [
        "bench", scenario, "--quick", "--json", "r.json", "--csv", "r.csv", "--html", "r.html",
        "--svg", "plots",
    ];
    forkvm(dir.path(), &args).expect(0, "");
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let report = parse(&read("r.json"));
    expect_contract(&report, scenario);
    row(&report, case);
    let lines = read("r.csv").lines().count();
    assert_eq!(lines, rows(&report).len() + 1, "{scenario}");
    assert!(read("r.html").contains(case), "{scenario}");
    if !["calls", "overhead"].contains(&scenario) {
        let plots = names_in(&dir.path().join("plots"));
        assert!(
            !plots.is_empty() && plots.iter().all(|name| name.ends_with(".svg")),
            "{plots:?}"
        );
    }
    report
}

/// The same of one whose values cannot be 0.
fn expect_rows_and_files(scenario: &str, case: &str) -> Value {
    let report = rows_and_files(scenario, case);
    let median = row(&report, case)["p50"].as_f64().unwrap();
    assert!(median > 0.0, "{scenario}: {median}");
    report
}

#[test]
fn every_scenario_has_rows_and_files_to_show_them() {
    need_kvm!();
    for (scenario, case) in [
        ("calls", "create-vm"),
        ("fault", "cow/first"),
        ("memory", "idle/private"),
        ("peers", "forkvm/pooled"),
        ("rewind", "slot-readd/512-pages"),
    ] {
        expect_rows_and_files(scenario, case);
    }
}

/// Of rows of clock fork, and of pauses. (`fork` itself boots VMs for a minute however quick it is to be: `make bench` has it.)
fn expect_populated_and_dirty(report: &Value) {
    for row in rows(report) {
        assert!(row["populated_mib"].as_f64() > Some(16.0), "{row}");
        assert!(row["dirty_mib"].is_number(), "{row}");
    }
}

#[test]
fn every_row_of_a_fork_of_forks_says_how_much_was_populated_and_dirty() {
    need_kvm!();
    let report = expect_rows_and_files("depth", "3/first_action");
    expect_populated_and_dirty(&report);
    assert_eq!(row(&report, "3/first_action")["dirty_mib"], 1.0);
}

#[test]
fn every_row_of_a_pause_says_how_much_was_populated_and_dirty() {
    need_kvm!();
    let report = expect_rows_and_files("pause", "write-protect/512-MiB/64-MiB");
    expect_populated_and_dirty(&report);
    for (case, dirty_mib) in [
        ("delta/512-MiB/64-MiB/8-MiB-dirty", 8.0),
        ("write-protect/8192-MiB/64-MiB-scattered", 64.0),
    ] {
        assert_eq!(row(&report, case)["dirty_mib"], dirty_mib, "{case}");
    }
}

#[test]
fn a_fan_out_tells_when_all_clones_ran_and_what_filling_the_pool_took() {
    need_kvm!();
    let report = expect_rows_and_files("fanout", "100/all_running");
    assert_eq!(row(&report, "100/all_running")["unit"], "ms");
    assert!(row(&report, "100/fill")["p50"].as_f64() > Some(0.0));
}

#[test]
fn the_row_of_an_overhead_has_the_pages_that_the_guests_read_and_wrote_themselves() {
    need_kvm!();
    // A value below 0 is noise.
    let report = rows_and_files("overhead", "job-1s/percent");
    let row = row(&report, "job-1s/percent");
    assert_eq!(row["pages_read"], 16.0 * 256.0, "{row}");
    assert_eq!(row["pages_written"], 4.0 * 256.0, "{row}");
    assert_eq!(row["dirty_mib"], 0.0, "{row}");
    assert!(row["populated_mib"].as_f64() > Some(64.0), "{row}");
    assert!(row["forked_ms"].as_f64() > Some(0.0), "{row}");
}

#[test]
fn a_peer_is_measured_beside_clones_and_one_that_is_missing_is_named_with_what_installs_it() {
    need_kvm!();
    let dir = tempdir().unwrap();
    for path in [
        PathBuf::from(std::env::var_os("PATH").unwrap()),
        dir.path().to_owned(),
    ] {
        let ended = Command::new(env!("CARGO_BIN_EXE_forkvm"))
            .args(["bench", "peers", "--quick", "--seed", "7", "--json", "-"])
            .current_dir(dir.path())
            .env("PATH", &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(0), "{said}");
        let report = parse(&String::from_utf8_lossy(&ended.stdout));
        expect_contract(&report, "peers");
        assert_eq!(report["partial"], false);
        let skipped = report["skipped"].as_array().unwrap();
        let missing = |peer: &str| skipped.iter().find(|one| one["case"] == peer);
        if path == dir.path() {
            let why = missing("qemu/restore").expect("QEMU is not in PATH")["why"].to_string();
            assert!(why.contains("apt-get install qemu-system-x86"), "{why}");
            let shown = "peers qemu/restore: not measured: qemu-system-x86_64 is not in PATH";
            assert!(said.contains(shown), "{said}");
        }
        for peer in [
            "fork+exec",
            "qemu/restore",
            "naive/read",
            "naive/map-private",
        ] {
            if let Some(missing) = missing(peer) {
                let why = missing["why"].as_str().unwrap();
                assert!(why.contains("apt-get install"), "{peer}: {why}");
                continue;
            }
            let n = |case: &str| row(&report, case)["n"].as_u64().unwrap();
            for pool in ["pooled", "unpooled"] {
                let ratio = format!("{peer}/over-{pool}");
                assert_eq!(row(&report, &ratio)["unit"], "ratio");
                assert_eq!(n(&ratio), n(peer));
            }
        }
    }
}

/// Processes of QEMU that the forkvm with this number has started: their command lines name it.
fn qemus_of(pid: u32) -> Vec<String> {
    let kernel = format!("/proc/{pid}/fd/");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter_map(|process| fs::read_to_string(process.path().join("cmdline")).ok())
        .filter(|line| line.contains("qemu-system") && line.contains(&kernel))
        .collect()
}

#[test]
fn no_qemu_outlives_a_run_however_that_ends() {
    need_kvm!();
    let dir = tempdir().unwrap();
    for (signal, option) in [
        ("KILL", "mode=control"),
        ("KILL", "-incoming"),
        ("INT", "-incoming"),
    ] {
        let mut running = Running::start(dir.path(), &["bench", "peers", "--quick"]);
        let pid = running.child().id();
        let begun = Instant::now();
        while !qemus_of(pid).iter().any(|line| line.contains(option)) {
            if running.child().try_wait().unwrap().is_some() || begun.elapsed() > LONG {
                println!("skipped: no QEMU that can run the guest here");
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        running.signal(signal);
        drop(running.wait());
        let ended = Instant::now();
        while !qemus_of(pid).is_empty() {
            assert!(ended.elapsed() < LONG, "{signal}: {:?}", qemus_of(pid));
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Waits until a clone runs that is made after the warm-up of its experiment.
fn wait_for_measured_clone(running: &mut Running) {
    let tasks = PathBuf::from(format!("/proc/{}/task", running.child().id()));
    let number_of_clone = |task: &Path| -> Option<u32> {
        let name = fs::read_to_string(task.join("comm")).ok()?;
        name.trim().strip_prefix("vm-bench.")?.parse().ok()
    };
    running.wait_until("a clone is measured", || {
        let tasks = fs::read_dir(&tasks).into_iter().flatten().flatten();
        tasks
            .filter_map(|task| number_of_clone(&task.path()))
            .any(|number| number > 8)
    });
}

#[test]
fn ctrl_c_writes_what_was_measured_and_marks_it_partial() {
    need_kvm!();
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let dir = tempdir().unwrap();
        let args = ["bench", "instantiate", "--json", "r.json", "--csv", "r.csv"];
        let mut running = Running::start(dir.path(), &args);
        wait_for_measured_clone(&mut running);
        running.signal(signal);
        let ended = running.wait();
        ended.expect(code, "");
        assert!(ended.stdout().contains("partial"), "{}", ended.stdout());
        let report = parse(&fs::read_to_string(dir.path().join("r.json")).unwrap());
        expect_contract(&report, "instantiate");
        assert_eq!(report["partial"], true);
        let measured: u64 = rows(&report)
            .iter()
            .map(|row| row["n"].as_u64().unwrap())
            .sum();
        assert!(
            measured > 0
                && rows(&report)
                    .iter()
                    .any(|row| row["n"].as_u64() < Some(200))
        );
        assert_eq!(names_in(dir.path()), ["r.csv", "r.json"]);
    }
}

#[test]
fn an_output_that_cannot_be_written_does_not_keep_the_others_from_being_written() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let base = [
        "bench", "calls", "--quick", "--json", "r.json", "--html", "r.html", "--csv",
    ];
    for (csv, why) in [
        ("/dev/full", "No space left on device"),
        ("nowhere/r.csv", "No such file or directory"),
    ] {
        let ended = forkvm(dir.path(), &[&base[..], &[csv]].concat());
        ended.expect(1, &format!("writing {csv}")).expect(1, why);
        assert_eq!(names_in(dir.path()), ["r.html", "r.json"]);
        expect_contract(
            &parse(&fs::read_to_string(dir.path().join("r.json")).unwrap()),
            "calls",
        );
    }
}

/// A report of `cases`, each with its median; everything else is the same.
fn past(cases: &[(String, f64)]) -> String {
    let row = |(case, p50): &(String, f64)| {
        json!({ "scenario": "fork", "case": case, "unit": "us", "p50": p50, "p90": p50 * 1.02, "p99": p50 * 1.1,
                "min": p50 * 0.9, "max": p50 * 2.0, "n": 50 })
    };
    let rows: Vec<Value> = cases.iter().map(row).collect();
    json!({ "forkvm": "0.1.0", "host": { "kvm": "pvm", "kernel": "6.12" }, "scenario": "fork", "seed": 1,
            "partial": false, "rows": rows })
    .to_string()
}

#[test]
fn compare_tells_what_changed_beyond_noise_and_ends_well() {
    let dir = tempdir().unwrap();
    let write = |name: &str, cases: [(&str, f64); 3]| {
        let cases = cases.map(|(case, p50)| (case.to_owned(), p50));
        fs::write(dir.path().join(name), past(&cases)).unwrap();
    };
    write("old.json", [("a", 1000.0), ("b", 1000.0), ("c", 1000.0)]);
    write("new.json", [("a", 700.0), ("b", 1030.0), ("c", 1300.0)]);
    let ended = forkvm(dir.path(), &["bench", "compare", "old.json", "new.json"]);
    ended.expect(0, "");
    let said = ended.stdout();
    assert!(said.contains("1 better, 1 worse, 1 same"), "{said}");
    assert!(
        said.contains("-30.0 %") && said.contains("+30.0 %") && !said.contains("+3.0 %"),
        "{said}"
    );

    let ended = forkvm(
        dir.path(),
        &["bench", "compare", "old.json", "new.json", "--json", "-"],
    );
    let object = parse(&ended.stdout());
    let verdicts: Vec<&str> = rows(&object)
        .iter()
        .map(|row| row["verdict"].as_str().unwrap())
        .collect();
    assert_eq!(verdicts, ["better", "same", "worse"]);

    fs::write(dir.path().join("no.json"), "{}").unwrap();
    forkvm(dir.path(), &["bench", "compare", "old.json", "no.json"])
        .expect(1, "it is not what `forkvm bench --json` writes");
}

#[test]
fn a_disk_that_fills_while_an_output_is_written_leaves_no_part_of_it() {
    let dir = tempdir().unwrap();
    let cases: Vec<(String, f64)> = (0..200).map(|case| (format!("case-{case}"), 1.0)).collect();
    for name in ["old.json", "new.json"] {
        fs::write(dir.path().join(name), past(&cases)).unwrap();
    }
    // A file may have 4 blocks of 512 or 1024 bytes; beyond, a write fails as on a full disk.
    let script =
        "trap '' XFSZ; ulimit -f 4; exec \"$0\" bench compare old.json new.json --json out.json";
    let run = || {
        let mut command = Command::new("sh");
        command
            .args(["-c", script, env!("CARGO_BIN_EXE_forkvm")])
            .current_dir(dir.path());
        command.output().unwrap()
    };
    let ended = run();
    let stderr = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("writing out.json") && stderr.contains("File too large"),
        "{stderr}"
    );
    assert_eq!(names_in(dir.path()), ["new.json", "old.json"]);
    // What was there before stays.
    fs::write(dir.path().join("out.json"), "before").unwrap();
    assert_eq!(run().status.code(), Some(1));
    assert_eq!(
        fs::read_to_string(dir.path().join("out.json")).unwrap(),
        "before"
    );
    assert_eq!(names_in(dir.path()), ["new.json", "old.json", "out.json"]);
}

#[test]
fn a_scenario_that_does_not_exist_is_a_usage_error_that_names_those_that_do() {
    let dir = tempdir().unwrap();
    forkvm(dir.path(), &["bench", "teleport"]).expect(2, "instantiate");
    forkvm(dir.path(), &["bench"]).expect(2, "SCENARIO");
    let help = forkvm(dir.path(), &["bench", "--help"]);
    assert!(
        help.stdout()
            .contains("forkvm bench compare old.json new.json"),
        "{}",
        help.stdout()
    );
}
