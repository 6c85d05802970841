//! An image on its way to another process: which images of its line there are, who of them holds a
//! page, and which one a clone maps where. The memfds themselves go beside it.

use std::fs::File;
use std::sync::Arc;

use forkvm_vmm::MemoryError;
use forkvm_vmm::memory::PAGE;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{MemoryImage, Owner, OwnerTable, Plan};

/// See the module's text. Images go by number: 0 is the outlined one, the others are those of its line
/// that it names. Starts are file offsets of RAM in bytes, begin at 0 and rise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outline {
    /// Bytes of memory.
    len: u64,
    /// Who holds the pages from each start on; nobody where they are zero.
    holders: Vec<(u64, Option<u16>)>,
    /// Which image a clone maps from each start on.
    mapped: Vec<(u64, u16)>,
}

impl Outline {
    /// Of `image`, and the images that it numbers.
    pub(crate) fn of(
        image: &Arc<MemoryImage>,
    ) -> Result<(Outline, Vec<Arc<MemoryImage>>), MemoryError> {
        let mut images = vec![image.clone()];
        let mut number = |of: &Arc<MemoryImage>| {
            let known = images.iter().position(|known| Arc::ptr_eq(known, of));
            known.unwrap_or_else(|| {
                images.push(of.clone());
                images.len() - 1
            }) as u16
        };
        let holders = image.table()?.within(0..image.len);
        let holders = holders.map(|(owner, run)| match owner {
            Owner::Zero => (run.start, None),
            Owner::Own => (run.start, Some(0)),
            Owner::Base(base) => (run.start, Some(number(base))),
        });
        let holders = holders.collect();
        let mapped = image.mapped().into_iter();
        let mapped = mapped.map(|(range, of)| (range.start, number(&of)));
        let outline = Outline {
            len: image.len,
            holders,
            mapped: mapped.collect(),
        };
        Ok((outline, images))
    }

    /// The image with this outline, whose images are whole and lie in `files`.
    pub(crate) fn whole(&self, files: Vec<File>) -> Result<Arc<MemoryImage>, OutlineError> {
        self.check(files.len())?;
        for file in &files {
            let found = file.metadata().map_err(MemoryError::Stat)?.len();
            if found != self.len {
                let needed = self.len;
                return Err(MemoryError::Length { found, needed }.into());
            }
        }
        let mut files = files.into_iter().map(Arc::new);
        let own = files.next().ok_or(OutlineError::Broken)?;
        let bases: Vec<_> = files
            .map(|file| MemoryImage::whole(file, self.len))
            .collect();
        let part = |&(start, number): &(u64, u16)| {
            let base = usize::from(number).checked_sub(1);
            (start, base.map(|base| bases[base].clone()))
        };
        let plan = Plan::of_parts(self.len, self.mapped.iter().map(part).collect());
        let runs = self.holders.iter();
        let runs = runs.map(|(start, holder)| (*start, holder.map(usize::from)));
        let table = OwnerTable::of_runs(self.len, runs, bases.clone());
        Ok(MemoryImage::of_line(own, table, plan))
    }

    /// Nothing of an outline is believed: it may come from elsewhere.
    fn check(&self, images: usize) -> Result<(), OutlineError> {
        let rises = |starts: &mut dyn Iterator<Item = u64>| {
            let starts: Vec<u64> = starts.collect();
            starts.first() == Some(&0)
                && starts.is_sorted_by(|before, after| before < after)
                && starts
                    .iter()
                    .all(|start| start.is_multiple_of(PAGE) && *start < self.len)
        };
        let known = |number: u16| usize::from(number) < images;
        let sound = rises(&mut self.holders.iter().map(|run| run.0))
            && rises(&mut self.mapped.iter().map(|part| part.0))
            && self.holders.iter().all(|run| run.1.is_none_or(known))
            && self.mapped.iter().all(|part| known(part.1));
        if sound {
            Ok(())
        } else {
            Err(OutlineError::Broken)
        }
    }
}

/// Why an outline does not become an image.
#[derive(Debug, Error)]
pub enum OutlineError {
    /// It contradicts itself, or the files that came with it.
    #[error("the outline of a memory image contradicts itself or its files")]
    Broken,
    /// A file is not its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    const LEN: u64 = 64 * PAGE;

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * PAGE..range.end * PAGE
    }

    fn memfd() -> File {
        forkvm_vmm::memory::memfd(c"test", LEN).unwrap()
    }

    /// An image with a page of its own, over one that holds eight, of which one is zero since.
    fn image() -> Arc<MemoryImage> {
        let base = MemoryImage::whole(Arc::new(memfd()), LEN);
        let below = OwnerTable::own(LEN, &[pages(0..8)]).of(&base);
        let table = below.with_own(&[pages(2..3)]).with_zero(&[pages(5..6)]);
        let plan = Plan::over(&[(0..LEN, base)], &[pages(2..3)], LEN, 1);
        MemoryImage::of_line(Arc::new(memfd()), table, plan)
    }

    #[test]
    fn an_image_that_was_outlined_is_held_and_mapped_as_before() {
        let (outline, images) = Outline::of(&image()).unwrap();
        let copies = images.iter().map(|image| image.file().try_clone().unwrap());
        let again = outline.whole(copies.collect()).unwrap();
        let (same, _) = Outline::of(&again).unwrap();
        assert_eq!(outline, same);
        assert_eq!(
            outline.holders,
            [
                (0, Some(1)),
                (2 * PAGE, Some(0)),
                (3 * PAGE, Some(1)),
                (5 * PAGE, None),
                (6 * PAGE, Some(1)),
                (8 * PAGE, None)
            ]
        );
        assert_eq!(outline.mapped, [(0, 1), (2 * PAGE, 0), (3 * PAGE, 1)]);
    }

    #[test]
    fn an_outline_that_contradicts_itself_or_its_files_is_refused() {
        let (sound, _) = Outline::of(&image()).unwrap();
        let broken = |change: &dyn Fn(&mut Outline)| {
            let mut outline = sound.clone();
            change(&mut outline);
            outline.whole(vec![memfd(), memfd()]).is_err()
        };
        assert!(!broken(&|_| ()), "two images are named");
        assert!(broken(&|outline| outline.holders.clear()));
        assert!(broken(&|outline| outline.holders[0].0 = PAGE));
        assert!(broken(&|outline| outline.holders[1].1 = Some(2)));
        assert!(broken(&|outline| outline.mapped[1].0 = 0));
        assert!(broken(&|outline| outline.mapped[1].0 = 2 * PAGE + 1));
        assert!(broken(&|outline| outline.mapped[2].0 = LEN));
        assert!(broken(&|outline| outline.len = LEN / 2));
        assert!(sound.whole(vec![memfd()]).is_err());
    }
}
