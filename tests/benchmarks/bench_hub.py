"""Hub to Hub through a Hub on this machine, beside download, local conversion and upload one after another.

    python -m tests.benchmarks.bench_hub --size-gb 2 --shards 8

Three scenes: plain LFS with the storage limited to 50 MB/s each way, LFS without a limit, Xet without a limit. In
each the plain client of huggingface_hub and `mso-hub` do the same work in turns. Exits with an error if a bound is
broken: time, memory, bytes on disk, or a source byte that was requested twice.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mso_hub.hub.devhub import DevHub, Request
from tests.benchmarks.runners import (
    GB,
    MB,
    ROOT,
    CommandFailed,
    Run,
    machine,
    make_checkpoint,
    measure,
    median_run,
    mso_hub,
    remove,
    table,
)

RSS = 1e9
DISK = 5e6
THROTTLED = 1.15
UNTHROTTLED = 0.85
HEADERS = 1 << 20
"""Bytes of a shard's header and the small files, at most."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One way to run the storage: bytes per second each way, 0 for no limit."""

    label: str
    xet: bool
    bandwidth: float
    rounds: int

    @property
    def limit(self) -> float:
        """Largest allowed ratio of our time to the plain client's."""
        return THROTTLED if self.bandwidth else UNTHROTTLED


@dataclass(frozen=True, slots=True)
class Outcome:
    """Medians of one scene."""

    scene: Scene
    down: Run
    local: Run
    up: Run
    ours: Run
    stored: int  # bytes by which the server's own store grew through our process (Xet writes it directly)
    twice: int  # source bytes that were requested more than once

    @property
    def reference(self) -> float:
        """Seconds of the slower transfer where the link is the limit, else of the three steps together."""
        if self.scene.bandwidth:
            return max(self.down.seconds, self.up.seconds)
        return self.down.seconds + self.local.seconds + self.up.seconds

    @property
    def ratio(self) -> float:
        """Our time over the reference."""
        return self.ours.seconds / self.reference

    @property
    def on_disk(self) -> int:
        """Bytes that our process wrote beside the server's store."""
        return max(0, self.ours.written - self.stored)

    @property
    def broken(self) -> list[str]:
        """Bounds that do not hold."""
        return [
            f"{self.scene.label}: {what} {found:.3g}, at most {bound:.3g}"
            for what, found, bound in (
                ("time ratio", self.ratio, self.scene.limit),
                ("peak RSS", self.ours.peak_rss, RSS),
                ("bytes on disk", self.on_disk, DISK),
                ("bytes requested twice", self.twice, 0),
            )
            if found > bound
        ]


def environment(hub: DevHub, scene: Scene, scratch: Path) -> Mapping[str, str]:
    """Settings of a client process, with a home of its own so that what it keeps can be counted and deleted."""
    scratch.mkdir(parents=True, exist_ok=True)
    return {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": hub.token(), "HF_HOME": str(scratch / "hf"),
        "XDG_CACHE_HOME": str(scratch / "cache"), "TMPDIR": str(scratch), "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_XET_TELEMETRY_ENABLED": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **({} if scene.xet else {"HF_HUB_DISABLE_XET": "1"}),
        "NUMBA_CACHE_DIR": str(scratch.parent / "kernels"),
    }  # fmt: skip


def requested_twice(log: Iterable[Request], repo: str) -> int:
    """Bytes of the repo's large files that more than one request asked for; headers are allowed once more."""
    ranges: dict[str, list[tuple[int, int]]] = {}
    for request in log:
        if request.origin == "storage" and request.method == "GET" and f"/{repo}/" in request.path and request.range:
            first, _, last = request.range.removeprefix("bytes=").partition("-")
            ranges.setdefault(request.path, []).append((int(first), int(last) + 1))
    twice: Counter[str] = Counter()
    for path, found in ranges.items():
        end = 0
        for begin, stop in sorted(found):
            twice[path] += max(0, min(end, stop) - max(begin, HEADERS))
            end = max(end, stop)
    return sum(twice.values())


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def link_or_copy(source: str, target: str) -> None:
    """Stored objects never change and may be linked; databases and settings do."""
    if source.endswith(".redb") or Path(source).stat().st_size < MB:
        shutil.copyfile(source, target)
    else:
        os.link(source, target)


@contextmanager
def serving(base: Path, scene: Scene) -> Iterator[DevHub]:
    """A Hub on a copy of a store, so that no contender finds another's work."""
    store = base.with_name("store")
    remove(store)
    shutil.copytree(base, store, copy_function=link_or_copy)
    with DevHub(store, xet=scene.xet) as hub:
        hub.set(bandwidth_down=scene.bandwidth, bandwidth_up=scene.bandwidth)
        yield hub
    remove(store)


