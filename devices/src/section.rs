//! Named, versioned pieces of a machine's state.
//!
//! Whoever has state (a device, a vCPU, the VM) puts it into one [`Section`]; a machine's state is
//! a list of them ([`Sections`]). The list knows names only. A section that is missing, doubled or
//! left unread is an error that names it, so no piece of state can be forgotten in silence. How a
//! list becomes a file is `forkvm_vmm::state_file`'s concern.

use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

/// State that can stand in a [`Section`]. Types that implement this are apart from the types that
/// a device works with: they change only together with [`SavedState::VERSION`].
pub trait SavedState: Serialize + DeserializeOwned {
    /// Version that is written today.
    const VERSION: u16;

    /// Reads an older version; override it when [`SavedState::VERSION`] is raised. `body` is CBOR.
    fn upgrade(kind: &str, version: u16, body: &[u8]) -> Result<Self, SectionError> {
        let _unreadable = body;
        Err(SectionError::Version {
            kind: kind.to_owned(),
            found: version,
            newest: Self::VERSION,
        })
    }
}

/// One piece of state: what it is, in which version, and its CBOR.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Name, such as `dev/blk0`; at most 255 bytes.
    pub kind: String,
    /// Version of the body's layout.
    pub version: u16,
    /// CBOR (RFC 8949) of the state.
    pub body: Vec<u8>,
}

impl Section {
    /// Encodes `state` under the name `kind`.
    pub fn encode<T: SavedState>(
        kind: impl Into<String>,
        state: &T,
    ) -> Result<Section, SectionError> {
        let kind = kind.into();
        let mut body = Vec::new();
        match ciborium::into_writer(state, &mut body) {
            Ok(()) => Ok(Section {
                kind,
                version: T::VERSION,
                body,
            }),
            Err(error) => Err(SectionError::Encode {
                kind,
                what: error.to_string(),
            }),
        }
    }

    /// Decodes the state, through [`SavedState::upgrade`] when it is of an older version.
    pub fn decode<T: SavedState>(&self) -> Result<T, SectionError> {
        if self.version > T::VERSION {
            return Err(SectionError::Version {
                kind: self.kind.clone(),
                found: self.version,
                newest: T::VERSION,
            });
        }
        if self.version < T::VERSION {
            return T::upgrade(&self.kind, self.version, &self.body);
        }
        ciborium::from_reader(self.body.as_slice()).map_err(|error| SectionError::Decode {
            kind: self.kind.clone(),
            what: error.to_string(),
        })
    }
}

/// The state of a machine: sections of distinct names, in the order in which they were saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sections(Vec<Section>);

impl Sections {
    /// Adds a section whose name is not there yet.
    pub fn push(&mut self, section: Section) -> Result<(), SectionError> {
        if self.find(&section.kind).is_some() {
            return Err(SectionError::Duplicate { kind: section.kind });
        }
        self.0.push(section);
        Ok(())
    }

    /// The section named `kind`, if there is one.
    pub fn find(&self, kind: &str) -> Option<&Section> {
        self.0.iter().find(|section| section.kind == kind)
    }

    /// All sections, in order.
    pub fn iter(&self) -> std::slice::Iter<'_, Section> {
        self.0.iter()
    }

    /// Starts to read: every section has to be taken exactly once.
    pub fn reader(&self) -> SectionsReader<'_> {
        SectionsReader {
            unread: self.0.iter().collect(),
        }
    }
}

/// Hands out each section of a [`Sections`] once.
#[derive(Debug)]
pub struct SectionsReader<'a> {
    unread: Vec<&'a Section>,
}

impl<'a> SectionsReader<'a> {
    /// Takes the section named `kind`.
    pub fn take(&mut self, kind: &str) -> Result<&'a Section, SectionError> {
        match self.unread.iter().position(|section| section.kind == kind) {
            Some(index) => Ok(self.unread.remove(index)),
            None => Err(SectionError::Missing {
                kind: kind.to_owned(),
            }),
        }
    }

    /// Takes all sections whose names begin with `prefix`, in order.
    pub fn take_all(&mut self, prefix: &str) -> Vec<&'a Section> {
        let is_one = |section: &mut &Section| section.kind.starts_with(prefix);
        self.unread.extract_if(.., is_one).collect()
    }

    /// Takes and decodes the section named `kind`.
    pub fn decode<T: SavedState>(&mut self, kind: &str) -> Result<T, SectionError> {
        self.take(kind)?.decode()
    }

    /// Ends the reading; an error names the first section that nobody took.
    pub fn finish(self) -> Result<(), SectionError> {
        match self.unread.first() {
            Some(section) => Err(SectionError::Unread {
                kind: section.kind.clone(),
            }),
            None => Ok(()),
        }
    }
}

/// Why a section could not be written or read.
#[derive(Debug, Error)]
pub enum SectionError {
    /// Encoding failed.
    #[error("state section {kind:?}: encoding failed: {what}")]
    Encode {
        /// Name of the section.
        kind: String,
        /// What the encoder said.
        what: String,
    },
    /// The body is not the CBOR of this state.
    #[error("state section {kind:?}: its body cannot be decoded: {what}")]
    Decode {
        /// Name of the section.
        kind: String,
        /// What the decoder said.
        what: String,
    },
    /// The section is of a version that this program cannot read.
    #[error(
        "state section {kind:?} has version {found}, this program reads {newest}: \
         use the forkvm that wrote it, or a newer one"
    )]
    Version {
        /// Name of the section.
        kind: String,
        /// Version in the section.
        found: u16,
        /// Version that this program writes.
        newest: u16,
    },
    /// A section that the machine needs is not there.
    #[error("state section {kind:?} is missing")]
    Missing {
        /// Name of the section.
        kind: String,
    },
    /// A section is there twice.
    #[error("state section {kind:?} is there twice")]
    Duplicate {
        /// Name of the section.
        kind: String,
    },
    /// A section belongs to nothing in this machine.
    #[error("state section {kind:?} belongs to nothing in this machine")]
    Unread {
        /// Name of the section.
        kind: String,
    },
}
