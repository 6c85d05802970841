"""What the lane runs: the tests of every crate that stands on KVM, one by one, and the demos.

Builds them with cargo and asks the test binaries for their tests. Knows nothing of machines or disks.
"""

import fnmatch
import json
import os
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path


class LaneError(Exception):
    """Something that keeps the lane from running at all; the message says what to do."""


@dataclass(frozen=True)
class Demo:
    """The main job in one way. Its JSON must say what `says` does and, with `fetches`, that clones fetched pages."""

    name: str
    options: str
    says: dict
    fetches: bool

    @property
    def id(self) -> str:
        """What FILTER is matched against."""
        return f"demo/{self.name}"

    @property
    def result(self) -> str:
        """The name of its JSON file."""
        return f"demo.{self.name}.json"


@dataclass(frozen=True)
class Job:
    """One command for a machine. `id` is `package/binary::test`, or `demo/NAME`."""

    id: str
    directory: Path
    environment: dict[str, str]
    program: list[str]
    limit_seconds: int
    demo: Demo | None = None

    def command(self, way: dict[str, str]) -> str:
        """`env` and not a shell assignment: names of variables may hold a hyphen."""
        environment = self.environment | way
        return shlex.join(["exec", "env", *(f"{name}={value}" for name, value in environment.items()), *self.program])


@dataclass(frozen=True)
class Jobs:
    """`programs` are all executables that the jobs may start; they must keep their paths in the machine."""

    jobs: list[Job]
    skipped: list[str]
    programs: list[Path]
    directories: list[Path]


# Where demos leave their JSON in the machine; its init hands out every file there.
RESULTS = "/lane/out"

# Tests may look for these: everything is about 50 times slower than on the host, so sizes must be small.
ENVIRONMENT = {"FORKVM_SVM_LANE": "1", "FORKVM_TEST_SCALE": "small", "RUST_BACKTRACE": "1"}


def collect(lane: dict, wanted: str) -> Jobs:
    """Builds the workspace that the current directory belongs to. `wanted` is a part of the ids to run, or empty."""
    metadata = json.loads(run_cargo("metadata", "--format-version=1"))
    packages = packages_on(metadata, lane["kvm_crate"])
    if not packages:
        raise LaneError(f"no crate of the workspace stands on {lane['kvm_crate']}: nothing to run")

    # The same selection of packages as `make test`, so that cargo finds everything built.
    built = artifacts(run_cargo("test", "--workspace", "--no-run", "--message-format=json"))
    release = artifacts(run_cargo("build", "--release", "--bin", "forkvm", "--message-format=json"))
    tests = [a for a in built if a["profile"]["test"] and a["package_id"] in packages]
    helpers = [a for a in built if not a["profile"]["test"] and a["package_id"] in packages]
    forkvm = release[-1]

    jobs, skipped = [], []
    patterns = {entry["tests"]: False for entry in lane.get("skip", [])}
    for artifact in tests:
        package = packages[artifact["package_id"]]
        for name, is_ignored in list_tests(artifact):
            job = test_job(artifact, package, name, helpers, lane["test_limit_seconds"])
            matching = [p for p in patterns if fnmatch.fnmatchcase(job.id, p)]
            patterns.update((p, True) for p in matching)
            if wanted not in job.id:
                continue
            if is_ignored or matching:
                skipped.append(job.id)
            else:
                jobs.append(job)
    unused = [p for p, used in patterns.items() if not used]
    if unused:
        raise LaneError(f"lane.toml skips {', '.join(unused)}, but no such test exists: remove the entry")
    demos = (Demo(**entry) for entry in lane["demo"])
    jobs += [demo_job(lane, demo, forkvm, Path(metadata["workspace_root"])) for demo in demos if wanted in demo.id]
    if not jobs:
        raise LaneError(f"no test and no demo has '{wanted}' in its name")

    programs = [Path(a["executable"]) for a in [*tests, *helpers, forkvm]]
    directories = [package["directory"] for package in packages.values()]
    # cargo promises integration tests a directory for scratch files.
    directories.append(Path(metadata["target_directory"], "tmp"))
    return Jobs(jobs, skipped, programs, directories)


