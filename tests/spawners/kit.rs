//! What clones are and do wherever they live: each test runs over every spawner, as
//! `kit::SPAWNER::NAME`.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use forkvm::devices::block::{Access, BlockLayer, RawFile};
use forkvm::engine::saved::{OpenMachine, SaveTo};
use forkvm::engine::{Family, MemberError, Phase, Vetoed};
use forkvm::vmm::{Kvm, PausedVm};
use forkvm::{
    CloneSpec, DiskSource, End, FamilyConfig, Finished, FreezeKind, MemoryMode, RewindWay,
};

use crate::common::switch::{Manner, Switch};

use crate::common::{
    Guest, LONG, Obedient, Setup, expect_end, expect_oracle_ok, finish_oracle, fork_by, need_kvm,
    with_causes,
};

macro_rules! kit {
    ($spawner:expr, $apart:expr) => {
        use super::*;

        fn setup(cmdline: &str) -> Setup {
            Setup::new(cmdline).spawner($spawner)
        }

        #[test]
        fn clones_live_where_their_spawner_says() {
            need_kvm!();
            super::clones_live_where_their_spawner_says(setup, $apart);
        }

        kit!(@ a_guest_forks_itself_and_joins_its_clones);
        kit!(@ generations_fork_themselves_and_join_one_another);
        kit!(@ a_clone_is_forked_as_its_parent_was_by_every_freeze);
        kit!(@ clones_of_a_clone_are_numbered_on_whoever_spawns_them);
        kit!(@ a_clone_that_was_forked_ends_with_all_that_it_wrote_to_its_disk);
        kit!(@ a_clone_is_rewound_with_its_forks_left_alone);
        kit!(@ a_clone_whose_fork_is_refused_at_any_phase_goes_on_as_it_was);
        kit!(@ clones_of_a_remap_verify_all_they_know);
        kit!(@ clones_of_a_copy_verify_all_they_know);
        kit!(@ clones_of_a_stop_verify_all_they_know);
        kit!(@ clones_of_a_delta_verify_all_they_know);
        kit!(@ lazy_clones_of_a_write_protect_verify_all_they_know);
        kit!(@ lazy_clones_of_a_delta_verify_all_they_know);
        kit!(@ a_lazy_clone_sees_its_fork_while_its_parent_writes);
        kit!(@ lazy_clones_outlive_their_parent_and_their_fork_point);
        kit!(@ a_lazy_clone_ends_with_the_reason_when_its_source_is_gone);
        kit!(@ clones_of_a_fork_point_start_later_and_without_their_parent);
        kit!(@ shells_that_were_filled_serve_clones);
        kit!(@ what_a_clone_writes_is_its_own);
        kit!(@ what_a_clone_takes_of_the_host_is_counted_where_it_lives);
        kit!(@ what_a_clone_wrote_to_its_disks_is_there_when_it_has_ended);
        kit!(@ a_disk_below_a_clone_may_itself_be_an_overlay_file);
        kit!(@ the_end_points_of_a_clones_start_are_passed_in_order);
        kit!(@ every_end_is_told_as_it_was);
        kit!(@ a_clone_that_is_killed_as_it_starts_is_gone);
        kit!(@ a_family_that_is_ended_takes_its_clones_along);
        kit!(@ a_clone_is_saved_and_goes_on_elsewhere);
        kit!(@ a_clone_gives_pages_back_and_reads_zeros);
        kit!(@ an_observer_may_refuse_each_phase_and_nothing_is_left);
        kit!(@ all_that_a_clone_printed_is_there_before_its_end_is_told);
    };
    (@ $name:ident) => {
        #[test]
        fn $name() {
            need_kvm!();
            super::$name(setup);
        }
    };
}

mod in_process {
    kit!(
        Arc::new(forkvm::engine::spawn::in_process::InProcess),
        false
    );
}

mod process {
    kit!(crate::common::workers(), true);
}

type New = fn(&str) -> Setup;

