//! Parts of tests that run in a process of their own, which lacks something.

use std::env;
use std::ffi::OsString;
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

/// What to give /bin/sh so that this binary runs the ignored test `name` after the shell did `before`.
pub fn part_arguments(name: &str, before: &str) -> Vec<OsString> {
    let script = format!("{before} && export {PART}={name} && exec \"$0\" \"$@\"");
    let mut arguments: Vec<OsString> = vec!["-c".into(), script.into()];
    arguments.push(env::current_exe().unwrap().into());
    arguments.extend(["--exact", name, "--ignored", "--nocapture"].map(OsString::from));
    arguments
}

/// Runs the ignored test `name` of this binary in a process of its own, after the shell did `before`.
pub fn run_part(name: &str, before: &str) {
    let child = Command::new("/bin/sh")
        .args(part_arguments(name, before))
        .output();
    let output = child.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    print!("{text}");
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}");
}
