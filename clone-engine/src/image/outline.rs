//! An image on its way to another process: which images of its line there are, who of them holds a
//! page, which one a clone maps where, and which of them still fill. The memfds themselves go beside it.
//!
//! An image that still fills arrives as one that is filled elsewhere ([`super::elsewhere`]): pages enter
//! it where it comes from, and nowhere else. One that is known where it arrives, because it was made
//! there or came outlined before, is that same image. As one of a line an image comes with less: what its
//! file holds.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use forkvm_vmm::MemoryError;
use forkvm_vmm::memory::PAGE;
use rustix::fs::{SealFlags, fcntl_get_seals};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::{ImageName, MemoryImage, Owner, OwnerTable, Plan, are_pages};
use crate::fault::FaultConfig;
use crate::userfault::UserfaultError;

/// See the module's text. Images go by number: 0 is the outlined one, the others are those of its line
/// that it names. Starts are file offsets of RAM in bytes, begin at 0 and rise.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outline {
    /// Bytes of memory.
    len: u64,
    /// What the images are called, by number.
    names: Vec<ImageName>,
    /// Who holds the pages from each start on; nobody where they are zero.
    holders: Vec<(u64, Option<u16>)>,
    /// Which image a clone maps from each start on.
    mapped: Vec<(u64, u16)>,
    /// Those that still fill, by rising number.
    filling: Vec<Unfinished>,
}

/// An image of an outline that still fills.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Unfinished {
    /// In the outline.
    image: u16,
    /// What its file will hold, rising and apart; of image 0 the holders and the map say it.
    held: Vec<Range<u64>>,
    config: FaultConfig,
}

/// An image that still fills, as it arrives.
pub(crate) struct Arriving {
    pub(crate) name: ImageName,
    pub(crate) file: Arc<File>,
    pub(crate) table: OwnerTable,
    pub(crate) plan: Plan,
    pub(crate) config: FaultConfig,
}

/// Where images arrive.
pub(crate) trait Arrivals {
    /// The image of this name, if there is one.
    fn known(&self, name: ImageName) -> Option<Arc<MemoryImage>>;

    /// Has one be filled where it comes from.
    fn arrive(&self, arriving: Arriving) -> Result<Arc<MemoryImage>, OutlineError>;

    /// One was made as it was outlined, and is known from here on.
    fn made(&self, image: &Arc<MemoryImage>);
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
        let mapped = mapped.collect();
        let filling = (0..).zip(&images).filter(|(_, image)| !image.is_whole());
        let filling = filling.filter_map(|(number, image)| {
            Some(Unfinished {
                image: number,
                held: match number {
                    0 => Vec::new(),
                    _ => image.held(),
                },
                config: *image.served()?,
            })
        });
        let outline = Outline {
            len: image.len,
            names: images.iter().map(|image| image.name).collect(),
            holders,
            mapped,
            filling: filling.collect(),
        };
        Ok((outline, images))
    }

    /// Numbers of the images that still fill.
    pub(crate) fn filling(&self) -> impl Iterator<Item = u16> {
        self.filling.iter().map(|filling| filling.image)
    }

    /// The image with this outline, whose images lie in `files`.
    pub(crate) fn image(
        &self,
        files: Vec<File>,
        arrivals: &dyn Arrivals,
    ) -> Result<Arc<MemoryImage>, OutlineError> {
        self.check(files.len())?;
        for file in &files {
            let found = file.metadata().map_err(MemoryError::Stat)?.len();
            if found != self.len {
                let needed = self.len;
                return Err(MemoryError::Length { found, needed }.into());
            }
            // Whoever maps a file that shrinks dies of it.
            let seals = fcntl_get_seals(file).map_err(|_not_sealed| OutlineError::Broken)?;
            if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
                return Err(OutlineError::Broken);
            }
        }
        let known = |name: ImageName| arrivals.known(name).filter(|image| image.len == self.len);
        let mut files = self.names.iter().zip(files.into_iter().map(Arc::new));
        let (&name, own) = files.next().ok_or(OutlineError::Broken)?;
        if let Some(image) = known(name) {
            return Ok(image);
        }
        let unfinished = |number| self.filling.iter().find(|filling| filling.image == number);
        let base = |(number, (&name, file))| match (known(name), unfinished(number)) {
            (Some(image), _) => Ok(image),
            (None, None) => Ok(MemoryImage::whole_of(name, file, self.len)),
            (None, Some(filling)) => arrivals.arrive(Arriving {
                name,
                file,
                table: OwnerTable::own(self.len, &filling.held),
                plan: Plan::whole(self.len),
                config: filling.config,
            }),
        };
        let bases = (1..).zip(files).map(base);
        let bases = bases.collect::<Result<Vec<_>, OutlineError>>()?;
        let part = |&(start, number): &(u64, u16)| {
            let base = usize::from(number).checked_sub(1);
            (start, base.map(|base| bases[base].clone()))
        };
        let plan = Plan::of_parts(self.len, self.mapped.iter().map(part).collect());
        let runs = self.holders.iter();
        let runs = runs.map(|(start, holder)| (*start, holder.map(usize::from)));
        let table = OwnerTable::of_runs(self.len, runs, bases.clone());
        let image = match unfinished(0) {
            None => MemoryImage::of_line(name, own, table, plan),
            Some(filling) => arrivals.arrive(Arriving {
                name,
                file: own,
                table,
                plan,
                config: filling.config,
            })?,
        };
        arrivals.made(&image);
        Ok(image)
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
        let sound = self.names.len() == images
            && rises(&mut self.holders.iter().map(|run| run.0))
            && rises(&mut self.mapped.iter().map(|part| part.0))
            && self.holders.iter().all(|run| run.1.is_none_or(known))
            && self.mapped.iter().all(|part| known(part.1))
            && self.filling.iter().all(|filling| known(filling.image))
            && self.filling.iter().all(|filling| filling.config.is_sound())
            && self
                .filling
                .iter()
                .all(|filling| is_sound(&filling.held, self.len));
        if sound {
            Ok(())
        } else {
            Err(OutlineError::Broken)
        }
    }
}