fn clones_live_where_their_spawner_says(new: New, apart: bool) {
    let vm = new("job=oracle mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    assert_eq!(vm.member().process(), None, "who is booted lives here");
    let clones = vm.fork(CloneSpec::new(3)).unwrap();
    for clone in &clones {
        assert_eq!(clone.member().process().is_some(), apart);
        assert_ne!(clone.member().process(), Some(std::process::id()));
        let look = clone.member().with_paused(|paused| paused.config().vcpus);
        match (apart, look) {
            (false, Ok(1) | Err(MemberError::Ended { .. })) => {}
            (true, Err(MemberError::Elsewhere { process, .. })) => {
                assert_eq!(Some(process), clone.member().process());
            }
            (_, other) => panic!("{other:?}"),
        }
    }
    for clone in &clones {
        expect_end(&vm, clone.member(), End::Exited(0));
    }
}

fn a_guest_forks_itself_and_joins_its_clones(new: New) {
    let vm = new("job=fork n=3 mib=2").vcpus(2).boot();
    assert_eq!(vm.join().end, End::Exited(3), "{}", vm.consoles.text());
    let clones = vm.log.clones();
    for (id, clone) in (1..).zip(&clones) {
        expect_end(&vm, clone, End::Exited(id));
        assert_eq!(clone.identity().clone_id, id);
        assert_eq!(clone.name(), format!("vm.{id}"));
        let line = format!("vm.{id}: clone {id} of 3\n");
        assert!(vm.consoles.text().contains(&line), "{}", vm.consoles.text());
    }
    assert_eq!(clones.len(), 3);
}

fn generations_fork_themselves_and_join_one_another(new: New) {
    let vm = new("job=tree depth=4 mib=1").boot();
    assert_eq!(vm.join().end, End::Exited(4), "{}", vm.consoles.text());
    let clones = vm.log.clones();
    let names: Vec<_> = clones.iter().map(|clone| clone.name()).collect();
    assert_eq!(names, ["vm.1", "vm.1.1", "vm.1.1.1", "vm.1.1.1.1"]);
    for (depth, clone) in (1..).zip(&clones) {
        expect_end(&vm, clone, End::Exited(4 - depth));
        assert_eq!(clone.identity().depth, depth);
    }
}

fn a_clone_is_forked_as_its_parent_was_by_every_freeze(new: New) {
    for (freeze, mode) in [
        (FreezeKind::Delta, MemoryMode::Cow),
        (FreezeKind::Delta, MemoryMode::Lazy),
        (FreezeKind::Copy, MemoryMode::Cow),
        (FreezeKind::Stop, MemoryMode::Cow),
        (FreezeKind::Stop, MemoryMode::Lazy),
    ] {
        let vm = new("job=obey pages=64").no_copier().boot();
        vm.wait_ready(LONG).unwrap();
        Obedient::new(&vm, vm.member()).write(0, 100, 64);
        let first = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
        let clone = vm.fork(first).unwrap().remove(0);
        let mut clone = Obedient::new(&vm, clone.member());
        clone.write(8, 800, 8);
        let ticket = clone.member.fork(fork_by(freeze, mode, 2)).unwrap();
        assert_eq!(ticket.point.freeze(), freeze);
        assert_eq!(ticket.point.depth(), 2);
        match freeze {
            FreezeKind::Stop => expect_end(&vm, &clone.member, End::Stopped),
            _ => {
                assert_eq!(clone.member.identity().fork_count, 2);
                clone.write(8, 1, 8);
            }
        }
        let mut clones: Vec<_> = ticket.clones.iter().collect();
        let late = ticket.point.spawn(1).unwrap();
        clones.extend(&late);
        for (id, of_clone) in (1..).zip(clones) {
            assert_eq!(of_clone.identity().clone_id, id);
            assert_eq!(of_clone.identity().fork_count, 2);
            let mut of_clone = Obedient::new(&vm, of_clone);
            of_clone.expect(0, 100, 8);
            of_clone.expect(8, 800, 8);
            of_clone.expect(16, 116, 48);
            of_clone.write(0, 1, 64);
            of_clone.exit();
        }
        if freeze != FreezeKind::Stop {
            clone.expect(0, 100, 8);
            clone.expect(8, 1, 8);
            clone.expect(16, 116, 48);
            clone.exit();
        }
    }
}

fn clones_of_a_clone_are_numbered_on_whoever_spawns_them(new: New) {
    let vm = new("job=obey pages=4").boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let first = clone.fork_point(CloneSpec::new(1)).unwrap();
    let second = clone.member().fork(CloneSpec::new(2)).unwrap();
    let mut names: Vec<_> = second
        .clones
        .iter()
        .map(|vm| vm.name().to_owned())
        .collect();
    for point in [&first, &second.point, &first] {
        names.push(point.spawn(1).unwrap()[0].name().to_owned());
    }
    assert_eq!(names, ["vm.1.1", "vm.1.2", "vm.1.3", "vm.1.4", "vm.1.5"]);
}

fn a_clone_that_was_forked_ends_with_all_that_it_wrote_to_its_disk(new: New) {
    let folder = tempfile::tempdir().unwrap();
    let vm = new("job=oracle mib=1 disk=1 go-on=1")
        .disk(DiskSource::volatile(zeros(folder.path())))
        .boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    expect_oracle_ok(&vm, clone.member(), 1);
    for forks in 2..=4 {
        // So that each fork finds the disk written.
        thread::sleep(Duration::from_millis(20));
        let ticket = clone.member().fork(CloneSpec::new(1)).unwrap();
        expect_oracle_ok(&vm, clone.member(), forks);
        finish_oracle(&vm, &ticket.clones[0]);
    }
    thread::sleep(Duration::from_millis(20));
    // It does not take another step: who comes of this begins with its disk as it is left.
    let stop = fork_by(FreezeKind::Stop, MemoryMode::Cow, 1);
    let point = clone.fork_point(stop).unwrap();
    expect_end(&vm, clone.member(), End::Stopped);
    let left = content(&clone.join(), 0);
    let written = |bytes: &[u8]| {
        bytes
            .chunks(512)
            .filter(|s| s.iter().any(|b| *b != 0))
            .count()
    };
    assert!(written(&left) > 0);

    let heir = point.spawn(1).unwrap().remove(0);
    expect_oracle_ok(&vm, &heir, 5);
    finish_oracle(&vm, &heir);
    // It only ever writes more sectors, so what it found is there or was written again.
    let after = content(&heir.wait(), 0);
    let lost = left.chunks(512).zip(after.chunks(512));
    let lost =
        lost.filter(|(left, after)| left.iter().any(|b| *b != 0) && after.iter().all(|b| *b == 0));
    assert_eq!(lost.count(), 0);
    let written_before = left
        .chunks(512)
        .zip(after.chunks(512))
        .filter(|(l, a)| l == a)
        .count();
    assert!(written_before > 0 && written(&after) >= written(&left));
}

fn a_clone_whose_fork_is_refused_at_any_phase_goes_on_as_it_was(new: New) {
    let refused: Arc<Mutex<Option<Phase>>> = Arc::default();
    let hook = {
        let refused = refused.clone();
        move |phase, _: Option<&PausedVm<'_>>| match *refused.lock().unwrap() {
            Some(at) if at == phase => Err(Vetoed("the test".into())),
            _ => Ok(()),
        }
    };
    let vm = new("job=obey pages=64").no_copier().hook(hook).boot();
    vm.wait_ready(LONG).unwrap();
    Obedient::new(&vm, vm.member()).write(0, 100, 64);
    let lazy = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
    let clone = vm.fork(lazy).unwrap().remove(0);
    let mut clone = Obedient::new(&vm, clone.member());
    clone.write(0, 200, 32);
    for freeze in [FreezeKind::Delta, FreezeKind::Stop] {
        for phase in Phase::ALL {
            *refused.lock().unwrap() = Some(phase);
            let spec = fork_by(freeze, MemoryMode::Lazy, 2);
            let mut errors = vec![clone.member.fork(spec.clone()).err()];
            if phase <= Phase::Publish {
                errors.push(clone.member.fork_point(spec).err());
            }
            for error in errors {
                let error = with_causes(&error.expect("it is refused"));
                assert!(error.contains("the test"), "{phase}: {error}");
            }
            assert_eq!(clone.member.identity().fork_count, 1);
            assert_eq!(vm.family().running().len(), 2);
            clone.expect(0, 200, 32);
            clone.expect(32, 132, 32);
        }
    }
    *refused.lock().unwrap() = None;
    let stop = fork_by(FreezeKind::Stop, MemoryMode::Lazy, 1);
    let ticket = clone.member.fork(stop).unwrap();
    expect_end(&vm, &clone.member, End::Stopped);
    let mut heir = Obedient::new(&vm, &ticket.clones[0]);
    heir.expect(0, 200, 32);
    heir.expect(32, 132, 32);
    heir.exit();
}

