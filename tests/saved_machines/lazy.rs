//! Saved machines that run before their memory is read.

use std::fs;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::abi::doorbell::report;
use forkvm::engine::saved::{OpenMachine, RestoreError};
use forkvm::engine::source::{PageSink, PageSource, SourceError, Sources};
use forkvm::engine::{Family, Member, WorkingSet};
use forkvm::vmm::Kvm;
use forkvm::vmm::memory_file::{MemoryFile, PAGE};
use forkvm::{CloneSpec, End, FamilyConfig, FaultConfig, FreezeKind, MemoryMode};
use tempfile::{TempDir, tempdir};

use super::common::switch::{Manner, Switch};
use super::common::{LONG, Obedient, as_tests_are_to_run, need_kvm};
use super::home::Home;

/// A machine with this job, saved to `DIR/saved` when it was ready.
fn saved(vcpus: u32, job: &str) -> TempDir {
    let dir = tempdir().unwrap();
    let home = Home::saving_to(&dir.path().join("saved"));
    home.boot(vcpus, None, job).save().unwrap();
    dir
}

/// A family in which pages come when they are touched, and never otherwise.
fn home_of(dir: &TempDir) -> Home {
    Home::filling(&dir.path().join("again"), None)
}

fn restore(home: &Home, dir: &TempDir) -> Arc<Member> {
    home.restore_as(&dir.path().join("saved"), MemoryMode::Lazy)
}

/// `count` clones that fetch what they touch.
fn lazy(count: u32) -> CloneSpec {
    CloneSpec {
        memory_mode: MemoryMode::Lazy,
        freeze: FreezeKind::Delta,
        ..CloneSpec::new(count)
    }
}

/// Pages that were read so far, for whatever reason.
fn pages_read(home: &Home) -> u64 {
    let figures = home.family.faults().figures();
    figures.pages_by_fault
        + figures.pages_by_prefetch
        + figures.pages_by_background
        + figures.pages_by_parent_write
}

fn pages_saved(dir: &TempDir) -> u64 {
    let path = dir.path().join("saved/memory");
    let file = MemoryFile::open(fs::File::open(path).unwrap(), "memory").unwrap();
    let pages = |chunk| u64::from(file.data_pages(chunk).unwrap().count_ones());
    (0..file.chunks()).map(pages).sum()
}

#[test]
fn it_is_the_same_machine_whether_or_not_it_is_filled_in_the_background() {
    need_kvm!();
    for (vcpus, background) in [(1, None), (2, None), (2, Some(16)), (4, Some(1024))] {
        let dir = saved(vcpus, "job=oracle mib=4 writers=1");
        let home = Home::filling(&dir.path().join("again"), background);
        let vm = restore(&home, &dir);
        home.expect_well(&home.verify_by_a_fork(&vm));
        home.quit(&vm);
    }
}

#[test]
fn it_runs_before_its_memory_is_read_and_reads_what_it_touches() {
    need_kvm!();
    let dir = saved(1, "job=touch mib=32");
    let data = pages_saved(&dir);
    assert!(data >= 32 * 256, "{data}");

    let home = home_of(&dir);
    let vm = restore(&home, &dir);
    let started = pages_read(&home);
    assert!(
        started < data / 8,
        "{started} of {data} pages before it ran"
    );
    // It halts until it is forked; then parent and clone read every word.
    let clone = vm.fork(lazy(1)).unwrap().clones.remove(0);
    home.expect_well(&clone);
    home.expect_well(&vm);
    assert!(pages_read(&home) >= 32 * 256, "{}", pages_read(&home));
}

/// As the switch says, of sources that deliver what they are asked for and nothing beside it.
struct Exactly(Switch);

impl Sources for Exactly {
    fn of_image(&self, source: Arc<dyn PageSource>) -> Arc<dyn PageSource> {
        self.0.of_image(Arc::new(Exact(source)))
    }
}

struct Exact(Arc<dyn PageSource>);

impl PageSource for Exact {
    fn name(&self) -> String {
        self.0.name()
    }

    fn fetch(&self, ranges: &[Range<u64>], sink: &mut dyn PageSink) -> Result<(), SourceError> {
        let mut fetch = |range: &Range<u64>| {
            let range = range.clone();
            let mut cut = Cut { range, sink };
            self.0.fetch(&[cut.range.clone()], &mut cut)
        };
        ranges.iter().try_for_each(&mut fetch)
    }
}

/// Passes on what lies in `range`.
struct Cut<'a> {
    range: Range<u64>,
    sink: &'a mut dyn PageSink,
}

impl Cut<'_> {
    fn within(&self, range: Range<u64>) -> Range<u64> {
        range.start.max(self.range.start)..range.end.min(self.range.end)
    }
}

