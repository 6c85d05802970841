//! Rewinds that are refused: nothing has changed then.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use forkvm::abi::doorbell::report;
use forkvm::engine::{Consoles, MemberError, RewindError};
use forkvm::{CloneSpec, End, Identity, RewindWay};

use crate::common::{LONG, Obedient, Setup, expect_end, need_kvm};

#[test]
fn a_vm_that_is_no_clone_has_nothing_to_go_back_to() {
    need_kvm!();
    let vm = Setup::new("job=obey pages=8").boot();
    vm.wait_ready(LONG).unwrap();
    let refused = vm.member().rewind(RewindWay::Auto);
    let no_clone = matches!(refused, Err(MemberError::Rewind(RewindError::NoClone)));
    assert!(no_clone, "{refused:?}");
    Obedient::new(&vm, vm.member()).exit();
}

#[test]
fn a_clone_that_has_ended_says_how() {
    need_kvm!();
    let vm = Setup::new("job=touch mib=1 idle=1").boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    clone.kill();
    expect_end(&vm, clone.member(), End::Killed);
    let refused = clone.member().rewind(RewindWay::Auto);
    let ended = matches!(
        &refused,
        Err(MemberError::Ended {
            end: End::Killed,
            ..
        })
    );
    assert!(ended, "{refused:?}");
}

/// Consoles that can be had as long as `out` is false.
struct Scarce {
    out: Arc<AtomicBool>,
}

impl Consoles for Scarce {
    fn open(&self, _vm: &Identity) -> io::Result<Box<dyn Write + Send>> {
        if self.out.load(Ordering::Relaxed) {
            return Err(io::Error::other("no console is left"));
        }
        Ok(Box::new(io::sink()))
    }
}

#[test]
fn a_clone_for_which_no_other_vm_can_be_made_runs_on_as_it_was() {
    need_kvm!();
    let out = Arc::new(AtomicBool::new(false));
    let vm = Setup::new("job=touch mib=1 idle=1")
        .consoles(Scarce { out: out.clone() })
        .here()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let clone = vm.fork(CloneSpec::new(1)).unwrap().remove(0);
    let member = clone.member();
    member.wait_report(report::ACTION, 1, LONG).unwrap();
    let (identity, reports) = (clone.identity(), member.reports());
    out.store(true, Ordering::Relaxed);
    let refused = member.rewind(RewindWay::FreshShell);
    let spawn = matches!(refused, Err(MemberError::Rewind(RewindError::Spawn(_))));
    assert!(spawn, "{refused:?}");
    assert_eq!((clone.identity(), member.reports()), (identity, reports));
    // It is as it was in the host's eyes too, and can still go back.
    out.store(false, Ordering::Relaxed);
    member.rewind(RewindWay::FreshShell).unwrap();
    member.wait_report(report::ACTION, 1, LONG).unwrap();
}
