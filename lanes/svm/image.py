"""What a lane machine boots from: a kernel of Debian's, an initrd with KVM's modules, and a disk with the programs.

Nothing is installed on the host and nothing needs root. Knows nothing of what the programs are.
"""

import glob
import json
import lzma
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from jobs import Job, Jobs, LaneError

INIT = Path(__file__).with_name("init")
BUSYBOX = Path("/bin/busybox")

# What the machine needs beyond the kernel itself; the dependencies of each are found in the module.
MODULES = ["virtio_pci", "virtio_blk", "virtio_console", "kvm-amd"]

# Room on the disk for what tests and demo write. The image is sparse, and so are the machine's changes to it.
SPARE_MIB = 4096


@dataclass(frozen=True)
class Kernel:
    """An unpacked package `linux-image-…`."""

    directory: Path

    @property
    def image(self) -> Path:
        """The bzImage."""
        return next(self.directory.glob("boot/vmlinuz-*"))

    @property
    def modules(self) -> dict[str, Path]:
        """Every loadable module, by its file's name without .ko."""
        return {path.name.split(".")[0]: path for path in self.directory.rglob("*.ko*")}


def fetch_kernel(package: str, cache: Path) -> Kernel:
    """The kernel that a Debian meta-package stands for. Once in the cache it stays; delete the cache for a newer one."""
    directory = cache / package
    if not directory.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            archive = download(package, Path(scratch))
            unpacked = Path(scratch, "unpacked")
            subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
            unpacked.rename(directory)
    return Kernel(directory)


def download(package: str, directory: Path) -> Path:
    """The .deb of the newest kernel, by apt, whose lists are refreshed once when they are missing or old."""
    for attempt in range(2):
        listing = subprocess.run(["apt-cache", "depends", package], capture_output=True, text=True, check=False).stdout
        if dependency := re.search(r"Depends: (linux-image-\S+)", listing):
            # apt's own sandbox user may not write to our directory, and warns about it.
            command = ["apt-get", "-o", "APT::Sandbox::User=root", "-q=2", "download", dependency[1]]
            if subprocess.run(command, cwd=directory, check=False).returncode == 0:
                return next(directory.glob("*.deb"))
        if attempt == 0:
            subprocess.run(["apt-get", "update", "-q=2"], stdin=subprocess.DEVNULL, check=False)
    raise LaneError(f"apt has no package {package}: run 'apt-get update' as root, on Debian 12 with its security archive")


def make_initrd(kernel: Kernel, out: Path) -> None:
    """busybox, the modules in loading order, and `init`."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        for directory in ["bin", "modules", "proc", "sys", "dev", "disk"]:
            (root / directory).mkdir()
        shutil.copy(BUSYBOX, root / "bin/busybox")
        (root / "bin/sh").symlink_to("busybox")
        shutil.copy(INIT, root / "init")
        (root / "init").chmod(0o755)

        available, order = kernel.modules, {}

        def add(name: str) -> None:
            # Absent means built into this kernel.
            if name in order or name not in available:
                return
            path = available[name]
            content = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
            # .modinfo holds "depends=a,b", ended by a zero byte. Names there may spell a hyphen as an underscore.
            for needed in re.search(rb"\0depends=([^\0]*)\0", content)[1].decode().split(","):
                add(needed if needed in available else needed.replace("_", "-"))
            order[name] = content

        for module in MODULES:
            add(module)
        if "kvm-amd" not in order:
            raise LaneError(f"{kernel.directory} has no module kvm-amd: delete it and run the lane again")
        for name, content in order.items():
            (root / "modules" / f"{name}.ko").write_bytes(content)
        (root / "modules/order").write_text("".join(f"{name}\n" for name in order))

        names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
        with out.open("wb") as archive:
            subprocess.run(
                [BUSYBOX, "cpio", "-o", "-H", "newc"],
                input=names.encode(), stdout=archive, stderr=subprocess.DEVNULL, cwd=root, check=True,
            )


def make_disk(jobs: Jobs, plans: dict[str, list[tuple[Job, dict[str, str]]]], files: list[str], out: Path) -> None:
    """`plans` by their names, each job with the way to run it. A root file system in which every program has the path it has here: tests have such paths compiled in."""
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        root = Path(scratch)
        lay_out_system(root)
        for directory in jobs.directories:
            (root / directory.relative_to("/")).mkdir(parents=True, exist_ok=True)
            for data in (directory / "tests").rglob("*"):
                if data.is_file() and data.suffix != ".rs":
                    copy(data, root)
        for pattern in files:
            matches = glob.glob(pattern)
            if not matches:
                raise LaneError(f"lane.toml names {pattern}, which matches nothing: run 'make setup'")
            for match in matches:
                copy(Path(match), root)
        for program in jobs.programs:
            copy(program, root)
        # Numbers rather than ids: a job keeps its number in every cell, and its log needs a plain file name.
        numbers = {job.id: number for number, job in enumerate(jobs.jobs)}
        for name, plan in plans.items():
            lines = (f"{numbers[job.id]}\t{job.limit_seconds}\t{job.directory}\t{job.command(way)}\n" for job, way in plan)
            (root / f"lane/plan.{name}").write_text("".join(lines))

        used_kib = int(subprocess.run(["du", "-sk", root], capture_output=True, text=True, check=True).stdout.split()[0])
        out.unlink(missing_ok=True)
        subprocess.run(
            ["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", root, out,
             f"{used_kib // 1024 + SPARE_MIB}M"],
            stdout=subprocess.DEVNULL, check=True,
        )


def linux_files(word: Path) -> list[str]:
    """Patterns of the Linux image that `word`, the JSON of `forkvm image build`, is of; none where there is no such file."""
    try:
        directory = json.loads(word.read_text())["directory"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError) as error:
        raise LaneError(f"{word} does not say where the Linux image is ({error}): run 'make linux'") from error
    return [str(word), f"{directory}/*"]


def lay_out_system(root: Path) -> None:
    """Directories as in Debian 12, with busybox as every usual command."""
    for directory in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "lane/out", "proc", "sys", "dev", "tmp", "run", "etc"]:
        (root / directory).mkdir(parents=True)
    for merged in ["bin", "sbin", "lib", "lib64"]:
        (root / merged).symlink_to(f"usr/{merged}")
    shutil.copy(BUSYBOX, root / "bin/busybox")
    for command in subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, check=True).stdout.split():
        if command != "busybox":
            (root / "bin" / command).symlink_to("busybox")


def copy(source: Path, root: Path) -> None:
    """Copies one file to the same path below `root`; a program without its debug information, but with its libraries."""
    target = root / source.relative_to("/")
    if target.exists() and not target.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    with source.open("rb") as file:
        is_program = file.read(4) == b"\x7fELF"
    if not is_program:
        shutil.copy(source, target)
        return
    subprocess.run(["strip", "--strip-debug", "-o", target, source], check=True)
    # A static program has none, and makes ldd fail.
    listing = subprocess.run(["ldd", source], capture_output=True, text=True, check=False).stdout
    for library in re.findall(r"(/\S+) \(0x", listing):
        if not (root / library.lstrip("/")).exists():
            (root / library.lstrip("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library.lstrip("/"))
