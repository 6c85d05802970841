//! A VM feeds two images at most: a further fork first completes the oldest itself, with the VM
//! running, whether or not there is a copier.

use std::sync::{Arc, Mutex};

use forkvm::engine::Phase;
use forkvm::engine::image::MemoryImage;
use forkvm::{ForkPoint, FreezeKind, MemoryMode};

use crate::common::{Guest, LONG, Obedient, Setup, fork_by, need_kvm, scaled};

/// Fork points, and which of their images were complete when the pause of each further fork began.
#[derive(Clone)]
struct Watched {
    is_complete: fn(&MemoryImage) -> bool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    points: Vec<Arc<ForkPoint>>,
    complete: Vec<Vec<bool>>,
}

impl Watched {
    fn new(is_complete: fn(&MemoryImage) -> bool) -> Watched {
        let state = Arc::default();
        Watched { is_complete, state }
    }

    fn boot(&self, cmdline: String) -> Guest {
        let watched = self.clone();
        let setup = Setup::new(cmdline).no_copier();
        let vm = setup.hook(move |phase, paused| {
            if phase == Phase::Pause {
                assert!(paused.is_none(), "the parent runs");
                watched.look();
            }
            Ok(())
        });
        let vm = vm.boot();
        vm.wait_ready(LONG).unwrap();
        vm
    }

    fn look(&self) {
        let mut state = self.state.lock().unwrap();
        let images = state.points.iter().map(|point| point.image());
        let complete = images.map(|image| (self.is_complete)(image)).collect();
        state.complete.push(complete);
    }

    fn fork(&self, vm: &Guest, freeze: FreezeKind) {
        let point = vm.fork_point(fork_by(freeze, MemoryMode::Lazy, 1)).unwrap();
        self.state.lock().unwrap().points.push(point);
    }

    /// The last forks were four in a row, with nobody to touch or write more than `vm` does.
    fn expect_the_oldest_complete_before_each_pause(&self) {
        let state = self.state.lock().unwrap();
        let forks = &state.complete[state.complete.len() - 4..];
        let expected: [&[bool]; 4] = [&[], &[false], &[true, false], &[true, true, false]];
        assert_eq!(forks, expected);
    }
}

#[test]
fn a_third_fork_of_a_parent_that_writes_first_completes_the_first_image_and_no_other() {
    need_kvm!();
    let watched = Watched::new(MemoryImage::is_whole);
    let vm = watched.boot(format!("job=reach mib={} hot=1", scaled(32, 4)));
    for _ in 0..4 {
        watched.fork(&vm, FreezeKind::WriteProtect);
    }
    watched.expect_the_oldest_complete_before_each_pause();
    let figures = vm.family().faults().figures();
    assert!(figures.pages_by_parent_write > 0, "it writes: {figures:?}");
    assert_eq!(vm.consoles.text(), "");
}

/// Pages that the parent of deltas has written.
const WRITTEN: u64 = 256;

/// What lies between two changed parts may still be missing: an earlier image has that, not the parent.
#[test]
fn a_third_fork_by_delta_first_completes_the_first_image_and_no_other() {
    need_kvm!();
    let watched = Watched::new(|image| image.pages_present() >= WRITTEN);
    let vm = watched.boot(format!("job=obey pages={WRITTEN}"));
    let base = vm.fork_point(fork_by(FreezeKind::Remap, MemoryMode::Cow, 1));
    Obedient::new(&vm, vm.member()).write(0, 1, WRITTEN);
    for _ in 0..4 {
        watched.fork(&vm, FreezeKind::Delta);
    }
    watched.expect_the_oldest_complete_before_each_pause();
    drop(base);
}
