//! The sequences that reads are mapped to, parsed from FASTA into one searchable text.
//!
//! All references lie in one byte vector, one code per base, with a separator before and after
//! each. The index and the mapper count positions in that text; users see a reference and a
//! position in it.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::ops::Range;

use crate::base::{TEXT_OTHER, code};

/// Separators at the front: comparisons load eight bases at a time, also at the first reference's
/// start.
const FRONT: usize = 8;

/// Text positions are kept as u32 by the index.
const MAX_TEXT: usize = u32::MAX as usize;

/// One record of a FASTA file.
#[derive(Clone, Debug)]
pub struct Reference {
    name: String,
    text: Range<usize>,
}

impl Reference {
    /// The record's title up to its first blank.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Number of bases.
    pub fn bases(&self) -> usize {
        self.text.len()
    }

    /// Where the reference lies in [`References::text`].
    pub(crate) fn text(&self) -> Range<usize> {
        self.text.clone()
    }
}

/// All references, in the order they were read.
#[derive(Clone, Debug)]
pub struct References {
    list: Vec<Reference>,
    text: Vec<u8>,
}

impl References {
    /// Parses one or several FASTA files, given one after the other in one buffer. Lower case
    /// (masked) bases are bases; letters other than A, C, G and T match nothing.
    ///
    /// # Errors
    /// [`FastaError`], for anything that could not be named in a SAM header, and for more than
    /// 4 Gb.
    pub fn from_fasta(bytes: &[u8]) -> Result<References, FastaError> {
        let mut references = References {
            list: Vec::new(),
            text: Vec::with_capacity(bytes.len()),
        };
        references.text.resize(FRONT, TEXT_OTHER);
        for line in bytes.split(|&byte| byte == b'\n') {
            let line = line.trim_ascii();
            match line.split_first() {
                None => {}
                Some((b'>', title)) => references.open(title)?,
                Some(_) => references.extend(line)?,
            }
        }
        references.close()?;
        if references.list.is_empty() {
            return Err(FastaError::NoRecord);
        }
        Ok(references)
    }

    /// The references, in order; [`crate::Alignment::reference`] counts in this slice.
    pub fn list(&self) -> &[Reference] {
        &self.list
    }

    /// Number of bases of all references together.
    pub fn bases(&self) -> usize {
        self.list.iter().map(Reference::bases).sum()
    }

    /// Codes of all references, with separators.
    pub(crate) fn text(&self) -> &[u8] {
        &self.text
    }

    /// Index of the reference that text position `position` lies in or after.
    pub(crate) fn at(&self, position: usize) -> usize {
        self.list
            .partition_point(|reference| reference.text.start <= position)
            .saturating_sub(1)
    }

    fn open(&mut self, title: &[u8]) -> Result<(), FastaError> {
        self.close()?;
        let bytes = title
            .split(u8::is_ascii_whitespace)
            .next()
            .unwrap_or_default();
        let name: String = bytes.iter().map(|&byte| char::from(byte)).collect();
        if !is_sam_name(bytes) {
            return Err(FastaError::BadName { name });
        }
        if self.list.iter().any(|reference| reference.name == name) {
            return Err(FastaError::SameName { name });
        }
        self.list.push(Reference {
            name,
            text: self.text.len()..self.text.len(),
        });
        Ok(())
    }

    fn extend(&mut self, line: &[u8]) -> Result<(), FastaError> {
        let Some(reference) = self.list.last() else {
            return Err(FastaError::BasesBeforeTitle);
        };
        if let Some(&byte) = line.iter().find(|byte| !is_residue(**byte)) {
            return Err(FastaError::BadBase {
                name: reference.name.clone(),
                byte,
            });
        }
        if self.text.len() + line.len() >= MAX_TEXT {
            return Err(FastaError::TooLong);
        }
        self.text
            .extend(line.iter().map(|&letter| code(letter, TEXT_OTHER)));
        Ok(())
    }

    fn close(&mut self) -> Result<(), FastaError> {
        let Some(reference) = self.list.last_mut() else {
            return Ok(());
        };
        reference.text.end = self.text.len();
        if reference.text.is_empty() {
            return Err(FastaError::Empty {
                name: reference.name.clone(),
            });
        }
        self.text.push(TEXT_OTHER);
        Ok(())
    }
}

fn is_residue(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'-' || byte == b'*'
}

/// SAM 1.6, section 1.2.1: characters of a reference name.
fn is_sam_name(name: &[u8]) -> bool {
    let allowed = |byte: u8| byte.is_ascii_graphic() && !b"\\,\"`'()[]{}<>".contains(&byte);
    name.iter().all(|&byte| allowed(byte)) && name.first().is_some_and(|byte| !b"*=".contains(byte))
}

/// Why FASTA input was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FastaError {
    /// No line starts with `>`.
    NoRecord,
    /// Sequence data stands before the first title.
    BasesBeforeTitle,
    /// The record has no bases.
    Empty {
        /// Name of the record.
        name: String,
    },
    /// The name is empty or has a character that SAM forbids in a reference name.
    BadName {
        /// The name as read.
        name: String,
    },
    /// Two records have one name.
    SameName {
        /// The name.
        name: String,
    },
    /// A byte of the sequence is neither a letter nor `-` nor `*`.
    BadBase {
        /// Name of the record.
        name: String,
        /// The byte.
        byte: u8,
    },
    /// All references together have 4 Gb or more.
    TooLong,
}

impl fmt::Display for FastaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FastaError::NoRecord => {
                write!(
                    f,
                    "FASTA: no record found; a record starts with a line '>name'"
                )
            }
            FastaError::BasesBeforeTitle => {
                write!(
                    f,
                    "FASTA: bases before the first '>name' line; give the record a name"
                )
            }
            FastaError::Empty { name } => {
                write!(
                    f,
                    "FASTA: record '{name}' has no bases; remove it or complete the file"
                )
            }
            FastaError::BadName { name } => write!(
                f,
                "FASTA: '{name}' cannot be a reference name in SAM (1.6, section 1.2.1); rename the record"
            ),
            FastaError::SameName { name } => {
                write!(
                    f,
                    "FASTA: two records are named '{name}'; rename one of them"
                )
            }
            FastaError::BadBase { name, byte } => write!(
                f,
                "FASTA: record '{name}' has the byte {byte:#04x} among its bases; is the file really FASTA, and unpacked?"
            ),
            FastaError::TooLong => {
                write!(
                    f,
                    "FASTA: references of 4 Gb or more cannot be indexed; map to fewer at a time"
                )
            }
        }
    }
}

impl core::error::Error for FastaError {}