fn a_clone_is_rewound_with_its_forks_left_alone(new: New) {
    let vm = new("job=obey pages=64").no_copier().boot();
    vm.wait_ready(LONG).unwrap();
    Obedient::new(&vm, vm.member()).write(0, 100, 64);
    let lazy = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
    let clone = vm.fork(lazy).unwrap().remove(0);
    let mut life = Obedient::new(&vm, clone.member());
    for round in 1..=3 {
        life.expect(0, 100, 64);
        life.write(0, 1000 * round, 32);
        let before = clone.identity();
        let delta = fork_by(FreezeKind::Delta, MemoryMode::Lazy, 1);
        let child = life.member.fork(delta).unwrap().clones.remove(0);
        assert_eq!(child.name(), format!("vm.1.{round}"));
        assert_eq!(clone.identity().fork_count, 2);
        clone.rewind_by(RewindWay::FreshShell).unwrap();
        let after = clone.identity();
        assert_ne!(after.generation, before.generation);
        assert_eq!(after.fork_count, 1);
        let mut child = Obedient::new(&vm, &child);
        child.expect(0, 1000 * round, 32);
        child.expect(32, 132, 32);
        child.exit();
    }
    life.expect(0, 100, 64);
    life.exit();
}

/// Forks an oracle that is at work, in the middle of it.
fn verify(new: New, before: Option<FreezeKind>, freeze: FreezeKind) {
    verify_with(new, before, freeze, MemoryMode::Cow);
}

