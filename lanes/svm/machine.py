"""One emulated AMD machine: starts QEMU, waits within a limit, reads the verdicts from its serial console.

A job without a verdict has no result here: whoever asks must count it as failed.
"""

import re
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

@dataclass(frozen=True)
class Verdict:
    """`vms` counts the VMs that the job created, by KVM's own uevents."""

    status: int
    seconds: float
    vms: int


@dataclass
class Outcome:
    """`verdicts` by job number; `deaf` jobs were run twice. `lost` says why the machine did not come to its end, or is empty."""

    kernel: str = "?"
    npt: str = "?"
    started: float = 0.0
    ended: float = 0.0
    complaints: int = 0
    lost: str = ""
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    deaf: list[int] = field(default_factory=list)


class Machines:
    """All running machines, so that none outlives the lane."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: list[str], limit_seconds: int, log: Path) -> bool:
        """Runs one QEMU, whose own messages go to `log`; false when it had to be ended at its limit."""
        with self._lock, log.open("wb") as messages:
            if self._stopped:
                return False
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
            self._running.add(process)
        try:
            process.wait(limit_seconds)
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            process.kill()
            process.wait()
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        """Ends every machine, and keeps new ones from starting."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()


def boot(
    machines: Machines, kernel: Path, initrd: Path, disk: Path, plan: str, npt: bool, cpus: int, lane: dict, out: Path
) -> Outcome:
    """Runs the plan of this name. Leaves in `out`: console.log, qemu.log, and what `split_logs` makes."""
    out.mkdir(parents=True)
    console, printed = out / "console.log", out / "printed.log"
    options = {
        "-machine": "q35",
        # With several threads QEMU 7.2 hangs on a stale translation of a patched jump label; the second core runs a second
        # machine instead.
        "-accel": "tcg,thread=single,tb-size=512",
        "-cpu": "EPYC,+svm,+npt",
        "-smp": str(cpus),
        "-m": str(lane["memory_mib"]),
        "-display": "none",
        "-serial": f"file:{console}",
        "-kernel": str(kernel),
        "-initrd": str(initrd),
        # loglevel: the kernel's lines would break the verdict lines. tsc: the clock would else be the slow hpet.
        "-append": "console=ttyS0 panic=-1 loglevel=3 tsc=reliable mitigations=off "
                   f"lane.npt={int(npt)} lane.plan={plan}",
    }
    command = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot"]
    command += [word for option in options.items() for word in option]
    # snapshot: all machines write to the one disk image, none sees the other's writes, and all are dropped at the end.
    command += ["-drive", f"file={disk},if=virtio,format=raw,snapshot=on"]
    command += ["-device", "virtio-serial", "-chardev", f"file,id=log,path={printed}", "-device", "virtserialport,chardev=log"]

    started = time.monotonic()
    in_time = machines.run(command, lane["machine_limit_seconds"], out / "qemu.log")
    outcome = read_console(console.read_text(errors="replace") if console.exists() else "")
    outcome.started, outcome.ended = started, time.monotonic()
    if not in_time:
        outcome.lost = f"no end after {lane['machine_limit_seconds']} s"
    split_logs(printed, out)
    return outcome


def split_logs(printed: Path, out: Path) -> None:
    """Cuts what came through the log port into a file per job, NUMBER.log, and the files of /lane/out under their names."""
    content = printed.read_bytes() if printed.exists() else b""
    pieces = re.split(rb"\n@@ LOG (\S+)\n", content)
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):
        file = name.decode()
        (out / (file if "." in file else f"{file}.log")).write_bytes(text)
    printed.unlink(missing_ok=True)


def read_console(text: str) -> Outcome:
    """The verdict lines that `init` printed."""
    outcome = Outcome(lost="the machine stopped by itself, see console.log")
    for line in text.splitlines():
        if up := re.match(r"@@ UP seconds=\S+ kernel=(\S+) npt=(\S+)", line):
            outcome.kernel, outcome.npt = up[1], up[2]
        elif job := re.match(r"@@ JOB (\d+) status=(\d+) from=([\d.]+) to=([\d.]+) vms=(\d+)", line):
            outcome.verdicts[int(job[1])] = Verdict(int(job[2]), float(job[4]) - float(job[3]), int(job[5]))
        elif deaf := re.match(r"@@ DEAF (\d+)", line):
            outcome.deaf.append(int(deaf[1]))
        elif lost := re.match(r"@@ LOST (.*)", line):
            outcome.lost = lost[1]
        elif end := re.match(r"@@ END seconds=\S+ complaints=(\d+)", line):
            outcome.complaints, outcome.lost = int(end[1]), ""
    return outcome
