//! Which image of a line the clones of an image map where.
//!
//! The simple plan maps the image itself everywhere. Where few pages changed since an earlier image
//! of the line, the earlier one can be mapped directly and only the changed parts from the new one:
//! what did not change then needs neither a copy nor, if the earlier image is whole, a fault. Every
//! part costs each clone a mapping, of which a process has a limited number.

use std::ops::Range;
use std::sync::Arc;

use forkvm_vmm::memory::PAGE;

use super::MemoryImage;
use crate::limits::mappings;

/// Parts that are nearer to each other than this are one: the pages between them are copied instead.
const GAP: u64 = 16 * PAGE;

/// Most parts of a plan: mapping one costs a clone about 5 us at its start.
const MOST_PARTS: usize = 256;

/// See the module's text. Offsets are file offsets of RAM in bytes.
#[derive(Debug)]
pub(crate) struct Plan {
    len: u64,
    /// By rising start; each ends where the next one starts. `None` is the image of the plan.
    parts: Vec<(u64, Option<Arc<MemoryImage>>)>,
}

impl Plan {
    /// The image itself, everywhere.
    pub(crate) fn whole(len: u64) -> Plan {
        Plan {
            len,
            parts: vec![(0, None)],
        }
    }

    /// `below` but for what has `changed` (by rising start; ranges may overlap), unless that makes
    /// more mappings than `clones` of this process can have.
    pub(crate) fn over(
        below: &[(Range<u64>, Arc<MemoryImage>)],
        changed: &[Range<u64>],
        len: u64,
        clones: u32,
    ) -> Plan {
        let spare = mappings::spare(clones).unwrap_or_else(|error| {
            tracing::warn!(%error, "mappings that are left are not known: none is taken");
            0
        });
        let most = spare.min(MOST_PARTS as u64) as usize;
        let mut own: Vec<Range<u64>> = Vec::new();
        for range in changed {
            match own.last_mut() {
                // A page that was given back and written again is in two of them.
                Some(last) if range.start < last.end + GAP => last.end = last.end.max(range.end),
                _ => own.push(range.clone()),
            }
            if 2 * own.len() + below.len() > most {
                return Plan::whole(len);
            }
        }
        let mut parts: Vec<(u64, Option<Arc<MemoryImage>>)> = Vec::new();
        let mut own = own.into_iter().peekable();
        for (range, image) in below {
            let mut at = range.start;
            while at < range.end {
                match own.peek() {
                    Some(next) if next.start <= at => {
                        if next.start == at || parts.is_empty() {
                            parts.push((at, None));
                        }
                        if next.end > range.end {
                            break;
                        }
                        at = next.end;
                        own.next();
                    }
                    next => {
                        parts.push((at, Some(image.clone())));
                        at = next.map_or(range.end, |next| next.start.min(range.end));
                    }
                }
            }
        }
        mappings::promise(parts.len() as u64 * u64::from(clones));
        Plan { len, parts }
    }

    /// Of `len` bytes: the image that is mapped from each start on, `None` for the plan's own. They begin
    /// at 0 and rise.
    pub(super) fn of_parts(len: u64, parts: Vec<(u64, Option<Arc<MemoryImage>>)>) -> Plan {
        Plan { len, parts }
    }

    /// The parts, each with its image, if the plan is that of `image`.
    pub(super) fn mapped(&self, image: &Arc<MemoryImage>) -> Vec<(Range<u64>, Arc<MemoryImage>)> {
        let of = |held_by: &Option<Arc<MemoryImage>>| held_by.as_ref().unwrap_or(image).clone();
        (0..self.parts.len())
            .map(|index| (self.range(index), of(&self.parts[index].1)))
            .collect()
    }

    /// The image that is mapped at `offset`, if the plan is that of `image`.
    pub(super) fn at(&self, offset: u64, image: &Arc<MemoryImage>) -> Arc<MemoryImage> {
        let held_by = &self.parts[self.index(offset)].1;
        held_by.as_ref().unwrap_or(image).clone()
    }

