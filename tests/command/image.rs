//! `forkvm image`, without building a kernel: that takes minutes and half a gigabyte (`make linux`).

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::tempdir;

/// The command with a cache of its own in `dir`, and a PATH that holds nothing.
fn image(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_forkvm"))
        .arg("image")
        .args(args)
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .env("PATH", dir)
        .env_remove("FORKVM_LOG")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn tools_that_are_missing_are_named_at_once_and_nothing_starts() {
    let dir = tempdir().unwrap();
    let output = image(dir.path(), &["build", "minimal", "--json", "-"]);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(3), "{text}");
    for tool in ["make", "gcc", "flex", "bison", "bc", "xz"] {
        assert!(
            text.contains(&format!("{tool} (package ")),
            "{tool}: {text}"
        );
    }
    assert!(text.contains("apt-get install"), "{text}");
    assert!(!text.contains("doctor"), "{text}");
    let error = report(&output)["error"].as_str().unwrap().to_owned();
    assert!(error.contains("xz-utils"), "{error}");
    assert!(!dir.path().join("cache").exists());
}

#[test]
fn a_recipe_that_is_not_there_is_a_usage_error_and_a_wrong_one_a_failure() {
    let dir = tempdir().unwrap();
    let output = image(dir.path(), &["build", "maximal"]);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("minimal"), "{}", stderr(&output));

    let recipe = dir.path().join("mine");
    fs::create_dir(&recipe).unwrap();
    fs::write(recipe.join("recipe.toml"), "colour = \"red\"\n").unwrap();
    let output = image(dir.path(), &["build", "./mine"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("colour"), "{}", stderr(&output));
}

#[test]
fn an_empty_cache_is_listed_and_tidied() {
    let dir = tempdir().unwrap();
    let output = image(dir.path(), &["ls", "--json", "-"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let listed = report(&output);
    assert_eq!(listed["images"], serde_json::json!([]));
    let cache = dir.path().join("cache/forkvm/images");
    assert_eq!(listed["cache"], cache.to_str().unwrap());

    let output = image(dir.path(), &["rm", "--stale", "--json", "-"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(report(&output)["removed"], serde_json::json!([]));

    let output = image(dir.path(), &["rm", "minimal"]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("image ls"), "{}", stderr(&output));
    for args in [&["rm"][..], &["rm", "minimal", "--stale"]] {
        let output = image(dir.path(), args);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    }
}
