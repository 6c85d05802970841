//! Reads of several files as one set in which every read has a name of its own.
//!
//! Sequencers write the two mates of a pair into two files under one name. The mapper treats reads
//! as single ones, and SAM would take two lines of one name for one template. So a name that
//! several files share gets `/1`, `/2`, … by the file it is in, as was FASTQ's own custom; all
//! other names stay as they are.

use std::collections::HashMap;

use forkvm_read_mapper::fastq::{FastqError, Records};

/// Appends the first `limit` reads of each file to `out`, file after file.
///
/// # Errors
/// A file that is not FASTQ; a name that one file has twice.
pub fn combine(out: &mut Vec<u8>, files: &[&[u8]], limit: usize) -> Result<(), ReadsError> {
    // In which file each name was last seen, and whether several have it.
    let mut names: HashMap<&[u8], (usize, bool)> = HashMap::new();
    for (file, text) in files.iter().enumerate() {
        for record in Records::new(text).take(limit) {
            let name = record
                .map_err(|source| ReadsError::Malformed { file, source })?
                .name;
            let seen = names.entry(name).or_insert((usize::MAX, false));
            if seen.0 == file {
                let name = String::from_utf8_lossy(name).into_owned();
                return Err(ReadsError::SameName { file, name });
            }
            *seen = (file, seen.0 != usize::MAX);
        }
    }
    for (file, text) in files.iter().enumerate() {
        for record in Records::new(text).take(limit) {
            let record = record.map_err(|source| ReadsError::Malformed { file, source })?;
            out.push(b'@');
            out.extend_from_slice(record.name);
            if names[record.name].1 {
                out.extend_from_slice(format!("/{}", file + 1).as_bytes());
            }
            for part in [b"\n", record.bases, b"\n+\n", record.qualities, b"\n"] {
                out.extend_from_slice(part);
            }
        }
    }
    Ok(())
}

/// Why reads could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum ReadsError {
    /// A file is not FASTQ.
    #[error("cannot take reads from file {} of the set: {source}", file + 1)]
    Malformed {
        /// Which file, from 0.
        file: usize,
        /// Where and why.
        source: FastqError,
    },
    /// Two reads of a file have the same name.
    #[error("file {} of the set has two reads named '{name}'; rename one of them", file + 1)]
    SameName {
        /// Which file, from 0.
        file: usize,
        /// The name.
        name: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn combined(files: &[&str], limit: usize) -> Result<String, ReadsError> {
        let files: Vec<&[u8]> = files.iter().map(|file| file.as_bytes()).collect();
        let mut out = Vec::new();
        combine(&mut out, &files, limit)?;
        Ok(String::from_utf8(out).unwrap())
    }

    #[test]
    fn mates_get_different_names_and_other_reads_keep_theirs() {
        let first = "@r1 x\nAC\n+r1\nII\n@a\nG\n+\nI\n";
        let second = "@r1\nGT\n+\nJJ\n@b\nT\n+\nK\n";
        let expected = "@r1/1\nAC\n+\nII\n@a\nG\n+\nI\n@r1/2\nGT\n+\nJJ\n@b\nT\n+\nK\n".to_string();
        assert_eq!(combined(&[first, second], usize::MAX).unwrap(), expected);
    }

    #[test]
    fn the_limit_counts_per_file() {
        let file = "@r1\nA\n+\nI\n@r2\nC\n+\nI\n";
        assert_eq!(
            combined(&[file, file], 1).unwrap(),
            "@r1/1\nA\n+\nI\n@r1/2\nA\n+\nI\n"
        );
    }

    #[test]
    fn a_name_twice_in_one_file_is_refused() {
        let file = "@r1\nA\n+\nI\n@r1\nC\n+\nI\n";
        let error = combined(&["", file], usize::MAX).unwrap_err().to_string();
        assert_eq!(
            error,
            "file 2 of the set has two reads named 'r1'; rename one of them"
        );
    }
}
