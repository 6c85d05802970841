//! Which image of a line holds a page.
//!
//! A table covers a whole memory and says of every page: zero, in this image, or in that earlier
//! one. It is copied at a fork, with the earlier images by name, so one look-up finds the holder of
//! a page at any depth. Adjacent pages of one owner are one run, and a look-up returns the run, for
//! whoever wants to serve more than a page.

use std::ops::Range;
use std::sync::Arc;

use super::MemoryImage;

/// Who holds a page.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Owner<'a> {
    /// Nobody: it reads as zero.
    Zero,
    /// The image that the table belongs to.
    Own,
    /// An earlier image, in its own pages.
    Base(&'a Arc<MemoryImage>),
}

/// See the module's text. Offsets are file offsets of RAM in bytes.
#[derive(Clone, Debug)]
pub(crate) struct OwnerTable {
    len: u64,
    /// By rising start; the first starts at 0, each ends where the next one starts.
    runs: Vec<Run>,
    /// What [`Holder::Base`] counts in.
    bases: Vec<Arc<MemoryImage>>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    start: u64,
    holder: Holder,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Holder {
    Zero,
    Own,
    Base(u16),
}

impl OwnerTable {
    /// Of `len` bytes of which `data` is the table's own and the rest zero. `data` rises and is
    /// apart.
    pub(crate) fn own(len: u64, data: &[Range<u64>]) -> OwnerTable {
        let zero = OwnerTable {
            len,
            runs: vec![Run {
                start: 0,
                holder: Holder::Zero,
            }],
            bases: Vec::new(),
        };
        zero.with(data, Holder::Own)
    }

    /// Of `len` bytes: who holds what from each of `runs` on. They begin at 0 and rise; holder 0 is the
    /// table's own image, n that of `bases` with the number n - 1, of which there are less than 65,536.
    pub(super) fn of_runs(
        len: u64,
        runs: impl Iterator<Item = (u64, Option<usize>)>,
        bases: Vec<Arc<MemoryImage>>,
    ) -> OwnerTable {
        let run = |(start, holder)| Run {
            start,
            holder: match holder {
                None => Holder::Zero,
                Some(0) => Holder::Own,
                Some(base) => Holder::Base((base - 1) as u16),
            },
        };
        OwnerTable {
            len,
            runs: runs.map(run).collect(),
            bases,
        }
    }

    /// This table as it looks from outside: what is its own is held by `image`, whose table it is.
    pub(crate) fn of(&self, image: &Arc<MemoryImage>) -> OwnerTable {
        let mut bases = Vec::new();
        let mut renamed = vec![None; self.bases.len() + 1];
        let mut name = |held_by: usize, image: &Arc<MemoryImage>| -> Holder {
            let index = *renamed[held_by].get_or_insert_with(|| {
                bases.push(image.clone());
                (bases.len() - 1) as u16
            });
            Holder::Base(index)
        };
        let holder = |run: &Run| match run.holder {
            Holder::Zero => Holder::Zero,
            Holder::Own => name(self.bases.len(), image),
            // Only those that still hold something: the others may go.
            Holder::Base(base) => name(usize::from(base), &self.bases[usize::from(base)]),
        };
        let holders: Vec<Holder> = self.runs.iter().map(holder).collect();
        let runs = self.runs.iter().zip(holders);
        let runs = runs.map(|(run, holder)| Run {
            start: run.start,
            holder,
        });
        OwnerTable {
            len: self.len,
            runs: runs.collect(),
            bases,
        }
    }

    /// This table with `pages` held by its own image. They rise and are apart.
    pub(crate) fn with_own(&self, pages: &[Range<u64>]) -> OwnerTable {
        self.with(pages, Holder::Own)
    }

    /// This table with `pages` zero. They rise and are apart.
    pub(crate) fn with_zero(&self, pages: &[Range<u64>]) -> OwnerTable {
        self.with(pages, Holder::Zero)
    }

    fn with(&self, pages: &[Range<u64>], holder: Holder) -> OwnerTable {
        let mut runs: Vec<Run> = Vec::with_capacity(self.runs.len() + 2 * pages.len());
        let mut push = |start: u64, holder: Holder| match runs.last_mut() {
            Some(last) if last.start == start => last.holder = holder,
            Some(last) if last.holder == holder => {}
            _ => runs.push(Run { start, holder }),
        };
        let mut below = self.runs.iter().peekable();
        let mut under = Holder::Zero;
        for range in pages {
            while let Some(run) = below.next_if(|run| run.start < range.start) {
                under = run.holder;
                push(run.start, under);
            }
            push(range.start, holder);
            while let Some(run) = below.next_if(|run| run.start <= range.end) {
                under = run.holder;
            }
            if range.end < self.len {
                push(range.end, under);
            }
        }
        for run in below {
            push(run.start, run.holder);
        }
        // A run that was renamed to its predecessor's holder is part of it.
        runs.dedup_by(|next, last| next.holder == last.holder);
        OwnerTable {
            len: self.len,
            runs,
            bases: self.bases.clone(),
        }
    }

    /// Who holds the page at `offset`, and the run of it.
    pub(crate) fn at(&self, offset: u64) -> (Owner<'_>, Range<u64>) {
        debug_assert!(offset < self.len);
        let index = self.runs.partition_point(|run| run.start <= offset) - 1;
        self.run(index)
    }