def plain_round(scene: Scene, workdir: Path, more: Sequence[str]) -> tuple[Run, Run, Run]:
    """Download, convert, upload."""
    client, scratch = (sys.executable, "-m", "tests.benchmarks.plain_client"), workdir / "plain"
    copy, packed = scratch / "copy", scratch / "packed"
    with serving(workdir / "base", scene) as hub:
        settings = environment(hub, scene, scratch)
        down = measure((*client, "download", "dev/source", copy), settings)
        local = measure((mso_hub(), "quantize", "--input_dir", copy, "--output_dir", packed, *more), settings)
        up = measure((*client, "upload", "dev/target", packed), settings)
    remove(scratch)
    return down, local, up


def our_round(scene: Scene, workdir: Path, more: Sequence[str]) -> tuple[Run, int, int]:
    """(run, bytes that it put into the store itself, source bytes requested twice)."""
    scratch = workdir / "ours"
    with serving(workdir / "base", scene) as hub:
        before = size_of(workdir / "store")
        hub.log(clear=True)
        where = ("--input_dir", "hf://dev/source", "--output_dir", "hf://dev/target")
        run = measure((mso_hub(), "quantize", *where, *more), environment(hub, scene, scratch))
        stored = size_of(workdir / "store") - before if scene.xet else 0
        twice = requested_twice(hub.log(), "dev/source")
    remove(scratch)
    return run, stored, twice


def play(scene: Scene, source: Path, workdir: Path, more: Sequence[str]) -> Outcome:
    """All rounds of one scene, contenders in turns."""
    remove(workdir)
    workdir.mkdir(parents=True)
    with DevHub(workdir / "base", xet=scene.xet) as hub:
        client = (sys.executable, "-m", "tests.benchmarks.plain_client")
        measure((*client, "upload", "dev/source", source), environment(hub, scene, workdir / "setup"))
    plain, ours = [], []
    for _ in range(scene.rounds):
        plain.append(plain_round(scene, workdir, more))
        ours.append(our_round(scene, workdir, more))
    remove(workdir)
    down, local, up = (median_run(runs) for runs in zip(*plain, strict=True))
    stored, twice = max(stored for _, stored, _ in ours), max(twice for *_, twice in ours)
    return Outcome(scene, down, local, up, median_run(run for run, *_ in ours), stored, twice)


def main() -> None:
    """Measure, print the table, fail if a bound is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-gb", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="of the scenes without a limit")
    parser.add_argument("--bandwidth", type=float, default=50e6, help="bytes per second each way")
    parser.add_argument("--scenes", nargs="+", default=["slow", "lfs", "xet"], choices=["slow", "lfs", "xet"])
    parser.add_argument("--workdir", type=Path, default=ROOT / "bench-work")
    options = parser.parse_args()

    scenes = {
        "slow": Scene(f"LFS, {options.bandwidth / MB:.0f} MB/s", xet=False, bandwidth=options.bandwidth, rounds=1),
        "lfs": Scene("LFS, no limit", xet=False, bandwidth=0, rounds=options.rounds),
        "xet": Scene("Xet, no limit", xet=True, bandwidth=0, rounds=options.rounds),
    }
    workdir = options.workdir.absolute()
    source = workdir / f"hub-source-{options.size_gb:g}-{options.shards}"
    counts = make_checkpoint(source, "llama", options.shards, "--size-gb", str(options.size_gb))
    outcomes = [play(scenes[name], source, workdir / "hub", ("--all_linear", "--quiet")) for name in options.scenes]
    print(f"{counts['bytes'] / GB:.2f} GB of BF16 in {options.shards} shards -> NVFP4; {machine()}\n")
    titles = ("storage", "download s", "convert s", "upload s", "Hub to Hub s", "ratio", "limit", "RSS MB", "disk MB")
    print(table(titles, [
        (o.scene.label, *(f"{run.seconds:.1f}" for run in (o.down, o.local, o.up, o.ours)), f"{o.ratio:.2f}",
         f"{o.scene.limit:.2f}", f"{o.ours.peak_rss / MB:.0f}", f"{o.on_disk / MB:.1f}")
        for o in outcomes
    ]))  # fmt: skip
    print("\nratio: to the slower of download and upload where the link is limited, else to the sum of the three steps")
    print(f"source bytes requested twice: {max(o.twice for o in outcomes):,}")
    broken = [problem for outcome in outcomes for problem in outcome.broken]
    if broken:
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    try:
        main()
    except (CommandFailed, FileNotFoundError) as error:
        sys.exit(str(error))
