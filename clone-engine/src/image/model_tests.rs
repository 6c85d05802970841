//! Owner tables, plans and bitmaps against models that look at one page at a time.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::thread;

use forkvm_vmm::memory::{self, PAGE};
use proptest::prelude::*;

use super::page_bitmap::PageBitmap;
use super::{MemoryImage, Owner, OwnerTable, Plan};

/// Pages of the memory of an owner table.
const TABLE: u64 = 40;
/// Pages of the memory of a plan: some times the gap below which changes are one part.
const PLAN: u64 = 200;
/// The gap: changes with fewer pages between them are one part.
const GAP: u64 = 16;

fn image(pages: u64) -> Arc<MemoryImage> {
    let file = memory::memfd(c"test", pages * PAGE).unwrap();
    MemoryImage::whole(Arc::new(file), pages * PAGE)
}

fn bytes(pages: &Range<u64>) -> Range<u64> {
    pages.start * PAGE..pages.end * PAGE
}

/// Runs of set pages, rising and apart, as bytes.
fn runs(set: &[bool]) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in (0..set.len() as u64).filter(|&page| set[page as usize]) {
        match runs.last_mut() {
            Some(last) if last.end == page * PAGE => last.end += PAGE,
            _ => runs.push(page * PAGE..(page + 1) * PAGE),
        }
    }
    runs
}

/// A set of pages in which runs are as usual as single pages.
#[derive(Clone)]
struct Set(Vec<bool>);

impl fmt::Debug for Set {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letter = |page: &bool| if *page { 'x' } else { '.' };
        f.write_str(&self.0.iter().map(letter).collect::<String>())
    }
}

fn some_pages(len: u64) -> impl Strategy<Value = Set> {
    proptest::collection::vec((0..len, 1..len / 4), 0..8).prop_map(move |ranges| {
        let mut set = vec![false; len as usize];
        for (start, count) in ranges {
            let end = (start + count).min(len);
            set[start as usize..end as usize].fill(true);
        }
        Set(set)
    })
}

/// Who holds a page, in the model.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Held {
    Zero,
    Own,
    /// By the image with this number.
    By(usize),
}

/// What can become of a table.
#[derive(Clone, Debug)]
enum Step {
    Own(Set),
    Zero(Set),
    /// A fork: what was its own is a new image's.
    Of,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        some_pages(TABLE).prop_map(Step::Own),
        some_pages(TABLE).prop_map(Step::Zero),
        Just(Step::Of),
    ];
    proptest::collection::vec(step, 0..12)
}

fn held(owner: Owner<'_>, images: &[Arc<MemoryImage>]) -> Held {
    match owner {
        Owner::Zero => Held::Zero,
        Owner::Own => Held::Own,
        Owner::Base(base) => Held::By(
            images
                .iter()
                .position(|image| Arc::ptr_eq(image, base))
                .unwrap(),
        ),
    }
}

