//! More clones than the host has room for: asked n, told m. Nothing is lost by having asked.

use std::env;
use std::process::Command;

use forkvm::abi::doorbell::report;
use forkvm::abi::errno;
use forkvm::engine::limits::{Limit, LimitError, available_kib};
use forkvm::engine::{ForkError, MemberError};
use forkvm::{CloneSpec, End, Error};

use crate::common::{LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, need_kvm};

/// Exit status of a guest whose fork was refused (guest-images/bare/README.md).
const REFUSED: u32 = 3;

/// As much as leaves room for 2 to 3 clones on this host.
fn a_third_of_memory() -> u64 {
    available_kib().unwrap() / 1024 / 3 - 100
}

#[test]
fn a_host_that_asks_for_too_many_is_told_how_many_would_do() {
    need_kvm!();
    let vm = Setup::new("job=oracle mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    let spec = CloneSpec {
        expected_write_mib: a_third_of_memory(),
        ..CloneSpec::new(1000)
    };
    let error = vm.fork(spec).err().unwrap();
    let Error::Member(MemberError::Fork(fork_error)) = &error else {
        panic!("{error:?}")
    };
    let ForkError::Limits(LimitError::TooMany {
        asked: 1000,
        room,
        limit: Limit::Memory,
    }) = *fork_error
    else {
        panic!("{fork_error:?}");
    };
    assert!((1..=4).contains(&room), "{room}");
    let text = fork_error.to_string();
    assert!(
        text.contains("1000 clones") && text.contains(&format!("room for {room}")),
        "{text}"
    );

    let clones = vm.fork(CloneSpec::new(1)).unwrap();
    expect_end(&vm, clones[0].member(), End::Exited(0));
    expect_oracle_ok(&vm, vm.member(), 1);
    finish_oracle(&vm, vm.member());
}

#[test]
fn zero_clones_are_refused_by_name() {
    need_kvm!();
    let vm = Setup::new("job=spin").boot();
    vm.wait_ready(LONG).unwrap();
    let error = vm.fork(CloneSpec::new(0)).err().unwrap();
    assert!(
        matches!(
            error,
            Error::Member(MemberError::Fork(ForkError::Limits(LimitError::NoClones)))
        ),
        "{error:?}"
    );
}

#[test]
fn a_guest_that_asks_for_too_many_is_granted_fewer_and_all_of_them_know() {
    need_kvm!();
    let forks = CloneSpec {
        expected_write_mib: a_third_of_memory(),
        ..CloneSpec::default()
    };
    let vm = Setup::new("job=fork n=1000").guest_forks(forks).boot();
    let granted = vm.join();
    let clones = vm.log.clones();
    let text = vm.consoles.text();
    let m = clones.len() as u32;
    assert!((1..=4).contains(&m), "{m} clones\n{text}");
    assert_eq!(granted.end, End::Exited(m), "{text}");
    assert!(text.contains(&format!("vm: parent of {m}\n")), "{text}");
    for (id, clone) in (1..).zip(&clones) {
        expect_end(&vm, clone, End::Exited(id));
        let line = format!("{}: clone {id} of {m}\n", clone.name());
        assert!(vm.consoles.text().contains(&line), "{text}");
    }
}

#[test]
fn a_guest_for_whose_fork_there_is_no_memory_gets_enomem_and_runs_on() {
    need_kvm!();
    let forks = CloneSpec {
        expected_write_mib: 1 << 30,
        ..CloneSpec::default()
    };
    let vm = Setup::new("job=fork n=1 mib=2 tries=3")
        .guest_forks(forks)
        .boot();
    // It has verified its memory when it reports a refusal, and then asks again.
    let refusal = report::USER + errno::ENOMEM as u32;
    vm.member().wait_report(refusal, 2, LONG).unwrap();
    expect_end(&vm, vm.member(), End::Exited(REFUSED));
    let text = vm.consoles.text();
    assert!(
        text.contains(&format!("fork failed with error -{}", errno::ENOMEM)),
        "{text}"
    );
    assert!(vm.log.clones().is_empty());
}

/// Set for the part of a test that runs in a process with few descriptors.
const FEW_DESCRIPTORS: &str = "FORKVM_TEST_FEW_DESCRIPTORS";

#[test]
fn few_file_descriptors_bound_the_clones_and_are_named() {
    need_kvm!();
    let this = env::current_exe().unwrap();
    let mut child = Command::new("sh");
    // Soft and hard limit: the soft one alone is raised.
    child
        .args(["-c", "ulimit -n 80 && exec \"$0\" \"$@\""])
        .arg(this);
    child.args([
        "--exact",
        "limits::in_a_process_with_few_descriptors",
        "--ignored",
    ]);
    child.arg("--nocapture").env(FEW_DESCRIPTORS, "1");
    let output = child.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.contains("1 passed"), "{text}");
}

#[test]
#[ignore = "few_file_descriptors_bound_the_clones_and_are_named runs it in a process of its own"]
fn in_a_process_with_few_descriptors() {
    if env::var_os(FEW_DESCRIPTORS).is_none() {
        println!("skipped: only a part of another test");
        return;
    }
    let vm = Setup::new("job=fork n=200").boot();
    let end = vm.join().end;
    let m = vm.log.clones().len() as u32;
    assert_eq!(end, End::Exited(m), "{}", vm.consoles.text());
    assert!((1..40).contains(&m), "{m} clones with 80 descriptors");
    vm.log.clones().iter().for_each(|clone| drop(clone.wait()));

    let vm = Setup::new("job=oracle mib=1").boot();
    vm.wait_ready(LONG).unwrap();
    let error = vm.fork(CloneSpec::new(200)).err().unwrap();
    let Error::Member(MemberError::Fork(error)) = error else {
        panic!("{error:?}")
    };
    let ForkError::Limits(LimitError::TooMany {
        asked: 200,
        room: 1..,
        limit,
    }) = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(limit, Limit::Descriptors);
    assert!(error.to_string().contains("ulimit"), "{error}");
}
