//! Forks in a row, as a service does them for days: nothing accumulates.

use forkvm::{CloneSpec, End};

use crate::alone;
use crate::census::{Census, expect_again, mapping_count, status_kib};
use crate::common::{LONG, Setup, expect_end, expect_oracle_ok, need_kvm, scaled};

/// Forks until the allocator, the stacks of threads and the parent's own pages are where they stay.
const WARM_UP: u32 = 20;

#[test]
fn a_thousand_forks_in_a_row_leak_nothing() {
    need_kvm!();
    let _turn = alone();
    let folder = tempfile::tempdir().unwrap();
    let vm = Setup::new("job=oracle mib=1")
        .memory_mib(32)
        .unlogged()
        .boot();
    vm.wait_ready(LONG).unwrap();
    let take = || Census::take(folder.path());
    let mut forks = 0;
    let mut fork = |times: u32| {
        for _ in 0..times {
            forks += 1;
            let clones = vm.fork(CloneSpec::new(1)).unwrap();
            expect_end(&vm, clones[0].member(), End::Exited(0));
            expect_oracle_ok(&vm, vm.member(), forks);
        }
    };
    fork(WARM_UP);
    let (census, mappings, rss) = (take(), mapping_count(), status_kib("VmRSS"));
    let times = scaled(1000, 20);
    fork(times);

    expect_again(&census, take, "after a thousand forks");
    let (more_mappings, more_rss) = (
        mapping_count().saturating_sub(mappings),
        status_kib("VmRSS").saturating_sub(rss),
    );
    println!("{times} forks: {more_mappings} mappings more, {more_rss} KiB resident more");
    assert!(more_mappings <= 8, "{more_mappings} more mappings");
    // The test itself keeps two lines of console and a report of each fork.
    assert!(more_rss <= 1024, "{more_rss} KiB more are resident");
}
