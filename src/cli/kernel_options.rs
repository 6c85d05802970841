//! Options of every command that boots a kernel: which one, with what, from what root file system.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, ValueEnum};
use forkvm::ConsoleDevice;
use forkvm::vmm::boot::Payload;
use forkvm_linux_image::{Cache, Image};

use super::disk_option::DiskOption;
use super::errors::Usage;

/// What is booted where nobody says what.
const DEFAULT_IMAGE: &str = "minimal";

/// Name of the root file system's disk.
const ROOT: &str = "root";

/// See the module's text.
#[derive(Debug, Args)]
pub(crate) struct KernelOptions {
    /// Boot an image that `forkvm image build` made, such as `minimal`
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    image: Option<String>,
    /// Boot an ELF executable or a Linux bzImage
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk of the kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Disk with the root file system, /dev/vda in the guest: `root=/dev/vda` is added to the command line, and an
    /// image boots without its initramfs
    #[arg(long, value_name = "FILE[,ro][,overlay]")]
    rootfs: Option<DiskOption>,
    /// Command line of the guest [default: the image's]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// More of it, behind the image's
    #[arg(long, value_name = "TEXT", conflicts_with = "cmdline")]
    append: Option<String>,
    /// What the guest's console is: `virtio` adds `console=hvc0` to the command line; the serial port is there as well
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t)]
    console: ConsoleOption,
}

/// A machine's console, as people choose it.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
enum ConsoleOption {
    #[default]
    Serial,
    Virtio,
}

/// What is booted.
pub(crate) struct Kernel {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) cmdline: String,
    /// The first disk.
    pub(crate) root: Option<DiskOption>,
    pub(crate) console: ConsoleDevice,
}

impl KernelOptions {
    /// The command line, as it was given.
    pub(crate) fn cmdline(&self) -> &str {
        self.cmdline.as_deref().unwrap_or_default()
    }

    /// What the options name; the image `minimal` where they name no kernel.
    pub(crate) fn find(&self) -> anyhow::Result<Kernel> {
        let mut found = match &self.kernel {
            Some(kernel) => Kernel {
                kernel: kernel.clone(),
                initrd: self.initrd.clone(),
                cmdline: String::new(),
                root: None,
                console: ConsoleDevice::Serial,
            },
            None => {
                let image = find_image(self.image.as_deref().unwrap_or(DEFAULT_IMAGE))?;
                Kernel {
                    kernel: image.vmlinux(),
                    initrd: self.rootfs.is_none().then(|| image.initramfs()),
                    cmdline: image.cmdline().to_owned(),
                    root: None,
                    console: ConsoleDevice::Serial,
                }
            }
        };
        if let Some(cmdline) = &self.cmdline {
            found.cmdline.clone_from(cmdline);
        }
        add(
            &mut found.cmdline,
            self.append.as_deref().unwrap_or_default(),
        );
        if let ConsoleOption::Virtio = self.console {
            found.console = ConsoleDevice::Virtio;
            add(&mut found.cmdline, "console=hvc0");
        }
        if let Some(rootfs) = &self.rootfs {
            if has_root(&found.cmdline) {
                let text = "--rootfs and a `root=` on the command line: the guest can have one of them only";
                return Err(Usage(text.into()).into());
            }
            let access = if rootfs.is_read_only() { "ro" } else { "rw" };
            add(&mut found.cmdline, &format!("root=/dev/vda {access}"));
            found.root = Some(rootfs.clone().named(ROOT));
        }
        Ok(found)
    }
}

impl Kernel {
    pub(crate) fn payload(&self) -> Payload {
        Payload::Kernel {
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
        }
    }

    /// All disks of the machine: that of the root file system, and `others`.
    pub(crate) fn disks(&self, others: &[DiskOption]) -> Vec<DiskOption> {
        self.root.iter().chain(others).cloned().collect()
    }
}

/// The image of that name that was used last.
fn find_image(name: &str) -> anyhow::Result<Image> {
    let found = Cache::of_user()?.newest(name)?;
    found.with_context(|| format!("there is no image {name}: `forkvm image build {name}` makes it"))
}

fn has_root(cmdline: &str) -> bool {
    cmdline
        .split_whitespace()
        .any(|word| word.starts_with("root="))
}

fn add(cmdline: &mut String, words: &str) {
    if !words.is_empty() && !cmdline.is_empty() {
        cmdline.push(' ');
    }
    cmdline.push_str(words);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(rootfs: Option<&str>, cmdline: Option<&str>) -> KernelOptions {
        KernelOptions {
            image: None,
            kernel: Some("vmlinux".into()),
            initrd: None,
            rootfs: rootfs.map(|text| text.parse().unwrap()),
            cmdline: cmdline.map(Into::into),
            append: None,
            console: ConsoleOption::Serial,
        }
    }

    #[test]
    fn a_root_file_system_is_the_first_disk_and_the_guest_is_told_so() {
        let given = options(Some("root.img,overlay"), Some("console=ttyS0"));
        let kernel = given.find().unwrap();
        assert_eq!(kernel.cmdline, "console=ttyS0 root=/dev/vda rw");
        let other: DiskOption = "data.img".parse().unwrap();
        let disks = kernel.disks(&[other]);
        let paths: Vec<_> = disks.iter().map(DiskOption::path).collect();
        assert_eq!(paths, [PathBuf::from("root.img"), "data.img".into()]);
        let read_only = options(Some("root.img,ro"), None).find().unwrap();
        assert_eq!(read_only.cmdline, "root=/dev/vda ro");
    }

    #[test]
    fn two_roots_are_refused() {
        let given = options(Some("root.img"), Some("quiet root=/dev/vdb"));
        let refused = given.find().err().unwrap();
        assert!(refused.is::<Usage>(), "{refused}");
        let named = options(None, Some("root=/dev/vdb")).find();
        assert_eq!(named.unwrap().cmdline, "root=/dev/vdb");
    }
}
