//! Whole builds, with a kernel that takes no compiler.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::{Sample, StopAfter, names};
use crate::build::{BuildError, Built, Request, find_or_make};
use crate::cache::{Cache, CacheError};
use crate::image::{BZIMAGE, CONFIG, Image, VMLINUX};
use crate::initramfs::Given;
use crate::kernel::{KernelError, KernelMaker};
use crate::recipe::Recipe;
use crate::watch::{Step, Watch};

type Act = dyn Fn(&Path) -> Result<(), KernelError> + Send + Sync;

/// Writes a few bytes for a kernel; what it does before can be chosen.
struct Fake {
    made: AtomicU32,
    before: Box<Act>,
}

impl Fake {
    fn new() -> Fake {
        Fake::that(|_| Ok(()))
    }

    fn that(before: impl Fn(&Path) -> Result<(), KernelError> + Send + Sync + 'static) -> Fake {
        Fake {
            made: AtomicU32::new(0),
            before: Box::new(before),
        }
    }

    fn made(&self) -> u32 {
        self.made.load(Ordering::Relaxed)
    }
}

impl KernelMaker for Fake {
    fn make(
        &self,
        _recipe: &Recipe,
        work: &Path,
        out: &Path,
        log: &Path,
        _watch: &mut dyn Watch,
    ) -> Result<String, KernelError> {
        self.made.fetch_add(1, Ordering::Relaxed);
        fs::write(log, "all that make said").unwrap();
        fs::write(work.join("half"), "half made").unwrap();
        for name in [VMLINUX, BZIMAGE, CONFIG] {
            fs::write(out.join(name), name).unwrap();
        }
        (self.before)(work)?;
        Ok("6.1.0".into())
    }
}

fn build(sample: &Sample, kernel: &dyn KernelMaker) -> Result<Built, BuildError> {
    build_with(sample, kernel, &mut ())
}

fn build_with(
    sample: &Sample,
    kernel: &dyn KernelMaker,
    watch: &mut dyn Watch,
) -> Result<Built, BuildError> {
    let cache = Cache::at(sample.cache_dir());
    let request = Request {
        recipe: &sample.recipe(),
        given: &Given::new(),
        kernel,
        cache: &cache,
    };
    find_or_make(&request, Ok(()), watch)
}

fn broken() -> KernelError {
    KernelError::Io {
        action: "compiling",
        path: "main.c".into(),
        source: std::io::Error::other("no"),
    }
}

#[test]
fn an_image_is_built_once() {
    let sample = Sample::new();
    let kernel = Fake::new();
    let first = build(&sample, &kernel).unwrap();
    assert!(first.fresh);
    let second = build(&sample, &kernel).unwrap();
    assert!(!second.fresh);
    assert_eq!(kernel.made(), 1);
    let image = second.image;
    assert_eq!(image.directory(), first.image.directory());
    assert_eq!((image.name(), image.kernel_version()), ("sample", "6.1.0"));
    assert_eq!(image.cmdline(), "console=ttyS0 quiet");
    assert_eq!(
        names(image.directory()),
        [
            "bzImage",
            "image.json",
            "initramfs.cpio",
            "kernel.config",
            "vmlinux"
        ]
    );
    let directory = image.directory().file_name().unwrap().to_str().unwrap();
    assert_eq!(directory, format!("sample-{}", &image.hash()[..16]));
    assert_eq!(fs::read(image.vmlinux()).unwrap(), b"vmlinux");
    assert_eq!(image.files()["vmlinux"].bytes, 7);
    // Neither work nor log is left.
    assert_eq!(names(&sample.cache_dir()), [".lock", "logs", directory]);
    assert!(names(&sample.cache_dir().join("logs")).is_empty());
}

#[test]
fn other_inputs_are_another_image_beside_it() {
    let sample = Sample::new();
    let kernel = Fake::new();
    let first = build(&sample, &kernel).unwrap().image;
    sample.append("init", "echo more\n");
    let second = build(&sample, &kernel).unwrap();
    assert!(second.fresh);
    assert_ne!(second.image.hash(), first.hash());
    assert_eq!(Cache::at(sample.cache_dir()).images().unwrap().len(), 2);
}

#[test]
fn a_kernel_is_compiled_once_for_all_images_that_have_it() {
    let sample = Sample::new();
    let kernel = Fake::new();
    let first = build(&sample, &kernel).unwrap().image;
    sample.append("init", "echo more\n");
    let second = build(&sample, &kernel).unwrap();
    assert!(second.fresh);
    assert_eq!(kernel.made(), 1);
    assert_eq!(second.image.kernel_version(), "6.1.0");
    for name in [VMLINUX, BZIMAGE, CONFIG] {
        assert_eq!(second.image.files()[name], first.files()[name]);
    }
    sample.append("kernel.config", "CONFIG_SMP=y\n");
    build(&sample, &kernel).unwrap();
    assert_eq!(kernel.made(), 2);
}