impl PageSink for Cut<'_> {
    fn pages(&mut self, offset: u64, content: &[u8]) -> Result<(), SourceError> {
        let part = self.within(offset..offset + content.len() as u64);
        if part.is_empty() {
            return Ok(());
        }
        let content = &content[(part.start - offset) as usize..(part.end - offset) as usize];
        self.sink.pages(part.start, content)
    }

    fn zero(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        let part = self.within(range);
        if part.is_empty() {
            return Ok(());
        }
        self.sink.zero(part)
    }

    fn there(&mut self, range: Range<u64>) -> Result<(), SourceError> {
        self.sink.there(self.within(range))
    }
}

/// Where that page cannot be had, nothing is started.
#[test]
fn its_doorbell_page_is_there_before_it_is_built() {
    need_kvm!();
    let dir = tempdir().unwrap();
    let home = Home::saving_to(&dir.path().join("saved"));
    let vm = home.boot(1, None, "job=touch mib=1");
    let page = vm.with_paused(|paused| {
        let address = paused.doorbell().page().expect("the guest has one");
        paused.ram().layout().offset_of(address).unwrap()
    });
    let page = page.unwrap();
    vm.save().unwrap();

    let switch = Switch::new();
    let config = FamilyConfig {
        sources: Some(Arc::new(Exactly(switch.clone()))),
        faults: FaultConfig {
            chunk: PAGE as u64,
            background: None,
            ..FaultConfig::default()
        },
        ..as_tests_are_to_run()
    };
    let family = Family::new(Arc::new(Kvm::open().unwrap()), config);
    let restore = || {
        let machine = OpenMachine::open(&dir.path().join("saved")).unwrap();
        family.restore(machine, None, MemoryMode::Lazy, &mut |_| {})
    };
    switch.set(page..page + PAGE as u64, Manner::Fail);
    match restore() {
        Err(RestoreError::Source(why)) => {
            assert!(why.to_string().contains("as the test says"), "{why}")
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was started"),
    }
    switch.set_all(Manner::Near);
    restore().unwrap();
    family.end();
}

#[test]
fn it_is_given_at_once_what_it_touched_after_an_earlier_restore() {
    need_kvm!();
    let dir = saved(1, "job=touch mib=16");
    // It halts until it is forked; then it reads every word.
    let run = |known: WorkingSet| {
        let home = home_of(&dir);
        let mut machine = OpenMachine::open(&dir.path().join("saved")).unwrap();
        let expected = known.len() / PAGE as u64;
        machine.working_set = known;
        let restored = home
            .family
            .restore(machine, None, MemoryMode::Lazy, &mut |_| {});
        let vm = restored.unwrap();
        let start = Instant::now();
        while pages_read(&home) < expected {
            assert!(start.elapsed() < LONG, "{} pages", pages_read(&home));
            thread::sleep(Duration::from_millis(5));
        }
        let by_fault = || home.family.faults().figures().pages_by_fault;
        let before = by_fault();
        drop(vm.fork_point(lazy(1)).unwrap());
        home.expect_well(&vm);
        (vm.working_set(), by_fault() - before)
    };
    let (touched, first) = run(WorkingSet::default());
    assert!(touched.len() >= 15 << 20, "{touched:?}");
    let (_, second) = run(touched);
    println!("{first} pages by faults, {second} with a working set");
    assert!(second * 4 < first, "{second} pages of {first} by faults");
}

#[test]
fn it_is_filled_in_the_background_without_being_touched() {
    need_kvm!();
    let dir = saved(1, "job=touch mib=16");
    let home = Home::filling(&dir.path().join("again"), Some(4096));
    let vm = restore(&home, &dir);
    let start = Instant::now();
    while pages_read(&home) < pages_saved(&dir) {
        assert!(start.elapsed() < LONG, "{} pages", pages_read(&home));
        thread::sleep(Duration::from_millis(5));
    }
    home.expect_well(&home.verify_touch(&vm));
}

#[test]
fn its_clones_and_theirs_are_forked_by_delta_while_it_is_not_whole() {
    need_kvm!();
    let dir = saved(2, "job=oracle mib=4 writers=1 go-on=1");
    let home = home_of(&dir);
    let vm = restore(&home, &dir);
    let clone = vm.fork(lazy(1)).unwrap().clones.remove(0);
    let grandchild = clone.fork(lazy(1)).unwrap().clones.remove(0);
    assert_eq!(grandchild.identity().depth, 2);
    for (member, forks) in [(&vm, 1), (&clone, 2), (&grandchild, 2)] {
        let verified = member.wait_report(report::USER + forks, 1, LONG);
        assert!(verified.is_ok(), "{verified:?}\n{}", home.consoles.text());
        home.quit(member);
    }
}

#[test]
fn it_can_be_saved_again_before_it_is_whole() {
    need_kvm!();
    let dir = saved(1, "job=touch mib=16");
    {
        let home = home_of(&dir);
        let vm = restore(&home, &dir);
        vm.save().unwrap();
        assert_eq!(vm.wait().end, End::Saved);
    }
    // Not from the first one.
    fs::remove_dir_all(dir.path().join("saved")).unwrap();
    for mode in [MemoryMode::Cow, MemoryMode::Lazy] {
        let home = Home::filling(&dir.path().join("third"), None);
        let vm = home.restore_as(&dir.path().join("again"), mode);
        home.expect_well(&home.verify_touch(&vm));
        home.expect_well(&vm);
    }
}

/// Pages of the job `obey`, and what page 0 of them holds; the others count on.
const PAGES: u64 = 4096;
const VALUE: u64 = 0x5eed_0000_0000;

/// Has the guest `obey` do what `line` says; what it printed. `None` when it ended instead.
fn say(home: &Home, vm: &Arc<Member>, line: &str) -> Option<Vec<String>> {
    let mut vm = Obedient::of(&home.consoles, vm);
    vm.begin(line);
    vm.answer_or_end()
}

/// A saved machine whose page `page` is damaged on disk.
fn damaged(page: u64) -> TempDir {
    let dir = tempdir().unwrap();
    let home = Home::saving_to(&dir.path().join("saved"));
    let vm = home.boot(1, None, &format!("job=obey pages={PAGES}"));
    assert_eq!(
        say(&home, &vm, &format!("w 0 {VALUE} {PAGES}")),
        Some(vec![])
    );
    vm.save().unwrap();
    flip(&dir.path().join("saved/memory"), VALUE + page);
    dir
}

/// Flips a bit of the page that begins with `word`.
fn flip(path: &Path, word: u64) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let start = MemoryFile::open(file.try_clone().unwrap(), "memory")
        .unwrap()
        .data_start();
    let content = fs::read(path).unwrap();
    let pages = content[start as usize..].chunks(PAGE);
    let at = pages.zip(0u64..).find_map(|(page, number)| {
        let found = page[..8] == word.to_le_bytes() && page[PAGE - 8..] == word.to_le_bytes();
        found.then_some(start + number * PAGE as u64)
    });
    let at = at.expect("the guest wrote it") + 100;
    file.write_all_at(&[content[at as usize] ^ 1], at).unwrap();
}