    /// All runs that meet `range`, cut to it.
    pub(crate) fn within(
        &self,
        range: Range<u64>,
    ) -> impl Iterator<Item = (Owner<'_>, Range<u64>)> {
        let first = self.runs.partition_point(|run| run.start <= range.start);
        (first.saturating_sub(1)..self.runs.len())
            .map(|index| self.run(index))
            .take_while({
                let end = range.end;
                move |(_, run)| run.start < end
            })
            .map(move |(owner, run)| (owner, run.start.max(range.start)..run.end.min(range.end)))
    }

    fn run(&self, index: usize) -> (Owner<'_>, Range<u64>) {
        let run = &self.runs[index];
        let end = self.runs.get(index + 1).map_or(self.len, |next| next.start);
        let owner = match run.holder {
            Holder::Zero => Owner::Zero,
            Holder::Own => Owner::Own,
            Holder::Base(base) => Owner::Base(&self.bases[usize::from(base)]),
        };
        (owner, run.start..end)
    }

    /// Bytes of memory.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The images of its line that hold something in it.
    #[cfg(test)]
    pub(crate) fn bases(&self) -> &[Arc<MemoryImage>] {
        &self.bases
    }

    /// What somebody holds, as ranges that rise and are apart.
    pub(crate) fn populated(&self) -> Vec<Range<u64>> {
        let mut populated: Vec<Range<u64>> = Vec::new();
        for (owner, run) in self.within(0..self.len) {
            match populated.last_mut() {
                _ if matches!(owner, Owner::Zero) => {}
                Some(last) if last.end == run.start => last.end = run.end,
                _ => populated.push(run),
            }
        }
        populated
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 4096;
    const LEN: u64 = 64 * PAGE;

    fn pages(ranges: &[(u64, u64)]) -> Vec<Range<u64>> {
        ranges
            .iter()
            .map(|(from, to)| from * PAGE..to * PAGE)
            .collect()
    }

    /// One letter a page: zero, own, or the base by its number.
    fn spell(table: &OwnerTable) -> String {
        let letter = |page: u64| match table.at(page * PAGE).0 {
            Owner::Zero => '.',
            Owner::Own => 'o',
            Owner::Base(image) => {
                let at = table
                    .bases()
                    .iter()
                    .position(|base| Arc::ptr_eq(base, image));
                char::from_digit(at.unwrap() as u32, 10).unwrap()
            }
        };
        (0..12).map(letter).collect()
    }

    fn image() -> Arc<MemoryImage> {
        MemoryImage::whole(
            Arc::new(forkvm_vmm::memory::memfd(c"test", LEN).unwrap()),
            LEN,
        )
    }

    #[test]
    fn what_is_not_its_own_is_zero() {
        let table = OwnerTable::own(LEN, &pages(&[(0, 1), (3, 5)]));
        assert_eq!(spell(&table), "o..oo.......");
        assert_eq!(table.populated(), pages(&[(0, 1), (3, 5)]));
    }

    #[test]
    fn a_look_up_returns_the_whole_run() {
        let table = OwnerTable::own(LEN, &pages(&[(3, 5)]));
        assert_eq!(table.at(4 * PAGE).1, 3 * PAGE..5 * PAGE);
        assert_eq!(table.at(0).1, 0..3 * PAGE);
        assert_eq!(table.at(63 * PAGE).1, 5 * PAGE..LEN);
    }

    #[test]
    fn a_page_is_found_at_any_depth_in_the_image_that_holds_it() {
        let (first, second) = (image(), image());
        let table = OwnerTable::own(LEN, &pages(&[(0, 4)])).of(&first);
        let table = table.with_own(&pages(&[(1, 2), (5, 6)])).of(&second);
        assert_eq!(spell(&table), "0100.1......");
        assert!(Arc::ptr_eq(&table.bases()[1], &second));
        assert_eq!(
            spell(&table.with_own(&pages(&[(2, 3)]))),
            "01o0.1......",
            "its own pages hide those of its line"
        );
    }

    #[test]
    fn an_image_whose_pages_were_all_replaced_is_forgotten() {
        let (first, second) = (image(), image());
        let table = OwnerTable::own(LEN, &pages(&[(0, 4)])).of(&first);
        let later = table.with_own(&pages(&[(0, 4)])).of(&second);
        drop(table);
        assert_eq!(later.bases().len(), 1);
        assert_eq!(Arc::strong_count(&first), 1);
    }

    #[test]
    fn pages_given_back_are_zero_whoever_held_them() {
        let table = OwnerTable::own(LEN, &pages(&[(0, 4)])).of(&image());
        assert_eq!(spell(&table.with_zero(&pages(&[(1, 3)]))), "0..0........");
    }

    #[test]
    fn runs_that_meet_are_one() {
        let table = OwnerTable::own(LEN, &pages(&[(0, 2)]));
        let table = table.with_own(&pages(&[(2, 3), (6, 7)]));
        assert_eq!(table.at(0).1, 0..3 * PAGE);
        assert_eq!(table.with_own(&pages(&[(3, 6)])).at(0).1, 0..7 * PAGE);
        let all: Vec<Range<u64>> = pages(&[(0, 64)]);
        assert_eq!(table.with_own(&all).at(0).1, 0..LEN);
    }

    #[test]
    fn runs_within_a_range_are_cut_to_it() {
        let table = OwnerTable::own(LEN, &pages(&[(1, 4)]));
        let within: Vec<Range<u64>> = table
            .within(2 * PAGE..6 * PAGE)
            .map(|(_, run)| run)
            .collect();
        assert_eq!(within, pages(&[(2, 4), (4, 6)]));
    }
}
