//! Forks of running machines, from the host and from inside.

use std::io::Write;
use std::time::Duration;

use forkvm::agent::protocol::{Exec, Exit};
use forkvm::linux::LinuxVm;
use forkvm::{CloneSpec, End, FreezeKind, MemoryMode};

use super::common::{LONG, fork_by, need_kvm};
use super::machine::{Machine, run, sh};

/// A program of the guest that counts the seconds in a file, and never ends. It waits for the fifo's writer, whom
/// there never is: a program started each second would keep a guest busy whose ring 0 is interpreted.
const COUNTER: &str = "mkfifo /tmp/never; (i=0; while :; do i=$((i+1)); echo $i > /tmp/count; \
                       read -t 1 x <> /tmp/never; done) > /dev/null 2>&1 &";

/// What is in the file, once it is more than `before`. For moments it is empty.
fn count_beyond(vm: &LinuxVm, before: u64) -> u64 {
    let script = format!(
        "while read -r i < /tmp/count; [ \"${{i:-0}}\" -le {before} ]; do read -t 1 x <> /tmp/never; done; echo $i"
    );
    sh(vm, &script).parse().unwrap()
}

fn a_program_with_a_timer_goes_on_in_parent_and_clones(vcpus: u32, spec: CloneSpec) {
    need_kvm!();
    let machine = Machine::restore(vcpus);
    sh(&machine, COUNTER);
    let before = count_beyond(&machine, 1);
    let clones = machine.fork(spec);
    for clone in &clones {
        let then = count_beyond(clone, before);
        count_beyond(clone, then);
    }
    count_beyond(&machine, before);
    for clone in &clones {
        assert_eq!(sh(clone, "mkdir /tmp/mine && ls /tmp | grep -c mine"), "1");
        clone.kill();
        assert_eq!(clone.join().end, End::Killed);
    }
}

#[test]
fn a_program_with_a_timer_goes_on_in_parent_and_cow_clones() {
    a_program_with_a_timer_goes_on_in_parent_and_clones(1, CloneSpec::new(2));
}

#[test]
fn a_program_with_a_timer_goes_on_in_parent_and_lazy_clones() {
    let spec = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 2);
    a_program_with_a_timer_goes_on_in_parent_and_clones(1, spec);
}

#[test]
fn a_program_with_a_timer_goes_on_in_parent_and_cow_clones_on_two_vcpus() {
    a_program_with_a_timer_goes_on_in_parent_and_clones(2, CloneSpec::new(2));
}

#[test]
fn a_program_with_a_timer_goes_on_in_parent_and_lazy_clones_on_two_vcpus() {
    let spec = fork_by(FreezeKind::WriteProtect, MemoryMode::Lazy, 2);
    a_program_with_a_timer_goes_on_in_parent_and_clones(2, spec);
}

#[test]
fn hooks_run_at_each_fork_in_parent_and_clone() {
    need_kvm!();
    let machine = Machine::restore(1);
    let hook = "mkdir -p /etc/forkvm/fork.d; cd /etc/forkvm/fork.d; \
                { echo '#!/bin/sh'; echo 'echo $1 $FORKVM_CLONE_ID >> /tmp/hooked'; } > say; chmod +x say";
    sh(&machine, hook);
    let clone = machine.fork(CloneSpec::new(1)).remove(0);
    assert_eq!(sh(&machine, "cat /tmp/hooked"), "parent 0");
    assert_eq!(sh(&clone, "cat /tmp/hooked"), "clone 1");
    let of_clone = clone.fork(CloneSpec::new(1)).unwrap().remove(0);
    assert_eq!(sh(&clone, "cat /tmp/hooked"), "clone 1\nparent 0");
    assert_eq!(sh(&of_clone, "cat /tmp/hooked"), "clone 1\nclone 1");
}

#[test]
fn a_clone_of_a_clone_has_the_files_of_both() {
    need_kvm!();
    let machine = Machine::restore(1);
    sh(&machine, "echo first > /tmp/1");
    let clone = machine.fork(CloneSpec::new(1)).remove(0);
    sh(&clone, "echo second > /tmp/2");
    let of_clone = clone.fork(CloneSpec::new(1)).unwrap().remove(0);
    assert_eq!(
        sh(&of_clone, "cat /tmp/1 /tmp/2; hostname"),
        "first\nsecond\nlinux-1-1"
    );
}

#[test]
fn a_session_goes_on_in_the_parent_and_is_none_of_the_clones() {
    need_kvm!();
    let machine = Machine::restore(1);
    let exec = Exec {
        argv: vec!["cat".into()],
        ..Exec::default()
    };
    let running = machine.agent().exec(&exec).unwrap();
    let (input, mut feed) = std::io::pipe().unwrap();
    feed.write_all(b"before\n").unwrap();
    let clones = machine.fork(CloneSpec::new(1));
    // The clone's `cat` goes on without a client, and nobody hung up on it: its input is over, so it ends.
    let gone = "while ps | grep -v grep | grep -q ' cat$'; do :; done";
    sh(&clones[0], gone);
    feed.write_all(b"after\n").unwrap();
    drop(feed);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let exit = running
        .pump(Some(Box::new(input)), &mut out, &mut err)
        .unwrap();
    assert_eq!((exit, &*out), (Exit::Code(0), &b"before\nafter\n"[..]));
}

#[test]
fn a_program_forks_its_machine_and_waits_for_the_clones() {
    need_kvm!();
    let machine = Machine::restore(1);
    let argv = [
        "forkvm-guest",
        "fork",
        "-n",
        "2",
        "--wait",
        "--",
        "sh",
        "-c",
        "exit $FORKVM_CLONE_ID",
    ];
    // Nobody but whoever started the family can tell clones who they are.
    let family = machine.family().clone();
    let parent = machine.member().clone();
    let introduces = std::thread::spawn(move || {
        let mut met = 0;
        while met < 2 {
            for member in family.running() {
                if member.identity().depth == 1 && member.identity().name != parent.name() {
                    let name = member.identity().name.clone();
                    let clone = LinuxVm::meet(family.clone(), member, LONG);
                    clone
                        .unwrap_or_else(|error| panic!("{name}: {error}"))
                        .join();
                    met += 1;
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    let said = run(&machine, &argv, b"");
    assert_eq!(said.exit, Exit::Code(2), "{said:?}");
    introduces.join().unwrap();
}
