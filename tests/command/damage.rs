//! Saved machines that cannot be used: each is refused, and says why.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use forkvm::devices::{Section, Sections};
use forkvm::vmm::state_file;
use tempfile::{TempDir, tempdir};

use super::common::need_kvm;
use super::harness::forkvm;

/// A saved machine in `DIR/saved`.
fn saved() -> TempDir {
    let dir = tempdir().unwrap();
    save_to(dir.path(), "saved");
    dir
}

fn save_to(dir: &Path, name: &str) {
    let args = [
        "run",
        "--guest",
        "save mib=1",
        "--memory",
        "64",
        "--save",
        name,
    ];
    forkvm(dir, &args).expect(0, "vm was saved");
}

#[track_caller]
fn refused(dir: &TempDir, said: &str) {
    forkvm(dir.path(), &["restore", "saved"]).expect(1, said);
    // Whoever looks at it is told the same, by another command.
    forkvm(dir.path(), &["state", "show", "saved"]).expect(1, said);
}

fn flip(path: &Path, at: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

fn cut(path: &Path, len: u64) {
    fs::OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len)
        .unwrap();
}

#[test]
fn a_missing_file_is_named() {
    need_kvm!();
    for name in ["state", "memory"] {
        let dir = saved();
        fs::remove_file(dir.path().join("saved").join(name)).unwrap();
        refused(&dir, &format!("saved/{name}"));
    }
}

#[test]
fn a_file_that_is_cut_off_is_named() {
    need_kvm!();
    for name in ["state", "memory"] {
        let dir = saved();
        let path = dir.path().join("saved").join(name);
        cut(&path, fs::metadata(&path).unwrap().len() - 1);
        refused(&dir, &format!("{name} file is cut off"));
    }
}

#[test]
fn a_flipped_bit_is_found_wherever_it_is() {
    need_kvm!();
    let dir = saved();
    let state = dir.path().join("saved/state");
    let memory = dir.path().join("saved/memory");
    for at in [20, 60, fs::metadata(&state).unwrap().len() / 2] {
        flip(&state, at);
        refused(&dir, "damaged");
        flip(&state, at);
    }
    // In the header, in the table, and in the page at 1 MiB where the guest's code is.
    let data = fs::metadata(&memory).unwrap().len() - (64 << 20);
    for at in [20, 60, data + (1 << 20)] {
        flip(&memory, at);
        refused(&dir, "damaged");
        flip(&memory, at);
    }
    assert_eq!(forkvm(dir.path(), &["restore", "saved"]).code(), 0);
}

/// Memory offset of a page that the job has filled, and the guest needs no sooner than it checks it.
fn filled_page(memory: &[u8], data: u64) -> u64 {
    let pages = memory[data as usize..].chunks(4096).enumerate();
    // No zero word: neither code nor tables look like that.
    let mut filled = pages
        .filter(|(_, page)| {
            page.chunks(8)
                .all(|word| word.iter().any(|&byte| byte != 0))
        })
        .map(|(number, _)| number as u64 * 4096);
    filled.nth(100).expect("the job fills 256 pages")
}

#[test]
fn damage_ends_a_lazily_restored_machine_when_it_needs_the_page_and_says_so() {
    need_kvm!();
    let dir = saved();
    let path = dir.path().join("saved/memory");
    let content = fs::read(&path).unwrap();
    let data = content.len() as u64 - (64 << 20);
    flip(&path, data + filled_page(&content, data) + 8);
    let lazy = ["restore", "saved", "--memory-mode", "lazy", "--background"];
    for background in ["off", "1"] {
        let ended = forkvm(dir.path(), &[&lazy[..], &[background]].concat());
        ended
            .expect(1, "vm failed: the saved machine cannot deliver the memory")
            .expect(1, "saved/memory: chunk")
            .expect(1, "is damaged");
        assert_eq!(ended.stdout(), "");
    }
    refused(&dir, "damaged");
}

#[test]
fn a_newer_format_and_a_foreign_file_are_told_from_damage() {
    need_kvm!();
    for name in ["state", "memory"] {
        let dir = saved();
        let path = dir.path().join("saved").join(name);
        flip(&path, 8);
        refused(
            &dir,
            &format!("the {name} file has format 17, this forkvm reads format 1"),
        );
        fs::write(
            &path,
            "#!/bin/sh\necho not a machine at all, but long enough for a header\n",
        )
        .unwrap();
        refused(&dir, &format!("not a forkvm {name} file"));
    }
}

#[test]
fn state_and_memory_of_two_saves_do_not_make_a_machine() {
    need_kvm!();
    let dir = saved();
    save_to(dir.path(), "other");
    fs::rename(
        dir.path().join("other/memory"),
        dir.path().join("saved/memory"),
    )
    .unwrap();
    refused(&dir, "the memory file belongs to save");
}

/// Rewrites the state with other sections, as a whole and valid file.
fn rewrite(dir: &TempDir, change: impl Fn(&mut Vec<Section>)) {
    let path = dir.path().join("saved/state");
    let state = state_file::decode(&fs::read(&path).unwrap()).unwrap();
    let mut list: Vec<Section> = state.sections.iter().cloned().collect();
    change(&mut list);
    let mut sections = Sections::default();
    list.into_iter()
        .for_each(|section| sections.push(section).unwrap());
    fs::write(&path, state_file::encode(&sections, state.save).unwrap()).unwrap();
}

fn body<'a>(sections: &'a mut [Section], kind: &str) -> &'a mut Section {
    sections
        .iter_mut()
        .find(|section| section.kind == kind)
        .unwrap()
}

#[test]
fn a_machine_of_another_host_is_refused_by_what_differs() {
    need_kvm!();
    let dir = saved();
    rewrite(&dir, |sections| {
        let host = &mut body(sections, "host").body;
        let vendor = ["AuthenticAMD", "GenuineIntel", "HygonGenuine"]
            .iter()
            .find_map(|vendor| host.windows(12).position(|part| part == vendor.as_bytes()))
            .expect("a known vendor");
        host[vendor..vendor + 12].copy_from_slice(b"SomebodyElse");
    });
    let refused = forkvm(dir.path(), &["restore", "saved"]);
    refused
        .expect(1, "on SomebodyElse CPU")
        .expect(1, "restore it on one like that");
}

#[test]
fn a_section_that_is_missing_newer_or_nobodys_is_named() {
    need_kvm!();
    type Change = dyn Fn(&mut Vec<Section>);
    let cases: [(&str, &Change); 4] = [
        ("\"identity\" is missing", &|sections| {
            sections.retain(|s| s.kind != "identity")
        }),
        ("\"dev/serial\" is missing", &|sections| {
            sections.retain(|s| s.kind != "dev/serial")
        }),
        ("\"kvm/vcpu/0\" has version 9", &|sections| {
            body(sections, "kvm/vcpu/0").version = 9
        }),
        ("\"dev/toaster\" belongs to nothing", &|sections| {
            let kind = "dev/toaster".into();
            sections.push(Section {
                kind,
                version: 1,
                body: vec![0xa0],
            });
        }),
    ];
    for (said, change) in cases {
        let dir = saved();
        rewrite(&dir, change);
        forkvm(dir.path(), &["restore", "saved"]).expect(1, said);
    }
}
