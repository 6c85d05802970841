//! What tests ask of VMs that run the job `oracle`, and of how VMs end.

use forkvm::End;
use forkvm::abi::doorbell::report;
use forkvm::engine::Member;

use super::{Guest, LONG};

/// `member`, of the family of `vm`, ends in time and as `expected`.
pub fn expect_end(vm: &Guest, member: &Member, expected: End) {
    let finished = member.wait_for(LONG);
    let Some(finished) = finished else {
        panic!("{} does not end\n{}", member.name(), vm.consoles.text());
    };
    assert_eq!(
        finished.end,
        expected,
        "{}\n{}",
        member.name(),
        vm.consoles.text()
    );
}

/// `member` has verified all it knows since it was forked for the `forks`th time from the boot on.
pub fn expect_oracle_ok(vm: &Guest, member: &Member, forks: u32) {
    // Each value comes again after so many forks, to the parent of them all.
    let (value, before) = (forks % report::DISTINCT, (forks - 1) / report::DISTINCT);
    let times = 1 + before as usize;
    assert!(
        times == 1 || member.identity().depth == 0,
        "a clone counts anew"
    );
    if let Err(error) = member.wait_report(report::USER + value, times, LONG) {
        panic!(
            "{} after {forks} forks: {error}\n{}",
            member.name(),
            vm.consoles.text()
        );
    }
}

/// Ends an oracle that goes on. It has found nothing wrong in all its life.
pub fn finish_oracle(vm: &Guest, member: &Member) {
    match member.console_input(b"q") {
        Ok(taken) => assert_eq!(taken, 1, "{} takes input", member.name()),
        Err(error) => panic!("{error}\n{}", vm.consoles.text()),
    }
    expect_end(vm, member, End::Exited(0));
}