fn verify_with(new: New, before: Option<FreezeKind>, freeze: FreezeKind, mode: MemoryMode) {
    let folder = tempfile::tempdir().unwrap();
    let vm = new("job=oracle mib=2 writers=1 disk=1")
        .vcpus(2)
        .disk(DiskSource::volatile(zeros(folder.path())))
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut forks = 0;
    if let Some(freeze) = before {
        forks += 1;
        drop(vm.fork_point(fork_by(freeze, MemoryMode::Cow, 1)).unwrap());
        expect_oracle_ok(&vm, vm.member(), forks);
    }
    thread::sleep(Duration::from_millis(3));
    let clones = vm.fork(fork_by(freeze, mode, 3)).unwrap();
    for clone in &clones {
        expect_end(&vm, clone.member(), End::Exited(0));
    }
    if freeze == FreezeKind::Stop {
        expect_end(&vm, vm.member(), End::Stopped);
    } else {
        expect_oracle_ok(&vm, vm.member(), forks + 1);
        finish_oracle(&vm, vm.member());
    }
}

fn clones_of_a_remap_verify_all_they_know(new: New) {
    verify(new, None, FreezeKind::Remap);
}

fn clones_of_a_copy_verify_all_they_know(new: New) {
    verify(new, None, FreezeKind::Copy);
}

