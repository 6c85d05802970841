//! SAM text as the guests wrote it: reading lines back, and merging them to one file.
//!
//! Lines are written by `forkvm_read_mapper::sam`, in the guests and in [`super::expected`]. Here
//! they are only taken apart as far as judging them needs.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::simulate::Origin;

/// How far from its origin a simulated read may lie and still count as placed: a few inserted,
/// deleted or wrong bases at its start move it.
const PLACED_WITHIN: usize = 5;

/// The fields of a SAM line that judging needs (SAM 1.6, section 1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// QNAME.
    pub name: &'a str,
    /// Where it was mapped to; `None` for an unmapped read.
    pub place: Option<Place<'a>>,
}

/// Where a mapped read lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// RNAME.
    pub reference: &'a str,
    /// POS, but counted from 0.
    pub position: usize,
    /// FLAG bit 0x10.
    pub reverse: bool,
    /// The tag NM: edit distance.
    pub distance: usize,
}

impl<'a> Line<'a> {
    /// Takes a line apart; `None` if it is not a line of SAM, or mapped without an NM tag.
    pub fn parse(line: &'a [u8]) -> Option<Line<'a>> {
        let fields: Vec<&str> = std::str::from_utf8(line).ok()?.split('\t').collect();
        let [name, flag, reference, position, .., _seq, _qual] = fields.get(..11)? else {
            return None;
        };
        let flag: u16 = flag.parse().ok()?;
        if flag & 0x4 != 0 {
            return Some(Line { name, place: None });
        }
        let distance = fields[11..]
            .iter()
            .find_map(|tag| tag.strip_prefix("NM:i:"))?;
        let position = position.parse::<usize>().ok()?.checked_sub(1)?;
        let distance = distance.parse().ok()?;
        let place = Place {
            reference,
            position,
            reverse: flag & 0x10 != 0,
            distance,
        };
        Some(Line {
            name,
            place: Some(place),
        })
    }
}

/// Lines of a text, without their ends.
pub fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split_inclusive(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\n").unwrap_or(line))
}

/// Percent of the simulated reads in these SAM lines that lie where they were drawn, on the strand
/// they were drawn from and on `reference`; `None` if no read is a simulated one.
pub fn placed_percent(text: &[u8], reference: &str) -> Option<f64> {
    let (mut simulated, mut placed) = (0u64, 0u64);
    for line in lines(text).filter_map(Line::parse) {
        let Some(origin) = Origin::of_name(line.name) else {
            continue;
        };
        simulated += 1;
        placed += u64::from(line.place.is_some_and(|place| {
            place.reference == reference
                && place.reverse == origin.reverse
                && place.position.abs_diff(origin.position) <= PLACED_WITHIN
        }));
    }
    (simulated > 0).then(|| 100.0 * placed as f64 / simulated as f64)
}

/// Writes header and lines to `path`, which then holds the whole of them or what it held before:
/// a temporary file beside it, fsync, rename.
///
/// # Errors
/// A file that cannot be written or renamed.
pub fn write(path: &Path, header: &[u8], text: &[u8]) -> Result<(), WriteError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    let write = || -> io::Result<()> {
        let mut out = BufWriter::new(File::create(&temporary)?);
        out.write_all(header)?;
        out.write_all(text)?;
        out.into_inner()?.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        // The first error is the one to return; what was not even created need not be removed.
        if let Err(error) = std::fs::remove_file(&temporary)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(file = %temporary.display(), %error, "a temporary file is left behind");
        }
        WriteError {
            path: path.to_path_buf(),
            source,
        }
    })
}

/// The merged records could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the mapped reads to {}: {source}; is there space, and permission?", path.display())]
pub struct WriteError {
    /// Where they should be.
    pub path: PathBuf,
    /// What writing said.
    pub source: io::Error,
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPPED: &[u8] = b"ecoli_0_41_-\t16\tchr\t43\t60\t4M\t*\t0\t0\tACGT\tIIII\tNM:i:2";

    #[test]
    fn a_mapped_line_tells_its_place_from_zero() {
        let place = Place {
            reference: "chr",
            position: 42,
            reverse: true,
            distance: 2,
        };
        let expected = Line {
            name: "ecoli_0_41_-",
            place: Some(place),
        };
        assert_eq!(Line::parse(MAPPED), Some(expected));
    }

    #[test]
    fn an_unmapped_line_has_no_place_and_a_broken_line_is_none() {
        let unmapped = b"r\t4\t*\t0\t0\t*\t*\t0\t0\tACGT\tIIII";
        assert_eq!(
            Line::parse(unmapped),
            Some(Line {
                name: "r",
                place: None
            })
        );
        for broken in [
            &b""[..],
            b"r\t0\tchr",
            &MAPPED[..MAPPED.len() - 7],
            b"\xff\xfe",
        ] {
            assert_eq!(Line::parse(broken), None);
        }
    }

    #[test]
    fn a_read_is_placed_within_a_few_bases_on_its_strand_and_reference() {
        let line = |name: &str, flag: u16, position: usize| {
            format!("{name}\t{flag}\tchr\t{position}\t60\t4M\t*\t0\t0\tACGT\tIIII\tNM:i:0\n")
        };
        let text = [
            line("ecoli_0_100_+", 0, 101),
            line("ecoli_1_100_-", 16, 106),
            line("ecoli_2_100_+", 16, 101),
            line("ecoli_3_100_+", 0, 107),
            line("r1/1", 0, 1),
        ]
        .concat();
        assert_eq!(placed_percent(text.as_bytes(), "chr"), Some(50.0));
        assert_eq!(placed_percent(text.as_bytes(), "other"), Some(0.0));
        assert_eq!(placed_percent(line("r1/1", 0, 1).as_bytes(), "chr"), None);
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("demo.sam");
        write(&path, b"@HD\n", b"r\n").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"@HD\nr\n");
        let blocked = folder.path().join("folder");
        std::fs::create_dir(&blocked).unwrap();
        let error = write(&blocked, b"@HD\n", b"r\n").unwrap_err();
        assert_eq!(error.path, blocked);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