/// Whether ranges of pages rise, are apart, and lie in `len` bytes.
fn is_sound(ranges: &[Range<u64>], len: u64) -> bool {
    ranges.is_sorted_by(|before, after| before.end < after.start)
        && ranges.iter().all(|range| are_pages(range, len))
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
    /// An image that still fills came to somebody who cannot watch memory, or has nobody to fill it.
    #[error("the memory image of the fork point still fills, and cannot be watched here")]
    Unwatched(#[source] UserfaultError),
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 64 * PAGE;

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * PAGE..range.end * PAGE
    }

    fn memfd() -> File {
        forkvm_vmm::memory::memfd(c"test", LEN).unwrap()
    }

    /// Where every image that arrives is whole; and those that are known.
    struct Whole(Vec<Arc<MemoryImage>>);

    impl Arrivals for Whole {
        fn known(&self, name: ImageName) -> Option<Arc<MemoryImage>> {
            self.0.iter().find(|image| image.name == name).cloned()
        }

        fn arrive(&self, _: Arriving) -> Result<Arc<MemoryImage>, OutlineError> {
            panic!("every image is whole")
        }

        fn made(&self, _: &Arc<MemoryImage>) {}
    }

    /// An image with a page of its own, over one that holds eight, of which one is zero since.
    fn image() -> Arc<MemoryImage> {
        let base = MemoryImage::whole(Arc::new(memfd()), LEN);
        let below = OwnerTable::own(LEN, &[pages(0..8)]).of(&base);
        let table = below.with_own(&[pages(2..3)]).with_zero(&[pages(5..6)]);
        let plan = Plan::over(&[(0..LEN, base)], &[pages(2..3)], LEN, 1);
        MemoryImage::of_line(ImageName::new(), Arc::new(memfd()), table, plan)
    }

    #[test]
    fn an_image_that_was_outlined_is_held_and_mapped_as_before() {
        let (outline, images) = Outline::of(&image()).unwrap();
        let copies = images.iter().map(|image| image.file().try_clone().unwrap());
        let again = outline.image(copies.collect(), &Whole(vec![])).unwrap();
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
    fn an_image_that_is_known_where_it_arrives_is_not_made_again() {
        let image = image();
        let (outline, images) = Outline::of(&image).unwrap();
        let files = || vec![memfd(), memfd()];
        let again = outline.image(files(), &Whole(images.clone())).unwrap();
        assert!(Arc::ptr_eq(&again, &image));
        let base = images[1].clone();
        let over_it = outline.image(files(), &Whole(vec![base.clone()])).unwrap();
        assert!(!Arc::ptr_eq(&over_it, &image));
        assert!(Arc::ptr_eq(&over_it.mapped()[0].1, &base));
    }

    #[test]
    fn an_outline_that_contradicts_itself_or_its_files_is_refused() {
        let (sound, _) = Outline::of(&image()).unwrap();
        let broken = |change: &dyn Fn(&mut Outline)| {
            let mut outline = sound.clone();
            change(&mut outline);
            outline
                .image(vec![memfd(), memfd()], &Whole(vec![]))
                .is_err()
        };
        assert!(!broken(&|_| ()), "two images are named");
        assert!(broken(&|outline| outline.names.truncate(1)));
        assert!(broken(&|outline| outline.holders.clear()));
        assert!(broken(&|outline| outline.holders[0].0 = PAGE));
        assert!(broken(&|outline| outline.holders[1].1 = Some(2)));
        assert!(broken(&|outline| outline.mapped[1].0 = 0));
        assert!(broken(&|outline| outline.mapped[1].0 = 2 * PAGE + 1));
        assert!(broken(&|outline| outline.mapped[2].0 = LEN));
        assert!(broken(&|outline| outline.len = LEN / 2));
        assert!(sound.image(vec![memfd()], &Whole(vec![])).is_err());
    }
}