proptest! {
    /// Every look-up of a table, after any history, is that of a list with an owner for each page.
    #[test]
    fn an_owner_table_says_of_every_page_what_a_list_of_pages_says(
        first in some_pages(TABLE),
        steps in steps(),
        window in (0..TABLE, 1..TABLE),
    ) {
        let mut images = Vec::new();
        let mut model: Vec<Held> =
            first.0.iter().map(|&own| if own { Held::Own } else { Held::Zero }).collect();
        let mut table = OwnerTable::own(TABLE * PAGE, &runs(&first.0));
        for step in &steps {
            match step {
                Step::Own(set) | Step::Zero(set) => {
                    let own = matches!(step, Step::Own(_));
                    let (now, pages) = (if own { Held::Own } else { Held::Zero }, runs(&set.0));
                    table = if own { table.with_own(&pages) } else { table.with_zero(&pages) };
                    let hit = model.iter_mut().zip(&set.0).filter(|(_, set)| **set);
                    hit.for_each(|(page, _)| *page = now);
                }
                Step::Of => {
                    let new = image(TABLE);
                    table = table.of(&new);
                    let own = model.iter_mut().filter(|page| **page == Held::Own);
                    own.for_each(|page| *page = Held::By(images.len()));
                    images.push(new);
                }
            }
        }
        prop_assert_eq!(table.len(), TABLE * PAGE);
        for page in 0..TABLE {
            let (owner, run) = table.at(page * PAGE);
            let expected = model[page as usize];
            prop_assert_eq!(held(owner, &images), expected, "page {}", page);
            // The run is all of the pages around that have this owner, and no other.
            let differs = |other: &u64| model[*other as usize] != expected;
            let start = (0..page).rev().find(differs).map_or(0, |before| before + 1);
            let end = (page..TABLE).find(differs).unwrap_or(TABLE);
            prop_assert_eq!(run, bytes(&(start..end)), "the run of page {}", page);
        }
        let populated: Vec<bool> = model.iter().map(|page| *page != Held::Zero).collect();
        prop_assert_eq!(table.populated(), runs(&populated));

        let (start, count) = window;
        let window = start..(start + count).min(TABLE);
        let mut at = window.start * PAGE;
        for (owner, run) in table.within(bytes(&window)) {
            prop_assert_eq!(run.start, at, "no gap and no overlap within a range");
            prop_assert_eq!(held(owner, &images), model[(run.start / PAGE) as usize]);
            at = run.end;
        }
        prop_assert_eq!(at, window.end * PAGE);

        // At the next fork.
        for base in table.of(&image(TABLE)).bases() {
            let holds = |page: &Held| match page {
                Held::Zero => false,
                Held::Own => images.iter().all(|image| !Arc::ptr_eq(image, base)),
                Held::By(by) => Arc::ptr_eq(&images[*by], base),
            };
            prop_assert!(model.iter().any(holds), "an image that holds nothing is forgotten");
        }
    }

    /// Whatever changed, each page is mapped from the image that holds it.
    #[test]
    fn a_plan_maps_what_changed_from_the_new_image_and_all_else_from_where_it_was(
        written in some_pages(PLAN),
        given_back in some_pages(PLAN),
        borders in proptest::collection::vec(1..PLAN, 0..3),
    ) {
        let new = image(PLAN);
        let mut borders = borders;
        borders.extend([0, PLAN]);
        borders.sort_unstable();
        borders.dedup();
        let below: Vec<(Range<u64>, Arc<MemoryImage>)> =
            borders.windows(2).map(|pair| (bytes(&(pair[0]..pair[1])), image(PLAN))).collect();
        // As a fork gives them: pages that were given back may have been written again since.
        let mut changed = runs(&written.0);
        changed.extend(runs(&given_back.0));
        changed.sort_unstable_by_key(|range| range.start);
        let plan = Plan::over(&below, &changed, PLAN * PAGE, 1);

        let both = written.0.iter().zip(&given_back.0).map(|(written, given)| *written || *given);
        let has_changed: Vec<bool> = both.collect();
        let mut from_new = has_changed.clone();
        let mut last_changed = None;
        for page in (0..PLAN).filter(|page| has_changed[*page as usize]) {
            if let Some(last) = last_changed.replace(page)
                && page - last - 1 < GAP
            {
                from_new[last as usize..page as usize].fill(true);
            }
        }
        let of_page = |page: u64| {
            let part = below.iter().find(|(range, _)| range.contains(&(page * PAGE)));
            if from_new[page as usize] { &new } else { &part.unwrap().1 }
        };
        for page in 0..PLAN {
            prop_assert!(Arc::ptr_eq(&plan.at(page * PAGE, &new), of_page(page)), "page {}", page);
        }
        let mut at = 0;
        for (range, image) in plan.mapped(&new) {
            prop_assert_eq!(range.start, at, "parts follow one another");
            prop_assert!(range.end > range.start);
            for page in range.start / PAGE..range.end / PAGE {
                prop_assert!(Arc::ptr_eq(&image, of_page(page)), "page {}", page);
            }
            at = range.end;
        }
        prop_assert_eq!(at, PLAN * PAGE, "all memory is mapped");
        let own: u64 = plan.own_parts().map(|part| (part.end - part.start) / PAGE).sum();
        prop_assert_eq!(own, from_new.iter().filter(|new| **new).count() as u64);
        for page in 0..PLAN {
            let rest = runs(&from_new);
            let next = rest.iter().find(|run| run.end > page * PAGE);
            let expected = next.map(|run| run.start.max(page * PAGE)..run.end);
            let found = plan.own_within(page * PAGE..PLAN * PAGE).next();
            // A part ends where an image below does, also within one change.
            prop_assert_eq!(
                found.as_ref().map(|part| part.start),
                expected.as_ref().map(|part| part.start)
            );
            prop_assert!(found.is_none_or(|part| part.end <= expected.unwrap().end));
        }
    }

    /// What is missing is what nobody set.
    #[test]
    fn a_bitmap_misses_exactly_the_pages_that_were_not_set(
        sets in proptest::collection::vec((0u64..300, 1u64..80), 0..10),
        window in (0u64..300, 0u64..300),
    ) {
        const LEN: u64 = 300;
        let bitmap = PageBitmap::new(LEN * PAGE);
        let mut model = vec![false; LEN as usize];
        for (start, count) in sets {
            let range = start..(start + count).min(LEN);
            bitmap.set(&bytes(&range));
            model[range.start as usize..range.end as usize].fill(true);
        }
        let (from, to) = (window.0.min(window.1), window.0.max(window.1));
        let missing: Vec<bool> = (0..LEN)
            .map(|page| (from..to).contains(&page) && !model[page as usize])
            .collect();
        let found: Vec<Range<u64>> = bitmap.missing(bytes(&(from..to))).collect();
        prop_assert_eq!(found, runs(&missing));
        for page in 0..LEN {
            prop_assert_eq!(bitmap.has(page * PAGE), model[page as usize]);
        }
    }
}

#[test]
fn pages_that_threads_set_at_the_same_time_are_all_set() {
    let bitmap = PageBitmap::new(64 * PAGE);
    thread::scope(|scope| {
        for thread in 0..8 {
            let bitmap = &bitmap;
            scope.spawn(move || {
                for page in (thread..64).step_by(8) {
                    bitmap.set(&bytes(&(page..page + 1)));
                }
            });
        }
    });
    assert_eq!(bitmap.missing(0..64 * PAGE).next(), None);
}