    /// The parts that map the image itself.
    pub(super) fn own_parts(&self) -> impl Iterator<Item = Range<u64>> {
        (0..self.parts.len())
            .filter(|index| self.parts[*index].1.is_none())
            .map(|index| self.range(index))
    }

    /// The pieces of `range` that map the image itself.
    pub(super) fn own_within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        (self.index(range.start)..self.parts.len())
            .map(|index| (self.range(index), &self.parts[index].1))
            .take_while(move |(part, _)| part.start < range.end)
            .filter(|(_, held_by)| held_by.is_none())
            .map(move |(part, _)| part.start.max(range.start)..part.end.min(range.end))
    }

    fn index(&self, offset: u64) -> usize {
        self.parts.partition_point(|part| part.0 <= offset) - 1
    }

    fn range(&self, index: usize) -> Range<u64> {
        let end = self.parts.get(index + 1).map_or(self.len, |next| next.0);
        self.parts[index].0..end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 1024 * PAGE;

    fn image() -> Arc<MemoryImage> {
        let file = forkvm_vmm::memory::memfd(c"test", LEN).unwrap();
        MemoryImage::whole(Arc::new(file), LEN)
    }

    fn pages(ranges: &[(u64, u64)]) -> Vec<Range<u64>> {
        ranges
            .iter()
            .map(|(from, to)| from * PAGE..to * PAGE)
            .collect()
    }

    /// Page numbers where parts begin, and whether each maps the plan's own image.
    fn spell(plan: &Plan) -> Vec<(u64, bool)> {
        plan.parts
            .iter()
            .map(|(start, image)| (start / PAGE, image.is_none()))
            .collect()
    }

    #[test]
    fn what_changed_is_mapped_from_the_new_image_and_the_rest_from_the_old_one() {
        let base = image();
        let plan = Plan::over(&[(0..LEN, base)], &pages(&[(10, 12), (100, 101)]), LEN, 1);
        let expected = [
            (0, false),
            (10, true),
            (12, false),
            (100, true),
            (101, false),
        ];
        assert_eq!(spell(&plan), expected);
        let own = |range| plan.own_within(range).collect::<Vec<_>>();
        assert_eq!(own(0..20 * PAGE), pages(&[(10, 12)]));
        assert_eq!(own(11 * PAGE..LEN), pages(&[(11, 12), (100, 101)]));
        assert_eq!(own(12 * PAGE..100 * PAGE), []);
    }

    #[test]
    fn changes_near_to_each_other_are_one_part() {
        let plan = Plan::over(&[(0..LEN, image())], &pages(&[(0, 1), (5, 6)]), LEN, 1);
        assert_eq!(spell(&plan), [(0, true), (6, false)]);
    }

    #[test]
    fn a_change_across_parts_of_earlier_images_hides_both() {
        let (first, second) = (image(), image());
        let border = 500 * PAGE;
        let below = [(0..border, first), (border..LEN, second.clone())];
        let plan = Plan::over(&below, &pages(&[(490, 510), (1000, 1024)]), LEN, 1);
        let expected = [(0, false), (490, true), (510, false), (1000, true)];
        assert_eq!(spell(&plan), expected);
        let own = image();
        assert!(Arc::ptr_eq(&plan.at(700 * PAGE, &own), &second));
        assert!(Arc::ptr_eq(&plan.at(495 * PAGE, &own), &own));
        assert!(Arc::ptr_eq(&plan.at(505 * PAGE, &own), &own));
    }

    #[test]
    fn a_change_of_everything_maps_the_new_image_alone() {
        let plan = Plan::over(&[(0..LEN, image())], &pages(&[(0, 1024)]), LEN, 1);
        assert_eq!(spell(&plan), [(0, true)]);
    }

    #[test]
    fn more_parts_than_the_process_can_map_become_one() {
        let scattered: Vec<_> = (0..20).map(|at| (at * 40, at * 40 + 1)).collect();
        let below = [(0..LEN, image())];
        assert_eq!(
            Plan::over(&below, &pages(&scattered), LEN, 1).parts.len(),
            40
        );
        let many = Plan::over(&below, &pages(&scattered), LEN, 1_000_000);
        assert_eq!(spell(&many), [(0, true)]);
    }
}
