//! Recipes: what is refused, and how it is said.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;

use super::Sample;
use crate::image::Origin;
use crate::recipe::{FileSource, Recipe, RecipeError, built_in};

/// The sample's text, changed.
fn changed(from: &str, to: &str) -> Result<Recipe, RecipeError> {
    let sample = Sample::new();
    let text = String::from_utf8(sample.read("recipe.toml")).unwrap();
    assert!(text.contains(from), "{from:?} is not in {text}");
    let mut files = BTreeMap::new();
    for name in ["kernel.config", "init"] {
        files.insert(name.to_owned(), sample.read(name));
    }
    files.insert(
        "recipe.toml".into(),
        text.replacen(from, to, 1).into_bytes(),
    );
    Recipe::new("sample", Origin::BuiltIn, files)
}

/// What is wrong, causes included.
fn fault(from: &str, to: &str) -> String {
    let error = changed(from, to).unwrap_err();
    let source = error.source().map(ToString::to_string).unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn recipes_of_forkvm_are_right() {
    assert!(built_in().contains(&"minimal"), "{:?}", built_in());
    for name in built_in() {
        let recipe = Recipe::find(name).unwrap();
        assert_eq!(recipe.name(), name);
        assert!(!recipe.about().is_empty() && recipe.cmdline().contains("console="));
        assert!(recipe.kernel().steps > 0, "{name} needs an estimate");
        let mut files = recipe.initramfs().files.iter();
        let init = files.find(|file| file.path == "init").unwrap();
        assert_eq!(init.mode, 0o755);
    }
}

#[test]
fn a_recipe_of_one_s_own_is_called_like_its_directory() {
    let sample = Sample::new();
    let recipe = sample.recipe();
    assert_eq!(recipe.name(), "sample");
    assert_eq!(
        *recipe.origin(),
        Origin::Directory(fs::canonicalize(sample.dir()).unwrap())
    );
    assert_eq!(recipe.initramfs().files[1].links, ["sh"]);
    assert_eq!(
        recipe.initramfs().files[0].source,
        FileSource::Recipe("init".into())
    );
}

#[test]
fn a_key_that_is_not_known_is_refused_by_name() {
    for (from, to) in [
        ("about =", "colour = \"red\"\nabout ="),
        ("[kernel]", "[kernel]\ncolour = \"red\""),
        ("[initramfs]", "[initramfs]\ncolour = \"red\""),
        ("path = \"init\"", "path = \"init\"\ncolour = \"red\""),
        ("[kernel]", "[colour]\n[kernel]"),
    ] {
        let text = fault(from, to);
        assert!(text.contains("sample") && text.contains("colour"), "{text}");
    }
}

#[test]
fn a_key_that_is_missing_is_named() {
    let text = fault("about = \"a sample\"", "");
    assert!(text.contains("about"), "{text}");
    let text = fault("base = \"tinyconfig\"", "");
    assert!(text.contains("base"), "{text}");
}

#[test]
fn values_that_mean_nothing_are_refused() {
    for (from, to, said) in [
        ("source = \"/", "source = \"", "absolute"),
        ("\"tinyconfig\"", "\"clean\"", "\"clean\""),
        ("\"tinyconfig\"", "\"-f/etc/defconfig\"", "no target"),
        ("\"tinyconfig\"", "\"A=$(shell id)config\"", "no target"),
        ("quiet\"", "quiet\\nmore\"", "one line"),
        (
            "config = \"kernel.config\"",
            "config = \"other\"",
            "\"other\"",
        ),
        ("recipe = \"init\"", "recipe = \"other\"", "\"other\""),
        ("recipe = \"init\"", "", "exactly one of"),
        (
            "recipe = \"init\"",
            "recipe = \"init\"\ngiven = \"a\"",
            "exactly one of",
        ),
        ("package = \"busybox-static\"", "", "with the `package`"),
        ("host = \"/", "host = \"", "absolute"),
        ("path = \"init\"", "path = \"/init\"", "\"/init\""),
        ("path = \"init\"", "path = \"../init\"", "\"../init\""),
        ("path = \"init\"", "path = \"usr/bin/sh\"", "twice"),
        ("[\"proc\"]", "[\"init\"]", "twice"),
        ("[\"proc\"]", "[\"proc//x\"]", "proc//x"),
        ("links = [\"sh\"]", "links = [\"/b\"]", "/b"),
        ("mode = 0o755", "mode = 0o100755", "mode"),
    ] {
        let text = fault(from, to);
        assert!(text.contains(said), "{to}: {text}");
    }
}

#[test]
fn a_name_that_is_not_known_comes_with_those_that_are() {
    let text = Recipe::find("minimum").unwrap_err().to_string();
    assert!(
        text.contains("\"minimum\"") && text.contains("minimal") && text.contains("./minimum"),
        "{text}"
    );
}

#[test]
fn what_is_no_recipe_is_refused() {
    let sample = Sample::new();
    fs::remove_file(sample.dir().join("recipe.toml")).unwrap();
    let find = || Recipe::find(sample.dir().to_str().unwrap());
    let error = find().unwrap_err();
    assert!(error.source().unwrap().to_string().contains("recipe.toml"));
    fs::write(sample.dir().join("large"), vec![0; 17 << 20]).unwrap();
    assert!(matches!(find().unwrap_err(), RecipeError::TooLarge { .. }));
    fs::remove_dir_all(sample.dir()).unwrap();
    let text = find().unwrap_err().to_string();
    assert!(text.contains("sample"), "{text}");
}