fn clones_of_a_stop_verify_all_they_know(new: New) {
    verify(new, None, FreezeKind::Stop);
}

fn clones_of_a_delta_verify_all_they_know(new: New) {
    verify(new, Some(FreezeKind::Remap), FreezeKind::Delta);
}

fn lazy_clones_of_a_write_protect_verify_all_they_know(new: New) {
    verify_with(new, None, FreezeKind::WriteProtect, MemoryMode::Lazy);
}

fn lazy_clones_of_a_delta_verify_all_they_know(new: New) {
    let before = Some(FreezeKind::Remap);
    verify_with(new, before, FreezeKind::Delta, MemoryMode::Lazy);
}

/// A parent whose pages hold 1000 and on, and nobody who copies them ahead of a touch.
fn parent_of_cold_clones(new: New) -> Guest {
    let vm = new("job=obey pages=256").no_copier().boot();
    vm.wait_ready(LONG).unwrap();
    Obedient::new(&vm, vm.member()).write(0, 1000, 256);
    vm
}

fn a_lazy_clone_sees_its_fork_while_its_parent_writes(new: New) {
    let vm = parent_of_cold_clones(new);
    let mut parent = Obedient::new(&vm, vm.member());
    let cold = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 2);
    let clones = vm.fork(cold).unwrap();
    let mut first = Obedient::new(&vm, clones[0].member());
    let mut second = Obedient::new(&vm, clones[1].member());
    first.expect(0, 1000, 16);
    parent.write(8, 5000, 64);
    first.write(32, 6000, 4);
    second.expect(0, 1000, 256);
    first.expect(0, 1000, 32);
    first.expect(32, 6000, 4);
    first.expect(36, 1036, 220);
    parent.expect(8, 5000, 64);
    assert!(vm.family().faults().figures().pages_by_fault > 0);
    for vm in [first, second, parent] {
        vm.exit();
    }
}

fn lazy_clones_outlive_their_parent_and_their_fork_point(new: New) {
    let vm = parent_of_cold_clones(new);
    let cold = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 2);
    let point = vm.fork_point(cold).unwrap();
    let clones = point.spawn(2).unwrap();
    drop(point);
    vm.kill();
    assert_eq!(vm.member().wait().end, End::Killed);
    for clone in &clones {
        let mut clone = Obedient::new(&vm, clone);
        clone.expect(0, 1000, 256);
        clone.exit();
    }
}

fn a_lazy_clone_ends_with_the_reason_when_its_source_is_gone(new: New) {
    let switch = Switch::new();
    let vm = new("job=obey pages=256")
        .no_copier()
        .sources(switch.clone())
        .boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 1000, 256);
    let cold = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 1);
    let clone = vm.fork(cold).unwrap().remove(0);
    Obedient::new(&vm, clone.member()).expect(0, 1000, 16);
    switch.set_all(Manner::Gone);
    clone.member().console_input(b"r 0 256\n").unwrap();
    let end = clone.member().wait_for(LONG).expect("it ends").end;
    let End::Failed(why) = end else {
        panic!("{end}");
    };
    assert!(why.contains("delivers no memory any more"), "{why}");
    parent.expect(0, 1000, 256);
    parent.exit();
}

