//! A fork point on its way to whoever is to spawn clones of it: another process, later another host.
//!
//! The descriptor is a state file with all sections of the saved state and three more, which say what
//! the image, the disks and the fork are: everything that a clone needs to start but its memory and
//! its sectors. The files that hold those go beside it as open descriptors, in the order in which the
//! sections name them; a path in it only says what a file is called. Written by
//! [`ForkPoint::describe`], read by [`ForkPoint::from_description`].

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Instant;

use forkvm_devices::block::{
    BlockLayer, ForeignError, ForeignFile, Frozen, HeldError, HeldSectors, Overlay, Storage,
};
use forkvm_devices::{SavedState, Section, SectionError};
use forkvm_vmm::state_file::{self, EncodeError, StateFileError};
use forkvm_vmm::{MachineState, MemoryError, VmError, memory};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::disks::DisksAtFork;
use crate::family::Family;
use crate::fork::MemoryMode;
use crate::fork_point::ForkPoint;
use crate::freeze::FreezeKind;
use crate::handed_out::HandedOut;
use crate::identity::Identity;
use crate::image::{Arrivals, MemoryImage, Outline, OutlineError};

/// Longest descriptor: far beyond owner tables and presence maps of the largest machines.
const MOST_BYTES: u64 = 1 << 30;

/// Section of the image.
const IMAGE: &str = "fork/image";
/// Section of the disks.
const DISKS: &str = "fork/disks";
/// Section of everything else.
const FORK: &str = "fork/point";

/// A fork point as it crosses.
pub(crate) struct Description {
    /// A memfd with the state file, which nobody can write any more, and the files that it names.
    pub(crate) files: Vec<File>,
    /// The images among them that still fill: whoever gets the description will ask for their pages.
    pub(crate) filling: Vec<Arc<MemoryImage>>,
}

/// Section [`IMAGE`]. Its files: one memfd for each image of the outline, in the order of the numbers.
#[derive(Serialize, Deserialize)]
struct ImageState {
    images: u16,
    outline: Outline,
}

impl SavedState for ImageState {
    const VERSION: u16 = 1;
}

/// Section [`DISKS`], in the order of the configuration.
#[derive(Serialize, Deserialize)]
struct DisksState(Vec<DiskState>);

impl SavedState for DisksState {
    const VERSION: u16 = 1;
}

/// A frozen disk. Its files: the raw one, then the data of each overlay that has any.
#[derive(Serialize, Deserialize)]
struct DiskState {
    read_only: bool,
    /// Bytes.
    len: u64,
    /// What the raw file at the bottom is called.
    path: PathBuf,
    /// The overlays over it, from the bottom up.
    overlays: Vec<OverlayState>,
}

#[derive(Serialize, Deserialize)]
struct OverlayState {
    /// What its data file is called; `None` for one in memory.
    path: Option<PathBuf>,
    #[serde(with = "serde_bytes")]
    map: Vec<u8>,
    has_data: bool,
}

/// Section [`FORK`].
#[derive(Serialize, Deserialize)]
struct ForkState {
    parent: Identity,
    freeze: FreezeKind,
    memory_mode: MemoryMode,
    forker: Option<u32>,
    populated: u64,
    expected_write_mib: u64,
}

impl SavedState for ForkState {
    const VERSION: u16 = 1;
}

impl ForkPoint {
    /// The descriptor of this fork point and its files, the latter as duplicates.
    pub(crate) fn describe(&self) -> Result<Description, DescriptorError> {
        let (outline, images) = Outline::of(&self.image)?;
        let mut files = Vec::new();
        for image in &images {
            files.push(duplicate(image.file())?);
        }
        let mut disks = Vec::new();
        for ((content, read_only), config) in self.disks.iter().zip(&self.config().disks) {
            let state = describe_disk(content, read_only, &config.name, &mut files)?;
            disks.push(state);
        }
        let filling = outline.filling();
        let filling = filling.map(|number| images[usize::from(number)].clone());
        let filling = filling.collect();
        let image = ImageState {
            images: images.len() as u16,
            outline,
        };
        let fork = ForkState {
            parent: self.parent.clone(),
            freeze: self.freeze,
            memory_mode: self.memory_mode,
            forker: self.forker,
            populated: self.populated,
            expected_write_mib: self.expected_write_mib,
        };
        let mut sections = self.sections.clone();
        sections.push(Section::encode(IMAGE, &image)?)?;
        sections.push(Section::encode(DISKS, &DisksState(disks))?)?;
        sections.push(Section::encode(FORK, &fork)?)?;
        files.insert(0, in_memory(&state_file::encode(&sections, None)?)?);
        Ok(Description { files, filling })
    }

