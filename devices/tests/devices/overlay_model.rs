//! A stack of overlays against the simplest thing that could be right: a vector of sectors.

use std::sync::Arc;

use forkvm_devices::block::{BlockLayer, Frozen, Overlay, SECTOR};
use proptest::prelude::*;
use tempfile::TempDir;

use crate::block_layers::{LEN, numbered_base, read};

const SECTORS: u64 = LEN / SECTOR;

#[derive(Clone, Debug)]
enum Step {
    Write {
        first: u64,
        count: u64,
        value: u8,
    },
    Discard {
        first: u64,
        count: u64,
    },
    Read {
        first: u64,
        count: u64,
    },
    /// Freeze what is there, and go on in a new overlay on top of it.
    Fork {
        in_file: bool,
    },
    /// Flush and open again from its files, if it has any.
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let extent = || (0..SECTORS).prop_flat_map(|first| (Just(first), 1..=SECTORS - first));
    prop_oneof![
        6 => (extent(), any::<u8>())
            .prop_map(|((first, count), value)| Step::Write { first, count: count.min(9), value }),
        2 => extent().prop_map(|(first, count)| Step::Discard { first, count: count.min(9) }),
        4 => extent().prop_map(|(first, count)| Step::Read { first, count }),
        1 => any::<bool>().prop_map(|in_file| Step::Fork { in_file }),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_stack_of_overlays_is_a_disk(
        steps in prop::collection::vec(step(), 1..40),
        in_file in any::<bool>(),
    ) {
        let directory = TempDir::new().unwrap();
        let path = |depth: usize| directory.path().join(format!("overlay{depth}"));
        let make = |depth, base, in_file| {
            if in_file { Overlay::create(path(depth), base).unwrap() } else { Overlay::in_memory(base) }
        };
        let mut below = numbered_base(directory.path());
        let mut model = read(&*below, 0, LEN);
        let mut frozen_models: Vec<(Arc<dyn BlockLayer>, Vec<u8>)> = Vec::new();
        let mut depth = 0;
        let mut top = make(depth, below.clone(), in_file);
        for step in steps {
            match step {
                Step::Write { first, count, value } => {
                    let data = vec![value; (count * SECTOR) as usize];
                    top.write_at(first * SECTOR, &data).unwrap();
                    model[(first * SECTOR) as usize..][..data.len()].copy_from_slice(&data);
                }
                Step::Discard { first, count } => {
                    let range = first * SECTOR..(first + count) * SECTOR;
                    top.discard(range.clone()).unwrap();
                    model[range.start as usize..range.end as usize].fill(0);
                }
                Step::Read { first, count } => {
                    let (offset, len) = (first * SECTOR, count * SECTOR);
                    let expected = &model[offset as usize..][..len as usize];
                    prop_assert_eq!(&read(&top, offset, len)[..], expected);
                }
                Step::Fork { in_file } => {
                    below = Arc::new(Frozen::new(Arc::new(top)));
                    frozen_models.push((below.clone(), model.clone()));
                    depth += 1;
                    top = make(depth, below.clone(), in_file);
                }
                Step::Reopen => {
                    if let Some(path) = top.path().map(std::path::Path::to_owned) {
                        top.flush().unwrap();
                        drop(top);
                        top = Overlay::open(path, below.clone()).unwrap();
                    }
                }
            }
        }
        prop_assert_eq!(read(&top, 0, LEN), model);
        for (layer, model) in frozen_models {
            prop_assert_eq!(read(&*layer, 0, LEN), model, "a frozen layer never changes");
        }
    }
}