fn clones_of_a_fork_point_start_later_and_without_their_parent(new: New) {
    let vm = new("job=oracle mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    vm.kill();
    assert_eq!(vm.join().end, End::Killed);
    for _ in 0..3 {
        for clone in point.spawn(2).unwrap() {
            expect_end(&vm, &clone, End::Exited(0));
        }
    }
}

fn shells_that_were_filled_serve_clones(new: New) {
    let vm = new("job=oracle mib=1").vcpus(2).boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    expect_oracle_ok(&vm, vm.member(), 1);
    for _ in 0..2 {
        assert_eq!(point.fill_pool(4).unwrap(), 4);
        assert_eq!(point.fill_pool(4).unwrap(), 4, "those that are there count");
        for clone in point.spawn(6).unwrap() {
            expect_end(&vm, &clone, End::Exited(0));
        }
    }
    finish_oracle(&vm, vm.member());
}

fn what_a_clone_writes_is_its_own(new: New) {
    let vm = new("job=obey pages=256").boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 1000, 256);
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    let mut first = Obedient::new(&vm, clones[0].member());
    let mut second = Obedient::new(&vm, clones[1].member());
    first.expect(0, 1000, 256);
    first.write(0, 2000, 128);
    parent.write(64, 3000, 128);
    second.expect(0, 1000, 256);
    second.write(128, 4000, 16);
    first.expect(0, 2000, 128);
    first.expect(128, 1128, 128);
    parent.expect(64, 3000, 128);
    second.expect(128, 4000, 16);
    for vm in [first, second, parent] {
        vm.exit();
    }
}

fn what_a_clone_takes_of_the_host_is_counted_where_it_lives(new: New) {
    const PAGES: u64 = 512;
    let vm = new("job=obey pages=1024").boot();
    vm.wait_ready(LONG).unwrap();
    Obedient::new(&vm, vm.member()).write(0, 1, 1024);
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    let mut first = Obedient::new(&vm, clones[0].member());
    let mut second = Obedient::new(&vm, clones[1].member());
    first.write(0, 2, PAGES);
    second.expect(0, 1, PAGES);
    let (of_first, of_second) = (
        first.member.memory_use().unwrap(),
        second.member.memory_use().unwrap(),
    );
    assert!(of_first.private_kib >= PAGES * 4, "{of_first:?}");
    assert!(of_second.private_kib < PAGES * 4, "{of_second:?}");
    assert!(of_second.shared_kib >= PAGES * 4, "{of_second:?}");
    let family = vm.family().memory_use().unwrap();
    assert_eq!(family.members.len(), 3);
    assert!(family.members[first.member.name()].private_kib >= PAGES * 4);
    first.exit();
    second.exit();
}

/// A disk of 1 MiB of zeros in `folder`, read-only.
fn zeros(folder: &Path) -> Arc<dyn BlockLayer> {
    let path = folder.join("zeros.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    Arc::new(RawFile::open(&path, Access::ReadOnly).unwrap())
}

fn content(finished: &Finished, disk: usize) -> Vec<u8> {
    let mut bytes = vec![0; finished.disks[disk].len() as usize];
    finished.disks[disk].read_at(0, &mut bytes).unwrap();
    bytes
}

fn what_a_clone_wrote_to_its_disks_is_there_when_it_has_ended(new: New) {
    let folder = tempfile::tempdir().unwrap();
    let base = zeros(folder.path());
    let vm = new("job=blk-verify mib=1 n=2 disk=1")
        .disk(DiskSource::ReadOnly(base.clone()))
        .disk(DiskSource::volatile(base.clone()))
        .boot();
    expect_end(&vm, vm.member(), End::Exited(0));
    let mut finished: Vec<Finished> = Vec::new();
    for clone in vm.log.clones() {
        expect_end(&vm, &clone, End::Exited(0));
        finished.push(clone.wait());
    }
    for clone in &finished {
        assert!(clone.blk_counters[1].written_bytes > 0);
        assert_eq!(clone.blk_counters[0].written_bytes, 0);
        assert!(content(clone, 0).iter().all(|&byte| byte == 0));
    }
    finished.push(vm.join());
    let contents: Vec<Vec<u8>> = finished.iter().map(|vm| content(vm, 1)).collect();
    assert!(contents[0] != contents[1] && contents[1] != contents[2] && contents[0] != contents[2]);
}

fn a_disk_below_a_clone_may_itself_be_an_overlay_file(new: New) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    File::create(&path).unwrap().set_len(1 << 20).unwrap();
    let disk = RawFile::open(&path, Access::ReadWrite).unwrap();
    let vm = new("job=oracle mib=1 disk=1")
        .disk(DiskSource::Raw(Arc::new(disk)))
        .boot();
    vm.wait_ready(LONG).unwrap();
    for forks in 1..=3 {
        let clones = vm.fork(CloneSpec::new(2)).unwrap();
        for clone in &clones {
            expect_end(&vm, clone.member(), End::Exited(0));
        }
        expect_oracle_ok(&vm, vm.member(), forks);
        // So that the next fork finds the overlay written.
        thread::sleep(Duration::from_millis(20));
    }
    finish_oracle(&vm, vm.member());
}

