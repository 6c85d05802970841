//! Clones of clones of clones: each generation sees what all before it wrote, whoever of them lives.

use std::sync::Arc;

use forkvm::engine::Member;
use forkvm::{End, FreezeKind, MemoryMode};

use crate::common::{
    Guest, LONG, Setup, expect_end, expect_oracle_ok, finish_oracle, fork_by, need_kvm, scaled,
};

const DEPTH: u32 = 10;

/// The generation that ends right after its fork.
const MIDDLE: u32 = 5;

/// A chain of forks of hot writers. `first` is how the booted VM is forked, which maps its memory
/// shared; all others are clones.
fn chain(mode: MemoryMode, first: FreezeKind) {
    need_kvm!();
    let job = format!("job=oracle mib={} writers=1 go-on=1", scaled(2, 1));
    let vm = Setup::new(job).no_copier().boot();
    vm.wait_ready(LONG).unwrap();
    let mut line = vec![vm.member().clone()];
    for generation in 1..=DEPTH {
        let youngest = line.last().unwrap().clone();
        let freeze = if generation == 1 {
            first
        } else {
            FreezeKind::Delta
        };
        let point = youngest.fork_point(fork_by(freeze, mode, 1)).unwrap();
        assert_eq!(point.depth(), generation);
        if generation == MIDDLE {
            // Its clones have not run yet: what they will miss goes with it.
            assert_eq!(point.image().is_whole(), mode == MemoryMode::Cow);
            kill(&vm, &youngest);
            line.pop();
        }
        let clone = point.spawn(1).unwrap().remove(0);
        assert_eq!(clone.identity().depth, generation);
        expect_oracle_ok(&vm, &clone, generation);
        if generation != MIDDLE {
            expect_oracle_ok(&vm, &youngest, generation);
        }
        line.push(clone);
    }
    line.iter().for_each(|member| finish_oracle(&vm, member));
}

fn kill(vm: &Guest, member: &Arc<Member>) {
    member.kill();
    expect_end(vm, member, End::Killed);
}

#[test]
fn ten_lazy_generations_see_what_all_before_them_wrote_and_the_fifth_may_end_at_once() {
    chain(MemoryMode::Lazy, FreezeKind::WriteProtect);
}

#[test]
fn ten_copy_on_write_generations_see_what_all_before_them_wrote_and_the_fifth_may_end_at_once() {
    chain(MemoryMode::Cow, FreezeKind::Remap);
}
