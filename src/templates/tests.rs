//! Templates of files that are no machines: what is kept, what is noticed, what is left behind.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use tempfile::{TempDir, tempdir};

use super::*;

struct Place {
    directory: TempDir,
    templates: Templates,
}

impl Place {
    fn new() -> Place {
        let directory = tempdir().unwrap();
        let templates = Templates::at(directory.path().join("templates"));
        Place {
            directory,
            templates,
        }
    }

    fn kernel(&self) -> PathBuf {
        let path = self.directory.path().join("vmlinux");
        fs::write(&path, "kernel").unwrap();
        path
    }

    fn draft(&self, name: &str) -> Draft {
        let draft = self.templates.begin(name).unwrap();
        fs::create_dir(draft.machine()).unwrap();
        fs::write(draft.machine().join("memory"), vec![7; 100_000]).unwrap();
        draft
    }

    fn make(&self, name: &str) -> Template {
        let draft = self.draft(name);
        draft
            .finish(json!({ "vcpus": 1 }), &[self.kernel()])
            .unwrap()
    }

    fn entries(&self) -> Vec<String> {
        let entries = fs::read_dir(self.templates.directory()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}

/// The error with which a machine is refused.
fn refused(template: &Template) -> String {
    template.machine().err().unwrap().to_string()
}

#[test]
fn a_template_is_found_as_it_was_made() {
    let place = Place::new();
    assert!(place.templates.names().unwrap().is_empty());
    let made = place.make("web");
    let found = place.templates.find("web").unwrap();
    assert_eq!(found.manifest(), made.manifest());
    assert_eq!(found.manifest().about["vcpus"], 1);
    assert_eq!(place.templates.names().unwrap(), ["web"]);
    let mut seen = (0, 0);
    found
        .verify(&mut |done, total| seen = (done, total))
        .unwrap();
    assert_eq!(seen, (100_006, 100_006));
}

#[test]
fn a_second_template_of_one_name_is_refused_also_when_both_were_begun() {
    let place = Place::new();
    let late = place.draft("web");
    place.make("web");
    assert!(matches!(
        place.templates.begin("web").unwrap_err(),
        TemplateError::Exists { .. }
    ));
    let lost = late.finish(json!({}), &[]).unwrap_err();
    assert!(matches!(lost, TemplateError::Exists { .. }), "{lost}");
    assert_eq!(place.entries(), ["web"]);
}

#[test]
fn a_draft_that_is_given_up_leaves_nothing() {
    let place = Place::new();
    drop(place.draft("web"));
    assert!(place.entries().is_empty());
    assert!(place.templates.names().unwrap().is_empty());
}

#[test]
fn what_a_killed_maker_left_goes_with_the_next_template_and_what_a_living_one_makes_stays() {
    let place = Place::new();
    let living = place.draft("slow");
    let killed = place.templates.directory().join(".work-killed");
    fs::create_dir(&killed).unwrap();
    fs::write(killed.join("lock"), "").unwrap();
    place.make("web");
    assert!(!killed.exists());
    assert!(living.machine().exists());
}

#[test]
fn a_file_that_was_written_to_is_named_at_the_next_use() {
    let place = Place::new();
    let template = place.make("web");
    let kernel = place.directory.path().join("vmlinux");
    // As some editors and package managers do.
    fs::rename(&kernel, kernel.with_extension("old")).unwrap();
    fs::write(&kernel, "kernel").unwrap();
    let text = refused(&template);
    assert!(
        text.contains("vmlinux has changed") && text.contains("web"),
        "{text}"
    );
    fs::remove_file(&kernel).unwrap();
    assert!(refused(&template).contains("vmlinux"));
    fs::rename(kernel.with_extension("old"), &kernel).unwrap();
    // A rename touches the inode.
    assert!(refused(&template).contains("ctime"));
}

#[test]
fn memory_that_was_changed_behind_its_times_is_found_by_its_hash() {
    let place = Place::new();
    let template = place.make("web");
    let memory = template.directory().join("machine/memory");
    let before = memory.metadata().unwrap();
    let mut file = OpenOptions::new().write(true).open(&memory).unwrap();
    file.seek(SeekFrom::Start(50_000)).unwrap();
    file.write_all(&[8]).unwrap();
    file.set_modified(before.modified().unwrap()).unwrap();
    // The times of the inode cannot be set back: as if its record had been made after the damage.
    let path = template.directory().join("template.json");
    let mut manifest = template.manifest().clone();
    let record = manifest
        .files
        .iter_mut()
        .find(|file| file.file.path == Path::new("machine/memory"))
        .unwrap();
    let looks = forkvm_clone_engine::saved::SavedFile::look(&memory).unwrap();
    record.file.ctime_ns = looks.ctime_ns;
    fs::write(&path, manifest.to_json().unwrap()).unwrap();
    let template = place.templates.find("web").unwrap();
    let error = template.verify(&mut |_, _| {}).unwrap_err().to_string();
    assert!(
        error.contains("machine/memory") && error.contains("BLAKE3"),
        "{error}"
    );
}

#[test]
fn a_removed_template_is_gone_and_its_name_is_free() {
    let place = Place::new();
    place.make("web");
    place.templates.remove("web").unwrap();
    assert!(place.entries().is_empty());
    let unknown = place.templates.remove("web").unwrap_err();
    assert!(
        matches!(unknown, TemplateError::Unknown { .. }),
        "{unknown}"
    );
    place.make("web");
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let place = Place::new();
    for name in ["", ".", "..", ".web", "a/b", "a b"] {
        let refused = place.templates.begin(name).unwrap_err();
        assert!(
            matches!(refused, TemplateError::Name { .. }),
            "{name:?}: {refused}"
        );
        assert!(place.templates.find(name).is_err() && place.templates.remove(name).is_err());
    }
}

#[test]
fn a_manifest_of_another_version_or_none_is_refused_by_its_path() {
    let place = Place::new();
    let template = place.make("web");
    let path = template.directory().join("template.json");
    for text in ["", "{}", "nonsense"] {
        fs::write(&path, text).unwrap();
        let error = place.templates.find("web").unwrap_err().to_string();
        assert!(error.contains("template.json"), "{error}");
    }
    let mut newer = serde_json::to_value(template.manifest()).unwrap();
    newer["format"] = 2.into();
    fs::write(&path, newer.to_string()).unwrap();
    let error = place.templates.find("web").unwrap_err().to_string();
    assert!(error.contains("format 2"), "{error}");
}

#[test]
fn a_file_that_is_written_to_while_it_is_hashed_is_never_kept_as_what_it_was_not() {
    let place = Place::new();
    let draft = place.draft("web");
    let busy = place.directory.path().join("busy");
    fs::write(&busy, vec![0; 64 << 20]).unwrap();
    let writer = busy.clone();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(1));
        let mut file = OpenOptions::new().append(true).open(writer).unwrap();
        file.write_all(b"more").unwrap();
    });
    let made = draft.finish(json!({}), std::slice::from_ref(&busy));
    thread.join().unwrap();
    // The writer came before the first look, in the middle, or after the last.
    match made.and_then(|template| template.verify(&mut |_, _| {})) {
        Ok(()) => {}
        Err(error) => assert!(error.to_string().contains("busy"), "{error}"),
    }
}