fn the_end_points_of_a_clones_start_are_passed_in_order(new: New) {
    let vm = new("job=fork n=2").boot();
    vm.join();
    for clone in vm.log.clones() {
        let line = clone.timeline();
        let points = [
            line.fork_requested,
            line.spawn_requested,
            line.built,
            line.restored,
            line.first_run,
            line.first_action,
        ];
        assert!(points.iter().all(Option::is_some), "{line:?}");
        assert!(points.is_sorted(), "{line:?}");
    }
    let phases = vm.log.phases();
    for phase in Phase::ALL {
        let times = phases.iter().filter(|(of, _)| *of == phase).count();
        let per_clone = [Phase::Memory, Phase::Spawn, Phase::Restore, Phase::Identity];
        let due = if per_clone.contains(&phase) { 2 } else { 1 };
        assert_eq!(times, due, "{phase}: {phases:?}");
    }
}

fn every_end_is_told_as_it_was(new: New) {
    let vm = new("job=triple-fault n=2").vcpus(2).boot();
    let clones = || vm.log.clones();
    while clones().len() < 2 {
        thread::sleep(Duration::from_millis(1));
    }
    let clones = clones();
    expect_end(&vm, &clones[0], End::TripleFault { vcpu: 1 });
    clones[1].console_input(b"q").unwrap();
    expect_end(&vm, &clones[1], End::Exited(0));
    expect_end(&vm, vm.member(), End::Exited(255));
    let error = clones[0].console_input(b"q").unwrap_err();
    assert!(matches!(error, MemberError::Ended { .. }), "{error:?}");
}

fn a_clone_that_is_killed_as_it_starts_is_gone(new: New) {
    let vm = new("job=spin").vcpus(2).boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    for round in 0..20u64 {
        let clone = point.spawn(1).unwrap().remove(0);
        thread::sleep(Duration::from_micros(round * 20));
        clone.kill();
        assert_eq!(clone.wait_for(LONG).expect("it ends").end, End::Killed);
    }
}

fn a_family_that_is_ended_takes_its_clones_along(new: New) {
    let vm = new("job=spin").boot();
    vm.wait_ready(LONG).unwrap();
    let clones = vm.fork(CloneSpec::new(3)).unwrap();
    vm.family().end();
    for clone in &clones {
        assert_eq!(clone.join().end, End::Killed);
    }
    assert_eq!(vm.join().end, End::Killed);
    assert!(vm.family().running().is_empty());
}

fn a_clone_is_saved_and_goes_on_elsewhere(new: New) {
    let folder = tempfile::tempdir().unwrap();
    let saver = SaveTo::new(folder.path().join("saved"));
    let disks = tempfile::tempdir().unwrap();
    let vm = new("job=obey pages=64")
        .disk(DiskSource::volatile(zeros(disks.path())))
        .saver(saver)
        .boot();
    vm.wait_ready(LONG).unwrap();
    let clones = vm.fork(CloneSpec::new(1)).unwrap();
    let mut clone = Obedient::new(&vm, clones[0].member());
    clone.write(3, 77, 8);
    clones[0].member().save().unwrap();
    assert_eq!(clones[0].join().end, End::Saved);

    let machine = OpenMachine::open(&folder.path().join("saved-vm.1")).unwrap();
    let config = FamilyConfig {
        consoles: Arc::new(vm.consoles.clone()),
        ..FamilyConfig::default()
    };
    let family = Family::new(Arc::new(Kvm::open().unwrap()), config);
    let again = family.restore(machine, Some("again"), MemoryMode::Cow, &mut |_| ());
    let again = again.unwrap();
    let mut restored = Obedient::new(&vm, &again);
    restored.expect(3, 77, 8);
    restored.exit();
}

