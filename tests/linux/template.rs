//! The template: a Linux machine that stands where its agent has just answered. Its disk has an ext4 file system, which is not mounted.
//!
//! Whoever needs it first boots it, which takes a minute where KVM is software, while the others wait. It
//! stays in the target directory for tests of the same build.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use flate2::read::MultiGzDecoder;
use forkvm::agent::AgentClient;
use forkvm::devices::block::{Access, RawFile};
use forkvm::engine::Family;
use forkvm::engine::saved::SaveTo;
use forkvm::vmm::Kvm;
use forkvm::vmm::boot::Payload;
use forkvm::{BootSpec, ConsoleDevice, DiskSource, DiskSpec, End, FamilyConfig, VsockSpec};

use super::common::{Kept, as_tests_are_to_run};
use super::ext4;

/// How long a kernel may take to its agent's first answer, on a busy host whose KVM is software.
const BOOT: Duration = Duration::from_secs(400);

/// RAM of the machine in MiB.
pub(crate) const MEMORY_MIB: u64 = 64;

/// The image `minimal`, as `make linux` left it.
pub(crate) struct Image {
    pub(crate) directory: PathBuf,
    pub(crate) cmdline: String,
}

impl Image {
    pub(crate) fn find() -> Image {
        let path = target().join("linux.json");
        let text = fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("{}: {error}; `make linux` makes it", path.display());
        });
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        let text = |key: &str| found[key].as_str().expect(key).to_owned();
        Image {
            directory: text("directory").into(),
            cmdline: text("cmdline"),
        }
    }
}

/// The target directory.
fn target() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()
}

/// The directory of the template with `vcpus` vCPUs, which is made if it is not there.
pub(crate) fn template(vcpus: u32) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux");
    fs::create_dir_all(&folder).unwrap();
    let lock = File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    let image = Image::find();
    let directory = folder.join(format!("{}-{vcpus}", key(&image)));
    if !directory.exists() {
        remove_others(&folder, &key(&image));
        make_data_disk(&data_disk(&image));
        boot_and_save(&image, vcpus, &directory);
    }
    directory
}

/// Another build of the tests, or of the image, has another template.
fn key(image: &Image) -> String {
    let built = std::env::current_exe().unwrap().metadata().unwrap();
    let built = built.modified().unwrap().duration_since(UNIX_EPOCH);
    let name = image.directory.file_name().unwrap().to_str().unwrap();
    format!("{name}-{}", built.unwrap().as_nanos())
}

/// What is on the disk: real files to work on, and programs with their libraries.
pub(crate) fn data_folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux-data")
}

fn data_disk(image: &Image) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("linux");
    folder.join(format!("{}.img", key(image)))
}

/// Unless it is there.
fn make_data_disk(disk: &Path) {
    if disk.exists() {
        return;
    }
    let folder = data_folder();
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    fs::create_dir_all(&folder).unwrap();
    ext4::install("/usr/sbin/memtester", &folder);
    fs::write(folder.join("lambda.fa"), lambda()).unwrap();
    ext4::make(&folder, disk, 32);
}

/// The genome of the phage lambda, as the package bowtie2-examples brings it: packed or not.
fn lambda() -> Vec<u8> {
    let plain = Path::new("/usr/share/doc/bowtie2/examples/reference/lambda_virus.fa");
    fs::read(plain).unwrap_or_else(|_| {
        let packed = File::open(plain.with_extension("fa.gz")).unwrap();
        let mut bytes = Vec::new();
        MultiGzDecoder::new(packed).read_to_end(&mut bytes).unwrap();
        bytes
    })
}

fn remove_others(folder: &Path, key: &str) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with(key) || name == "lock" {
            continue;
        }
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
}

fn boot_and_save(image: &Image, vcpus: u32, directory: &Path) {
    let sockets = tempfile::tempdir().unwrap();
    let socket = sockets.path().join("vsock");
    let consoles = Kept::default();
    let config = FamilyConfig {
        consoles: Arc::new(consoles.clone()),
        saver: Some(Arc::new(SaveTo::new(directory))),
        vsock: Some(VsockSpec {
            path: socket.clone(),
        }),
        ..as_tests_are_to_run()
    };
    let family = Family::new(Arc::new(Kvm::open().unwrap()), config);
    let start = Instant::now();
    let vm = family
        .boot(BootSpec {
            name: "linux".into(),
            memory_mib: MEMORY_MIB,
            vcpus,
            disks: vec![DiskSpec {
                name: "data".into(),
                source: DiskSource::volatile(Arc::new(
                    RawFile::open(data_disk(image), Access::ReadOnly).unwrap(),
                )),
            }],
            payload: Payload::Kernel {
                kernel: image.directory.join("vmlinux"),
                initrd: Some(image.directory.join("initramfs.cpio")),
            },
            cmdline: format!("{} console=hvc0", image.cmdline),
            console: ConsoleDevice::Virtio,
        })
        .unwrap();
    if let Err(error) = AgentClient::connect(&socket, start + BOOT) {
        let end = vm.wait_for(Duration::ZERO).map(|finished| finished.end);
        let said = consoles.text();
        vm.kill();
        panic!("the agent does not answer: {error}\n{end:?}\n{said}");
    }
    println!("booted with {vcpus} vCPUs in {:?}", start.elapsed());
    vm.save().unwrap();
    assert_eq!(vm.wait().end, End::Saved);
}
