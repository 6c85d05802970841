//! The mark that ties the files of one save together.
#![allow(unsafe_code)] // getrandom(2) has no safe wrapper among this crate's dependencies.

use std::fmt;
use std::io;

/// Random mark of one save: 16 bytes that stand in its state file and in its memory file. Two
/// saves, of one machine even, never share it; a copy of a save keeps it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SaveId([u8; 16]);

impl SaveId {
    /// A new mark, from the kernel's random number generator.
    pub fn random() -> io::Result<SaveId> {
        loop {
            let mut bytes = [0; 16];
            // SAFETY: the pointer and the length are those of `bytes`, which outlives the call.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
            match usize::try_from(got) {
                // All zero is how the files say "none"; one draw in 2^128 has to be repeated.
                Ok(len) if len == bytes.len() && bytes != [0; 16] => return Ok(SaveId(bytes)),
                Ok(_) => {}
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// The mark of these bytes; `None` when all are zero, which means "no mark".
    pub fn from_bytes(bytes: [u8; 16]) -> Option<SaveId> {
        (bytes != [0; 16]).then_some(SaveId(bytes))
    }

    /// The bytes as they stand in a file.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl fmt::Display for SaveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SaveId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SaveId({self})")
    }
}