    /// Bytes of the descriptor, which is all that another process needs of a fork point beside the files: state,
    /// memory plan and disks.
    pub fn descriptor_bytes(&self) -> Result<u64, DescriptorError> {
        let description = self.describe()?;
        let first = description.files.first().ok_or(DescriptorError::Files)?;
        let metadata = first.metadata().map_err(DescriptorError::Memfd)?;
        Ok(metadata.len())
    }

    /// The fork point that was described by `files` and requested at `requested`, as one of `family`. Its images
    /// arrive at `arrivals`; `numbers` counts the clones of its parent.
    pub(crate) fn from_description(
        family: &Arc<Family>,
        files: Vec<OwnedFd>,
        arrivals: &dyn Arrivals,
        requested: Instant,
        numbers: &Arc<AtomicU32>,
    ) -> Result<ForkPoint, DescriptorError> {
        let mut files = Files(files.into());
        let described = state_file::decode(&read(&files.next()?)?)?.sections;
        let mut reader = described.reader();
        let image: ImageState = reader.decode(IMAGE)?;
        let disks: DisksState = reader.decode(DISKS)?;
        let fork: ForkState = reader.decode(FORK)?;
        let state = MachineState::take_from(&mut reader)?;
        reader.finish()?;
        let memfds = (0..image.images).map(|_| files.next());
        let memfds = memfds.collect::<Result<_, _>>()?;
        let image = image.outline.image(memfds, arrivals)?;
        let restore = |disk: DiskState| Ok((restore_disk(&disk, &mut files)?, disk.read_only));
        let disks = disks.0.into_iter().map(restore);
        let disks = disks.collect::<Result<DisksAtFork, DescriptorError>>()?;
        if !files.0.is_empty() {
            return Err(DescriptorError::Files);
        }
        Ok(ForkPoint {
            family: family.clone(),
            parent: fork.parent,
            sections: state.to_sections()?,
            state: Arc::new(state),
            image,
            populated: fork.populated,
            freeze: fork.freeze,
            memory_mode: fork.memory_mode,
            touches: None,
            disks,
            forker: fork.forker,
            requested,
            expected_write_mib: fork.expected_write_mib,
            numbers: numbers.clone(),
            ids: AtomicU32::new(0),
            handed_out: HandedOut::default(),
        })
    }
}

/// A memfd with `bytes`, to be handed over.
fn in_memory(bytes: &[u8]) -> Result<File, DescriptorError> {
    let file = memory::memfd(c"forkvm-descriptor", bytes.len() as u64)?;
    file.write_all_at(bytes, 0)
        .map_err(DescriptorError::Memfd)?;
    // Several may get it, and none is to tell another something.
    memory::seal(&file, libc::F_SEAL_WRITE)?;
    Ok(file)
}

/// What a memfd that was handed over holds.
fn read(file: &File) -> Result<Vec<u8>, DescriptorError> {
    let len = file.metadata().map_err(DescriptorError::Memfd)?.len();
    if len > MOST_BYTES {
        return Err(DescriptorError::TooLong { len });
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0)
        .map_err(DescriptorError::Memfd)?;
    Ok(bytes)
}

/// A memfd with a state alone, for whoever only needs the shape of the machine.
pub(crate) fn of_state(state: &MachineState) -> Result<File, DescriptorError> {
    in_memory(&state_file::encode(&state.to_sections()?, None)?)
}

