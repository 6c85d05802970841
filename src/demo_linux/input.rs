//! What is aligned, by what, and what comes out of it on the host.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use thiserror::Error;

use crate::packaged::{PackagedError, PackagedFile};

/// FASTA: 80 proteases, among them granzymes and cathepsins, of 200 to 300 amino acids each.
const SEQUENCES: PackagedFile = PackagedFile {
    package: "t-coffee-examples",
    path: "usr/share/doc/t-coffee/examples/proteases_large.fasta",
};

/// The program, and the package that brings it.
pub(super) const PROGRAM: &str = "/usr/bin/clustalw";
pub(super) const PROGRAM_PACKAGE: &str = "clustalw";

/// An alignment takes two.
const FEWEST: usize = 2;

/// Sequences in as many shares as there are clones.
#[derive(Clone, Debug)]
pub struct Input {
    /// FASTA, the share of each clone.
    pub shares: Vec<String>,
    /// In all shares together.
    pub sequences: usize,
}

impl Input {
    /// Splits the packaged sequences for `clones`.
    ///
    /// # Errors
    /// Something that is not installed, with the command that installs it; more clones than shares.
    pub fn load(clones: u32) -> Result<Input, InputError> {
        if !Path::new(PROGRAM).exists() {
            return Err(InputError::NoProgram);
        }
        let text = SEQUENCES.read(Path::new("/"))?;
        Input::split(&String::from_utf8_lossy(&text), clones)
    }

    fn split(fasta: &str, clones: u32) -> Result<Input, InputError> {
        let sequences: Vec<String> =
            fasta
                .split_inclusive('\n')
                .fold(Vec::new(), |mut all, line| {
                    if line.starts_with('>') {
                        all.push(String::new());
                    }
                    if let Some(last) = all.last_mut() {
                        last.push_str(line);
                    }
                    all
                });
        let each = sequences.len() / clones.max(1) as usize;
        if each < FEWEST {
            return Err(InputError::TooManyClones {
                clones,
                most: sequences.len() / FEWEST,
            });
        }
        // The first ones take one more each where it does not come out even.
        let more = sequences.len() % clones as usize;
        let mut rest = sequences.iter();
        let share = |number| {
            let count = each + usize::from(number < more);
            rest.by_ref().take(count).map(String::as_str).collect()
        };
        Ok(Input {
            shares: (0..clones as usize).map(share).collect(),
            sequences: sequences.len(),
        })
    }

    /// The package that the sequences are of.
    pub fn package(&self) -> &'static str {
        SEQUENCES.package
    }

    /// What the program makes of each share on the host, in a directory for it to work in.
    ///
    /// # Errors
    /// The program fails, or cannot be run.
    pub fn align_here(&self, directory: &Path) -> Result<Vec<Vec<u8>>, InputError> {
        let align = |(number, share): (usize, &String)| {
            let file = |kind: &str| directory.join(format!("{number}.{kind}"));
            let failed = |source| InputError::Io {
                what: "aligning on the host, in",
                path: directory.into(),
                source,
            };
            fs::write(file("fa"), share).map_err(failed)?;
            let [from, to, tree] = arguments(&file("fa"), &file("aln"), &file("dnd"));
            let mut command = Command::new(PROGRAM);
            command.args(["-align", &from, &to, &tree]);
            let ran = command.stdin(Stdio::null()).output().map_err(failed)?;
            ended_well(PROGRAM, &ran)?;
            let read = |kind| fs::read(file(kind)).map_err(failed);
            Ok([read("dnd")?, read("aln")?].concat())
        };
        self.shares.iter().enumerate().map(align).collect()
    }
}

/// Where the program reads from and writes to: the guide tree as well, which it would else put beside the input.
pub(super) fn arguments(from: &Path, to: &Path, tree: &Path) -> [String; 3] {
    [
        format!("-infile={}", from.display()),
        format!("-outfile={}", to.display()),
        format!("-newtree={}", tree.display()),
    ]
}

/// The program and the files without which it does not start, as ldd(1) finds them.
pub(super) fn files_of_program() -> Result<Vec<PathBuf>, InputError> {
    let ldd = Command::new("ldd").arg(PROGRAM).output();
    let ldd = ldd.map_err(|source| InputError::Io {
        what: "finding the libraries of",
        path: PROGRAM.into(),
        source,
    })?;
    ended_well("ldd", &ldd)?;
    let mut files = vec![PathBuf::from(PROGRAM)];
    files.extend(libraries(&String::from_utf8_lossy(&ldd.stdout)));
    Ok(files)
}

/// Of lines such as `libm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn libraries(ldd: &str) -> impl Iterator<Item = PathBuf> {
    ldd.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        words.find(|word| word.starts_with('/')).map(PathBuf::from)
    })
}

pub(super) fn ended_well(program: &'static str, ran: &Output) -> Result<(), InputError> {
    if ran.status.success() {
        return Ok(());
    }
    let said = [&ran.stderr[..], &ran.stdout[..]].concat();
    let said = String::from_utf8_lossy(&said);
    Err(InputError::Failed {
        program,
        status: ran.status.to_string(),
        said: said.trim().lines().last().unwrap_or_default().to_owned(),
    })
}

/// Why there is nothing to align.
#[derive(Debug, Error)]
pub enum InputError {
    /// The program.
    #[error("cannot find {PROGRAM}; install it: apt-get install {PROGRAM_PACKAGE}")]
    NoProgram,
    /// The sequences.
    #[error(transparent)]
    Packaged(#[from] PackagedError),
    /// Shares would be too small.
    #[error("{clones} clones have too little to do: there is work for {most}")]
    TooManyClones {
        /// Asked for.
        clones: u32,
        /// With two sequences for each.
        most: usize,
    },
    /// A program of the host.
    #[error("{program} ended with {status}: {said}")]
    Failed {
        /// Which.
        program: &'static str,
        /// How.
        status: String,
        /// Its last line.
        said: String,
    },
    /// A file, or a program that could not be started.
    #[error("{what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sequence_is_in_one_share_and_shares_are_about_even() {
        let fasta: String = (0..11).map(|at| format!(">s{at} of\nAC\nGT\n")).collect();
        let input = Input::split(&fasta, 3).unwrap();
        assert_eq!(input.sequences, 11);
        assert_eq!(input.shares.concat(), fasta);
        let counts: Vec<usize> = input
            .shares
            .iter()
            .map(|share| share.matches('>').count())
            .collect();
        assert_eq!(counts, [4, 4, 3]);
    }

    #[test]
    fn clones_that_would_have_nothing_to_align_are_refused() {
        let fasta = ">a\nAC\n>b\nAC\n>c\nAC\n";
        let refused = Input::split(fasta, 2).unwrap_err();
        assert!(matches!(
            refused,
            InputError::TooManyClones { clones: 2, most: 1 }
        ));
    }

    #[test]
    fn libraries_and_the_loader_are_found_where_ldd_names_them() {
        let said = "\tlinux-vdso.so.1 (0x00007f)\n\tlibm.so.6 => /lib/libm.so.6 (0x00007f)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        let found: Vec<PathBuf> = libraries(said).collect();
        assert_eq!(
            found,
            [
                PathBuf::from("/lib/libm.so.6"),
                "/lib64/ld-linux-x86-64.so.2".into()
            ]
        );
    }
}