#[test]
fn a_kernel_that_was_changed_is_not_used_again() {
    let sample = Sample::new();
    let kernel = Fake::new();
    let first = build(&sample, &kernel).unwrap().image;
    fs::write(first.vmlinux(), "VMLINUX").unwrap();
    sample.append("init", "echo more\n");
    let second = build(&sample, &kernel).unwrap().image;
    assert_eq!(kernel.made(), 2);
    assert_eq!(fs::read(second.vmlinux()).unwrap(), b"vmlinux");
}

#[test]
fn a_build_that_fails_leaves_only_its_log() {
    let sample = Sample::new();
    let error = build(&sample, &Fake::that(|_| Err(broken()))).unwrap_err();
    assert!(matches!(error, BuildError::Kernel(_)), "{error}");
    assert_eq!(names(&sample.cache_dir()), [".lock", "logs"]);
    let logs = names(&sample.cache_dir().join("logs"));
    assert_eq!(logs.len(), 1, "{logs:?}");
    // And hinders nobody.
    assert!(build(&sample, &Fake::new()).unwrap().fresh);
    assert!(names(&sample.cache_dir().join("logs")).is_empty());
}

#[test]
fn a_build_that_panics_leaves_nothing_either() {
    let sample = Sample::new();
    thread::scope(|scope| {
        let kernel = Fake::that(|_| panic!("on purpose"));
        let sample = &sample;
        scope
            .spawn(move || build(sample, &kernel))
            .join()
            .unwrap_err();
    });
    assert_eq!(names(&sample.cache_dir()), [".lock", "logs"]);
    assert!(build(&sample, &Fake::new()).unwrap().fresh);
}

#[test]
fn a_build_that_is_stopped_leaves_nothing() {
    let sample = Sample::new();
    let kernel = Fake::that(|_| Err(KernelError::Stopped));
    let error = build(&sample, &kernel).unwrap_err();
    assert!(matches!(error, BuildError::Stopped), "{error}");
    assert_eq!(names(&sample.cache_dir()), [".lock", "logs"]);
    assert!(names(&sample.cache_dir().join("logs")).is_empty());
    // Also when the stop comes at the last moment.
    let error = build_with(&sample, &Fake::new(), &mut StopAfter::new(0)).unwrap_err();
    assert!(matches!(error, BuildError::Stopped), "{error}");
    assert_eq!(names(&sample.cache_dir()), [".lock", "logs"]);
}

#[test]
fn what_a_dead_builder_left_goes_with_the_next_build() {
    let sample = Sample::new();
    let left = sample.cache_dir().join(".work-left/source");
    fs::create_dir_all(&left).unwrap();
    fs::write(left.join("half"), "half made").unwrap();
    build(&sample, &Fake::new()).unwrap();
    assert!(!left.exists());
    assert!(!sample.cache_dir().join(".work-left").exists());
}

#[test]
fn what_a_dead_builder_s_programs_still_write_goes_too() {
    let sample = Sample::new();
    let left = sample.cache_dir().join(".work-left");
    fs::create_dir_all(&left).unwrap();
    let until = Instant::now() + Duration::from_secs(1);
    let orphan = {
        let left = left.clone();
        thread::spawn(move || {
            let mut written = 0;
            // Until the directory is gone, as a program's would be that stands in it.
            while Instant::now() < until && fs::write(left.join(written.to_string()), "").is_ok() {
                written += 1;
            }
            written
        })
    };
    build(&sample, &Fake::new()).unwrap();
    assert!(!left.exists());
    orphan.join().unwrap();
    assert!(!left.exists());
}