/// The state that [`of_state`] wrote.
pub(crate) fn state_of(file: &File) -> Result<MachineState, DescriptorError> {
    let sections = state_file::decode(&read(file)?)?.sections;
    let mut reader = sections.reader();
    let state = MachineState::take_from(&mut reader)?;
    reader.finish()?;
    Ok(state)
}

/// The files that came with a descriptor, not yet taken.
struct Files(VecDeque<OwnedFd>);

impl Files {
    fn next(&mut self) -> Result<File, DescriptorError> {
        let next = self.0.pop_front().ok_or(DescriptorError::Files)?;
        Ok(File::from(next))
    }
}

fn duplicate(file: &File) -> Result<File, DescriptorError> {
    file.try_clone().map_err(DescriptorError::Duplicate)
}

fn describe_disk(
    content: &Arc<dyn BlockLayer>,
    read_only: bool,
    name: &str,
    files: &mut Vec<File>,
) -> Result<DiskState, DescriptorError> {
    let unknown = || DescriptorError::UnknownDisk {
        disk: name.to_owned(),
    };
    let mut overlays = Vec::new();
    let mut layer = content;
    let (path, raw) = loop {
        match layer.storage() {
            Storage::Overlay {
                overlay,
                path,
                base,
            } => {
                let held = overlay.held().map_err(DescriptorError::Duplicate)?;
                overlays.push((path, held));
                layer = base;
            }
            Storage::Raw { path, file } => break (path, file),
            Storage::Unknown => return Err(unknown()),
        }
    };
    files.push(duplicate(raw)?);
    let describe = |(path, held): (Option<&std::path::Path>, HeldSectors)| {
        let has_data = held.data.is_some();
        files.extend(held.data);
        OverlayState {
            path: path.map(Into::into),
            map: held.map,
            has_data,
        }
    };
    Ok(DiskState {
        read_only,
        len: content.len(),
        path: path.to_owned(),
        overlays: overlays.into_iter().rev().map(describe).collect(),
    })
}

fn restore_disk(
    disk: &DiskState,
    files: &mut Files,
) -> Result<Arc<dyn BlockLayer>, DescriptorError> {
    let raw = ForeignFile::new(files.next()?, disk.path.clone(), disk.len)?;
    let mut content: Arc<dyn BlockLayer> = Arc::new(raw);
    for overlay in &disk.overlays {
        let held = HeldSectors {
            map: overlay.map.clone(),
            data: overlay.has_data.then(|| files.next()).transpose()?,
        };
        let overlay = Overlay::from_held(held, overlay.path.clone(), content)?;
        content = Arc::new(Frozen::new(Arc::new(overlay)));
    }
    Ok(content)
}

/// Why a fork point cannot be handed over, or taken over.
#[derive(Debug, Error)]
pub enum DescriptorError {
    /// A section could not be written or read.
    #[error(transparent)]
    Section(#[from] SectionError),
    /// The state is beyond what a state file holds.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// What arrived is no whole state file.
    #[error("the descriptor of a fork point is damaged")]
    Decode(#[from] StateFileError),
    /// The state is no machine's.
    #[error(transparent)]
    State(#[from] VmError),
    /// Its memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its image.
    #[error(transparent)]
    Outline(#[from] OutlineError),
    /// A disk's raw file.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// A disk's overlay.
    #[error(transparent)]
    Held(#[from] HeldError),
    /// It came with other files than it names.
    #[error("the descriptor of a fork point came with other files than it names")]
    Files,
    /// It is longer than any may be.
    #[error("the descriptor of a fork point has {len} bytes, at most {MOST_BYTES} are allowed")]
    TooLong {
        /// Its length.
        len: u64,
    },
    /// A memfd could not be written or read.
    #[error("writing or reading the memory of a descriptor failed")]
    Memfd(#[source] io::Error),
    /// No duplicate of a descriptor could be had.
    #[error("duplicating a file descriptor failed: too few, raise `ulimit -n`")]
    Duplicate(#[source] io::Error),
    /// A layer that is an embedder's own.
    #[error(
        "disk {disk} is kept by a layer that only this process knows: only raw files, and overlays \
         over them, can be handed to another process"
    )]
    UnknownDisk {
        /// Its name.
        disk: String,
    },
}
