//! `--disk FILE[,ro][,overlay][,format=raw][,name=NAME]`.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use forkvm::devices::block::{Access, RawFile, RawFileError};
use forkvm::{DiskSource, DiskSpec};

use super::errors::Usage;

/// Longest name: virtio-blk's serial number has 20 bytes (virtio 1.2, 5.2.6).
const NAME_LEN: usize = 20;

/// A disk as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskOption {
    path: PathBuf,
    mode: Mode,
    name: Option<String>,
}

/// How the VM uses the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Write,
    ReadOnly,
    Overlay,
}

impl FromStr for DiskOption {
    type Err = String;

    /// A comma that belongs to a path or a name is doubled.
    fn from_str(text: &str) -> Result<DiskOption, String> {
        let mut fields = split(text).into_iter();
        let path = fields.next().filter(|path| !path.is_empty());
        let path = path
            .ok_or("a disk begins with the path of its file")?
            .into();
        let mut disk = DiskOption {
            path,
            mode: Mode::Write,
            name: None,
        };
        for field in fields {
            let mode = match field.as_str() {
                "ro" => Mode::ReadOnly,
                "overlay" => Mode::Overlay,
                "format=raw" => continue,
                other => {
                    disk.set(other)?;
                    continue;
                }
            };
            if disk.mode != Mode::Write && disk.mode != mode {
                return Err("ro and overlay exclude each other".into());
            }
            disk.mode = mode;
        }
        Ok(disk)
    }
}

impl DiskOption {
    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest may not write.
    pub(crate) fn is_read_only(&self) -> bool {
        self.mode == Mode::ReadOnly
    }

    /// The same, called `name` unless it has a name.
    pub(crate) fn named(self, name: &str) -> DiskOption {
        let name = self.name.unwrap_or_else(|| name.to_owned());
        DiskOption {
            name: Some(name),
            ..self
        }
    }

    /// Whether the guest's writes go to the file.
    pub(crate) fn is_written(&self) -> bool {
        self.mode == Mode::Write
    }

    fn set(&mut self, field: &str) -> Result<(), String> {
        match field.split_once('=') {
            Some(("name", name)) => {
                if name.is_empty() || name.len() > NAME_LEN || !name.bytes().all(is_plain) {
                    return Err(format!(
                        "{name:?} is no name of a disk: 1 to {NAME_LEN} letters, digits and .-_"
                    ));
                }
                self.name = Some(name.to_owned());
                Ok(())
            }
            Some(("format", format)) => Err(format!(
                "format {format:?} is not supported: a disk is raw, `format=raw`"
            )),
            _ => Err(format!(
                "unknown disk option {field:?}: ro, overlay, format=raw and name=NAME are (double \
                 a comma that belongs to the path)"
            )),
        }
    }

    fn open(&self, name: String) -> Result<DiskSpec, RawFileError> {
        let open = |access| Ok::<_, RawFileError>(Arc::new(RawFile::open(&self.path, access)?));
        let source = match self.mode {
            Mode::Write => DiskSource::Raw(open(Access::ReadWrite)?),
            Mode::ReadOnly => DiskSource::ReadOnly(open(Access::ReadOnly)?),
            Mode::Overlay => DiskSource::volatile(open(Access::ReadOnly)?),
        };
        Ok(DiskSpec { name, source })
    }
}

/// Opens the disks of a VM. One without a name is `d` and its number, from 0.
pub(crate) fn open_all(disks: &[DiskOption]) -> anyhow::Result<Vec<DiskSpec>> {
    let name = |(index, disk): (usize, &DiskOption)| {
        disk.name.clone().unwrap_or_else(|| format!("d{index}"))
    };
    let names: Vec<String> = disks.iter().enumerate().map(name).collect();
    let mut seen = HashSet::new();
    if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
        return Err(Usage(format!(
            "two disks are named {twice:?}: give one another name="
        ))
        .into());
    }
    let specs = disks.iter().zip(names).map(|(disk, name)| disk.open(name));
    Ok(specs.collect::<Result<_, _>>()?)
}

/// Letters that names of VMs and disks are made of: they become part of file names.
pub(crate) fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

/// Splits at single commas; a doubled one stands for itself.
fn split(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(letter) = letters.next() {
        if letter == ',' && letters.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(letter);
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<DiskOption, String> {
        text.parse()
    }

    #[test]
    fn a_disk_is_written_unless_told_otherwise() {
        let disk = parse("a.img,format=raw").unwrap();
        assert_eq!(
            disk,
            DiskOption {
                path: "a.img".into(),
                mode: Mode::Write,
                name: None
            }
        );
        assert_eq!(parse("a.img,ro").unwrap().mode, Mode::ReadOnly);
        assert_eq!(
            parse("a.img,overlay,name=data").unwrap().mode,
            Mode::Overlay
        );
    }

    #[test]
    fn a_doubled_comma_is_part_of_the_path() {
        assert_eq!(parse("a,,b.img,ro").unwrap().path, PathBuf::from("a,b.img"));
    }

    #[test]
    fn what_cannot_be_served_is_named() {
        assert!(parse("a,format=qcow2").unwrap_err().contains("qcow2"));
        assert!(parse("a,cache=none").unwrap_err().contains("cache=none"));
        assert!(parse("a,ro,overlay").unwrap_err().contains("exclude"));
        assert!(
            parse("a,name=much/too/clever")
                .unwrap_err()
                .contains("much/too/clever")
        );
        assert!(parse(",ro").unwrap_err().contains("path"));
    }
}