#[test]
fn of_two_builders_at_once_one_builds() {
    let sample = Sample::new();
    let kernel = Fake::that(|work| {
        thread::sleep(Duration::from_millis(300));
        assert!(work.join("half").exists(), "another builder removed it");
        Ok(())
    });
    let built = thread::scope(|scope| {
        let builders: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| build(&sample, &kernel).unwrap()))
            .collect();
        builders
            .into_iter()
            .map(|builder| builder.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert_eq!(kernel.made(), 1);
    assert_eq!(built.iter().filter(|built| built.fresh).count(), 1);
    for built in &built {
        assert_eq!(built.image.hash(), built_hash(&sample));
    }
}

fn built_hash(sample: &Sample) -> String {
    let images = Cache::at(sample.cache_dir()).images().unwrap();
    assert_eq!(images.len(), 1);
    images[0].hash().to_owned()
}

#[test]
fn one_who_waits_for_another_builder_says_so_and_can_be_stopped() {
    #[derive(Default)]
    struct Waits(u32);
    impl Watch for Waits {
        fn at(&mut self, step: Step, _done: u64, _total: u64) {
            assert_eq!(step, Step::Waiting);
            self.0 += 1;
        }
        fn stop(&self) -> bool {
            self.0 > 2
        }
    }
    let sample = Sample::new();
    let cache = Cache::at(sample.cache_dir());
    let lock = cache.lock(&mut ()).unwrap();
    let kernel = Fake::new();
    let mut waits = Waits::default();
    let error = build_with(&sample, &kernel, &mut waits).unwrap_err();
    assert!(matches!(error, BuildError::Stopped), "{error}");
    assert_eq!((waits.0, kernel.made()), (3, 0));
    drop(lock);
    assert!(build(&sample, &kernel).unwrap().fresh);
}

#[test]
fn an_input_that_changes_while_it_is_built_makes_no_image() {
    let sample = Sample::new();
    let busybox = sample.busybox();
    let kernel = Fake::that(move |_| {
        fs::write(&busybox, "upgraded").unwrap();
        Ok(())
    });
    let error = build(&sample, &kernel).unwrap_err();
    assert!(matches!(error, BuildError::Changed), "{error}");
    assert!(Cache::at(sample.cache_dir()).images().unwrap().is_empty());
}

#[test]
fn a_damaged_image_is_built_anew() {
    let damages: [fn(&Image); 4] = [
        |image| fs::write(image.vmlinux(), "cut").unwrap(),
        |image| fs::remove_file(image.initramfs()).unwrap(),
        |image| fs::write(image.directory().join("image.json"), "{").unwrap(),
        |image| fs::remove_file(image.directory().join("image.json")).unwrap(),
    ];
    for damage in damages {
        let sample = Sample::new();
        let kernel = Fake::new();
        damage(&build(&sample, &kernel).unwrap().image);
        assert!(Cache::at(sample.cache_dir()).images().unwrap().is_empty());
        let again = build(&sample, &kernel).unwrap();
        assert!(again.fresh);
        Image::open(again.image.directory()).unwrap();
    }
}

#[test]
fn an_image_of_a_later_forkvm_is_refused_by_its_format() {
    let sample = Sample::new();
    let image = build(&sample, &Fake::new()).unwrap().image;
    let path = image.directory().join("image.json");
    fs::write(&path, "{\"format\": 99, \"else\": 1}").unwrap();
    let error = Image::open(image.directory()).unwrap_err();
    assert!(error.to_string().contains("format 99"), "{error}");
    // And is not for this one to remove.
    assert!(
        Cache::at(sample.cache_dir())
            .remove_stale()
            .unwrap()
            .is_empty()
    );
    assert!(path.exists());
}

#[test]
fn images_are_removed_by_name_or_directory() {
    let sample = Sample::new();
    let cache = Cache::at(sample.cache_dir());
    let error = cache.remove("sample").unwrap_err();
    assert!(matches!(error, CacheError::None { .. }), "{error}");
    let first = build(&sample, &Fake::new()).unwrap().image;
    sample.append("init", "echo more\n");
    let second = build(&sample, &Fake::new()).unwrap().image;
    let directory = first.directory().file_name().unwrap().to_str().unwrap();
    let removed = cache.remove(directory).unwrap();
    assert_eq!(removed.len(), 1);
    assert_eq!(removed[0].path, first.directory());
    assert!(removed[0].bytes > first.bytes());
    assert_eq!(cache.images().unwrap().len(), 1);
    assert_eq!(cache.remove("sample").unwrap()[0].path, second.directory());
    assert_eq!(names(&sample.cache_dir()), [".lock", "logs"]);
}

#[test]
fn stale_is_all_but_what_was_used_last() {
    let sample = Sample::new();
    let cache = Cache::at(sample.cache_dir());
    assert!(cache.remove_stale().unwrap().is_empty());
    let first_init = sample.read("init");
    let first = build(&sample, &Fake::new()).unwrap().image;
    sample.append("init", "echo more\n");
    let second = build(&sample, &Fake::new()).unwrap().image;
    let later = SystemTime::now() + Duration::from_secs(5);
    fs::write(sample.dir().join("init"), first_init).unwrap();
    assert!(!build(&sample, &Fake::new()).unwrap().fresh);
    // The clock of a file system is coarse.
    let description = fs::File::open(first.directory().join("image.json")).unwrap();
    description.set_modified(later).unwrap();
    let damaged = sample.cache_dir().join("other-0000");
    fs::create_dir(&damaged).unwrap();
    fs::write(sample.cache_dir().join("logs/old.log"), "old").unwrap();
    let left = sample.cache_dir().join(".work-left");
    fs::create_dir(&left).unwrap();

    let removed: Vec<_> = cache
        .remove_stale()
        .unwrap()
        .into_iter()
        .map(|removed| removed.path)
        .collect();
    for gone in [&damaged, &left, second.directory()] {
        assert!(removed.contains(&gone.to_owned()), "{removed:?}");
        assert!(!gone.exists());
    }
    assert_eq!(removed.len(), 4, "{removed:?}");
    assert_eq!(built_hash(&sample), first.hash());
}

#[test]
fn nobody_removes_what_a_builder_works_on() {
    let sample = Sample::new();
    let cache = Cache::at(sample.cache_dir());
    let others = cache.clone();
    let kernel = Fake::that(move |work| {
        assert!(others.remove_stale().unwrap().is_empty());
        assert!(work.join("half").exists());
        Ok(())
    });
    build(&sample, &kernel).unwrap();
    assert_eq!(kernel.made(), 1);
    assert_eq!(cache.images().unwrap().len(), 1);
}