fn a_clone_gives_pages_back_and_reads_zeros(new: New) {
    let vm = new("job=obey pages=64").boot();
    vm.wait_ready(LONG).unwrap();
    let mut parent = Obedient::new(&vm, vm.member());
    parent.write(0, 500, 64);
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    let mut first = Obedient::new(&vm, clones[0].member());
    let mut second = Obedient::new(&vm, clones[1].member());
    first.say("d 8 16");
    let zeros = first.say("r 8 16");
    let due: Vec<String> = (8..24).map(|page| format!("= {page} 0")).collect();
    assert_eq!(zeros, due);
    first.expect(0, 500, 8);
    second.expect(0, 500, 64);
    parent.expect(0, 500, 64);
    for vm in [first, second, parent] {
        vm.exit();
    }
}

fn an_observer_may_refuse_each_phase_and_nothing_is_left(new: New) {
    use std::sync::Mutex;

    use forkvm::engine::Vetoed;

    let refuse: Arc<Mutex<Option<(Phase, u32)>>> = Arc::default();
    let hook = {
        let refuse = refuse.clone();
        move |phase, _: Option<&forkvm::vmm::PausedVm<'_>>| {
            let mut refuse = refuse.lock().unwrap();
            match &mut *refuse {
                Some((refused, 0)) if *refused == phase => Err(Vetoed("the test".into())),
                Some((refused, left)) if *refused == phase => {
                    *left -= 1;
                    Ok(())
                }
                _ => Ok(()),
            }
        }
    };
    let vm = new("job=oracle mib=1").hook(hook).boot();
    vm.wait_ready(LONG).unwrap();
    let mut forks = 0;
    let per_clone = [Phase::Memory, Phase::Spawn, Phase::Restore, Phase::Identity];
    for phase in Phase::ALL {
        // In the second clone, of those that each clone goes through.
        let before = u32::from(per_clone.contains(&phase));
        *refuse.lock().unwrap() = Some((phase, before));
        let error = vm.fork(CloneSpec::new(2)).err().expect("it is refused");
        let error = format!("{:?}", error);
        assert!(error.contains("the test"), "{phase}: {error}");
        *refuse.lock().unwrap() = None;
        assert_eq!(vm.family().running().len(), 1, "{phase}");
        expect_clones(&vm, &mut forks);
    }
    finish_oracle(&vm, vm.member());
}

/// A fork works, and the parent goes on.
fn expect_clones(vm: &Guest, forks: &mut u32) {
    let clones = vm.fork(CloneSpec::new(2)).unwrap();
    for clone in &clones {
        expect_end(vm, clone.member(), End::Exited(0));
    }
    *forks += 1;
    expect_oracle_ok(vm, vm.member(), *forks);
}

fn all_that_a_clone_printed_is_there_before_its_end_is_told(new: New) {
    let vm = new("job=obey pages=4").boot();
    vm.wait_ready(LONG).unwrap();
    for round in 0..10 {
        let clones = vm.fork(CloneSpec::new(2)).unwrap();
        let names: Vec<String> = clones.iter().map(|vm| vm.member().name().into()).collect();
        for clone in &clones {
            // Several answers, of which the last one comes just before the end.
            clone.member().console_input(b"r 0 4\nq 0\n").unwrap();
        }
        for (clone, name) in clones.iter().zip(names) {
            assert_eq!(clone.join().end, End::Exited(0));
            let text = vm.consoles.text();
            let own = format!("{name}: = 3 ");
            assert!(text.contains(&own), "round {round}: {text}");
        }
    }
}