def run_cargo(*arguments: str) -> str:
    """cargo's standard output; its progress goes to the terminal."""
    result = subprocess.run(["cargo", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode != 0:
        # With JSON messages the compiler's own words are in the messages.
        for line in result.stdout.splitlines():
            if line.startswith("{") and (rendered := (json.loads(line).get("message") or {}).get("rendered")):
                print(rendered, end="")
        raise LaneError(f"cargo {' '.join(arguments)} failed; its messages are above")
    return result.stdout


def packages_on(metadata: dict, crate: str) -> dict[str, dict]:
    """The members of the workspace with `crate` among their dependencies, at any depth: package id to name and directory."""
    known = {package["id"]: package for package in metadata["packages"]}
    depends_on = {node["id"]: node["dependencies"] for node in metadata["resolve"]["nodes"]}

    def reaches(start: str) -> bool:
        seen, todo = set(), [start]
        while todo:
            package = todo.pop()
            if known[package]["name"] == crate:
                return True
            if package not in seen:
                seen.add(package)
                todo.extend(depends_on[package])
        return False

    return {
        member: {"name": known[member]["name"], "directory": Path(known[member]["manifest_path"]).parent}
        for member in metadata["workspace_members"]
        if reaches(member)
    }


def artifacts(messages: str) -> list[dict]:
    """The executables among cargo's JSON messages."""
    parsed = (json.loads(line) for line in messages.splitlines() if line.startswith("{"))
    return [m for m in parsed if m["reason"] == "compiler-artifact" and m["executable"]]


def list_tests(artifact: dict) -> list[tuple[str, bool]]:
    """(name, is ignored) of each test of a binary, in its own order."""

    def names(*options: str) -> list[str]:
        command = [artifact["executable"], "--list", "--format=terse", *options]
        listing = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return [line.removesuffix(": test") for line in listing.splitlines() if line.endswith(": test")]

    ignored = set(names("--ignored"))
    return [(name, name in ignored) for name in names()]


def test_job(artifact: dict, package: dict, name: str, helpers: list[dict], limit: int) -> Job:
    """One test in one process, as nextest does it: a crash or a hang has the name of one test."""
    environment = dict(ENVIRONMENT, CARGO_MANIFEST_DIR=str(package["directory"]))
    environment |= {f"CARGO_BIN_EXE_{helper['target']['name']}": helper["executable"] for helper in helpers}
    command = [artifact["executable"], "--exact", name, "--nocapture", "--test-threads=1"]
    return Job(
        id=f"{package['name']}/{artifact['target']['name']}::{name}",
        directory=package["directory"],
        environment=environment,
        program=command,
        limit_seconds=limit,
    )


def demo_job(lane: dict, demo: Demo, artifact: dict, root: Path) -> Job:
    """A demo, with the release build of forkvm first on PATH."""
    path = f"{os.path.dirname(artifact['executable'])}:/usr/bin:/bin"
    command = f"{lane['main_job']} {demo.options}".format(json=f"{RESULTS}/{demo.result}").split()
    return Job(
        id=demo.id,
        directory=root,
        environment=dict(ENVIRONMENT, PATH=path),
        program=command,
        limit_seconds=lane["demo_limit_seconds"],
        demo=demo,
    )


def ways_in_cell(lane: dict, jobs: list[Job], cell: int) -> dict[str, dict[str, str]]:
    """How each job is run in cell number `cell`, by its id. Those that can be run in several ways take turns: over as many cells as
    there are ways, each is run in every way."""
    ways = [entry["environment"] for entry in lane["way"]]
    # Sorted: cargo names the binaries in any order.
    turns = sorted(job.id for job in jobs if any(fnmatch.fnmatchcase(job.id, p) for p in lane["in_every_way"]))
    return {id: ways[(turn + cell) % len(ways)] for turn, id in enumerate(turns)}
