//! Parts of tests that run in a process of their own, which lacks something.

use std::env;
use std::process::Command;

/// Set, to the part's name, in such a process.
const PART: &str = "FORKVM_TEST_PART";

/// Whether this is the process in which the part `name` is to run; says so if not.
pub fn is_part(name: &str) -> bool {
    let here = env::var(PART).is_ok_and(|part| part == name);
    if !here {
        println!("skipped: only a part of another test");
    }
    here
}

/// What a shell does before it executes this binary so that it runs the part `name`.
pub fn begin_part(name: &str) -> String {
    format!("export {PART}={name}")
}

/// Runs the ignored test `name` of this binary in a process of its own, after the shell did `before`.
pub fn run_part(name: &str, before: &str) {
    let begin = begin_part(name);
    let child = Command::new("sh")
        .args(["-c", &format!("{before} && {begin} && exec \"$0\" \"$@\"")])
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .output();
    let output = child.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    print!("{text}");
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}");
}
