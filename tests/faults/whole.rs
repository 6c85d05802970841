//! A clone whose image has become whole while it ran: from then on it is the same as a clone of a cow
//! fork, which nobody watches.

use std::fs;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use forkvm::engine::{FaultFigures, Member};

use crate::common::switch::Manner;
use crate::common::{LONG, need_kvm};
use crate::family::{FIRST, LIVE, Origin, pages};

/// Where the RAM of a VM of this process is mapped.
fn addresses(member: &Member) -> Vec<Range<u64>> {
    let ranges = member.with_paused(|paused| {
        let ranges = paused.ram().host_ranges();
        let range = ranges.map(|(region, start)| start as u64..start as u64 + region.len);
        range.collect()
    });
    ranges.unwrap()
}

/// Whether a userfaultfd watches any of `ranges`: for missing pages (`um`), or for writes (`uw`).
fn is_watched(ranges: &[Range<u64>]) -> bool {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let mut of_ranges = false;
    let mut mappings = 0;
    let mut watched = false;
    for line in smaps.lines() {
        if let Some(mapping) = mapping(line) {
            of_ranges = ranges
                .iter()
                .any(|range| range.start < mapping.end && mapping.start < range.end);
            mappings += u32::from(of_ranges);
        } else if let Some(flags) = line.strip_prefix("VmFlags:") {
            let mut flags = flags.split_ascii_whitespace();
            watched |= of_ranges && flags.any(|flag| flag == "um" || flag == "uw");
        }
    }
    assert!(mappings > 0, "its memory is mapped");
    watched
}

/// The addresses of a mapping, which the first line of it begins with.
fn mapping(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_once(' ')?.0.split_once('-')?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < LONG, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// All that a fault, or a write of the parent, is counted by.
fn counted(figures: &FaultFigures) -> [u64; 6] {
    [
        figures.pages_by_fault,
        figures.pages_by_prefetch,
        figures.pages_by_background,
        figures.pages_by_parent_write,
        figures.zero_faults,
        figures.fetch_ns.len(),
    ]
}

#[test]
fn a_clone_whose_image_becomes_whole_is_watched_no_more_and_reads_and_writes_on() {
    need_kvm!();
    for freeze in LIVE {
        let origin = Origin::filled_here(freeze);
        origin.switch.set(origin.page(5), Manner::Stall);
        let ticket = origin.fork(origin.vm.member(), freeze, 2);
        let mut clones = [0, 1].map(|number| origin.clone_of(&ticket, number));
        let members = [&clones[0].member, &clones[1].member, origin.vm.member()];
        let memories = members.map(|member| addresses(member));
        origin.switch.wait_stalled();
        assert!(memories.iter().all(|memory| is_watched(memory)));

        origin.switch.set_all(Manner::Near);
        let image = ticket.point.image();
        wait_until("it becomes whole", || image.is_whole());
        wait_until("it is watched no more", || {
            !memories.iter().any(|memory| is_watched(memory))
        });
        let figures = || counted(&origin.vm.family().faults().figures());
        let before = figures();
        assert!(before[2] > 0, "the copier came by: {before:?}");
        for (clone, value) in clones.iter_mut().zip([1000, 2000]) {
            clone.expect(1, FIRST + 1, pages() - 1);
            clone.write(5, value, 10);
        }
        origin.parent().write(5, 3000, 10);
        for (clone, value) in clones.iter_mut().zip([1000, 2000]) {
            clone.expect(1, FIRST + 1, 4);
            clone.expect(5, value, 10);
            clone.expect(15, FIRST + 15, pages() - 15);
        }
        origin.parent().expect(5, 3000, 10);
        assert_eq!(figures(), before, "nobody has raised a fault");
    }
}