#[test]
fn damage_ends_who_needs_it_by_name_and_nobody_else() {
    need_kvm!();
    let (bad, good) = (2048, 512);
    let dir = damaged(bad);
    // Whoever reads everything first finds it before anything runs.
    let cow = Home::saving_to(&dir.path().join("cow"));
    let machine = OpenMachine::open(&dir.path().join("saved")).unwrap();
    let refused = cow
        .family
        .restore(machine, None, MemoryMode::Cow, &mut |_| {});
    assert!(refused.is_err());

    let home = home_of(&dir);
    let vm = restore(&home, &dir);
    let clones = vm.fork(lazy(2)).unwrap().clones;
    assert_eq!(say(&home, &clones[0], &format!("r {bad} 1")), None);
    let ended = Instant::now();
    let End::Failed(why) = clones[0].wait().end else {
        panic!("it ended otherwise: {}", clones[0].wait().end);
    };
    assert!(
        why.contains("is damaged") && why.contains("checksum"),
        "{why}"
    );
    assert!(ended.elapsed() < Duration::from_secs(1));
    for member in [&vm, &clones[1]] {
        let due = format!("= {good} {}", VALUE + good);
        assert_eq!(say(&home, member, &format!("r {good} 1")), Some(vec![due]));
        assert_eq!(say(&home, member, "q 0"), Some(vec![]));
        home.expect_well(member);
    }
}

#[test]
fn damage_that_only_the_background_meets_ends_nobody() {
    need_kvm!();
    let dir = damaged(2048);
    let home = Home::filling(&dir.path().join("again"), Some(4096));
    let vm = restore(&home, &dir);
    // The copier comes by it.
    let start = Instant::now();
    while pages_read(&home) < 2048 {
        assert!(start.elapsed() < LONG, "{} pages", pages_read(&home));
        thread::sleep(Duration::from_millis(5));
    }
    thread::sleep(Duration::from_millis(100));
    for page in [1, PAGES - 1] {
        let due = format!("= {page} {}", VALUE + page);
        assert_eq!(say(&home, &vm, &format!("r {page} 1")), Some(vec![due]));
    }
    vm.kill();
    assert_eq!(vm.wait().end, End::Killed);
}
