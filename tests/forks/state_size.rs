//! What a clone needs besides its memory is little.

use forkvm::CloneSpec;

use crate::common::{LONG, Setup, need_kvm};

#[test]
fn the_state_of_one_vcpu_is_at_most_16_kib() {
    need_kvm!();
    let vm = Setup::new("job=touch mib=1").memory_mib(512).boot();
    vm.wait_ready(LONG).unwrap();
    let point = vm.fork_point(CloneSpec::new(1)).unwrap();
    let bytes = point.state_bytes();
    println!("state of 1 vCPU: {bytes} bytes");
    let sections = point
        .state()
        .iter()
        .map(|section| (&section.kind, section.body.len()));
    assert!(
        bytes <= 16 << 10,
        "{bytes} bytes: {:?}",
        sections.collect::<Vec<_>>()
    );
}
