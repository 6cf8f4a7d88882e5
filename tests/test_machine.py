"""What the machine has: control groups of both versions on invented trees, pages in memory, rates in their file."""

import contextlib
import dataclasses
import errno
import gc
import json
import mmap
import os
import string
from datetime import date
from pathlib import Path, PurePosixPath
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpwap import machine, rates
from fpwap.machine import Mount, folders_of, memory_mounts, own_groups, rooms
from fpwap.rates import Rates, Samples

CPU = torch.device("cpu")
GB = 10**9
V1 = "4:memory:/jobs/one\n3:cpuset:/\n0::/other\n"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "0::/user.slice/run.scope\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


# --- control groups -------------------------------------------------------------------------------------------------


def tree(root: Path, groups: str, mounts: str, files: dict[str, str]) -> list[int]:
    """`rooms` of an invented machine. files: path below its root -> content."""
    proc = root / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(mounts)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return rooms(proc, root)


def limits(folder: str, most: int | str, used: int, version: int, cached: int = 0) -> dict[str, str]:
    limit, usage = machine.LIMITS[version][0], machine.USAGE[version]
    inactive, active = machine.RECLAIMABLE[version]
    stat = f"anon 5\n{inactive} {cached // 2}\n{active} {cached - cached // 2}\n"
    return {f"{folder}/{limit}": f"{most}\n", f"{folder}/{usage}": f"{used}\n", f"{folder}/memory.stat": stat}


@pytest.mark.parametrize("version", [1, 2])
def test_every_group_up_to_the_root_limits(version: int, tmp_path: Path) -> None:
    groups, mounts = ((V1, V1_MOUNT), (V2, V2_MOUNT))[version - 1]
    base = ("sys/fs/cgroup/memory", "sys/fs/cgroup")[version - 1]
    outer, inner = (("jobs", "jobs/one"), ("user.slice", "user.slice/run.scope"))[version - 1]
    files = limits(f"{base}/{inner}", 4 * GB, GB, version) | limits(f"{base}/{outer}", 5 * GB, 3 * GB, version)
    files |= limits(base, 2**63 - 4096 if version == 1 else "max", GB, version)
    files |= limits(f"{base}/somebody", GB, GB, version)
    assert tree(tmp_path, groups, mounts, files) == [3 * GB, 2 * GB]


@pytest.mark.parametrize(("hard", "soft"), [("max", 2 * GB), (3 * GB, 2 * GB), (2 * GB, 3 * GB), (2 * GB, "max")])
def test_the_limit_above_which_a_group_is_slowed_down_counts(hard: int | str, soft: int | str, tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/user.slice"
    files = limits(folder, hard, GB, 2) | {f"{folder}/memory.high": f"{soft}\n"}
    assert tree(tmp_path, V2, V2_MOUNT, files) == [GB]


def test_a_device_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert machine.resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="has 2 of cuda, counted from 0"):
        machine.resolve_device("cuda:2")


@pytest.mark.parametrize("version", [1, 2])
def test_page_cache_counts_as_room(version: int, tmp_path: Path) -> None:
    groups, mounts = ((V1, V1_MOUNT), (V2, V2_MOUNT))[version - 1]
    folder = ("sys/fs/cgroup/memory/jobs/one", "sys/fs/cgroup/user.slice/run.scope")[version - 1]
    assert tree(tmp_path, groups, mounts, limits(folder, 2 * GB, 2 * GB, version, cached=GB)) == [GB]


def test_no_more_room_than_the_limit_and_not_less_than_none(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/user.slice/run.scope"
    files = limits(folder, GB, GB // 2, 2, cached=3 * GB) | limits("sys/fs/cgroup/user.slice", GB, 2 * GB, 2)
    assert tree(tmp_path, V2, V2_MOUNT, files) == [GB, 0]


def test_a_container_sees_its_own_part_of_the_tree(tmp_path: Path) -> None:
    mounts = "30 23 0:26 /docker/abc /sys/fs/cgroup ro - cgroup2 cgroup rw\n"
    files = limits("sys/fs/cgroup", GB, 0, 2) | limits("sys/fs/cgroup/job", GB // 2, 0, 2)
    assert tree(tmp_path, "0::/docker/abc/job\n", mounts, files) == [GB // 2, GB]


def test_a_group_named_from_outside_is_the_mounts_own(tmp_path: Path) -> None:
    assert folders_of(Mount(2, Path("/c"), PurePosixPath("/a")), PurePosixPath("/b/c")) == [Path("/c")]
    assert folders_of(Mount(2, Path("/c"), PurePosixPath("/")), PurePosixPath("/../b")) == [Path("/c")]


def test_a_machine_without_control_groups_limits_nothing(tmp_path: Path) -> None:
    assert rooms(tmp_path / "nothing") == []
    assert tree(tmp_path, V2, V2_MOUNT, {}) == []


def test_the_least_room_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine.available_memory()
    monkeypatch.setattr(machine, "rooms", lambda: [whole * 2, 12345])
    assert machine.available_memory() == 12345


words = st.text(st.sampled_from(string.ascii_letters + string.digits + " .-_:,\\/"), max_size=12)


@given(st.lists(words))
def test_parsers_take_any_text(lines: list[str]) -> None:
    text = "\n".join(lines)
    for mount in memory_mounts(text):
        assert mount.version in (1, 2)
    assert set(own_groups(text)) <= {1, 2}


names = st.text(st.sampled_from(string.ascii_letters + string.digits + ".-_"), min_size=1, max_size=8).filter(
    lambda name: name not in (".", "..")
)


@given(st.lists(names, max_size=4), st.lists(names, max_size=3), st.sampled_from([1, 2]))
def test_groups_and_mounts_are_found_again(below: list[str], above: list[str], version: int) -> None:
    """Whatever the group is called and wherever the hierarchy is mounted, spaces included."""
    folder, shown = "/my\\040mounts/" + "/".join(["x", *above]), "/" + "/".join(above)
    group = "/" + "/".join([*above, *below])
    line = f"0::{group}" if version == 2 else f"7:cpu,memory:{group}"
    kind = "cgroup2 none rw" if version == 2 else "cgroup none rw,memory,cpu"
    (mount,) = memory_mounts(
        f"1 2 0:3 {shown} {folder} rw shared:1 master:2 - {kind}\n9 9 0:1 / / rw - ext4 /dev/x rw\n"
    )
    assert mount == Mount(version, Path(folder.replace("\\040", " ")), PurePosixPath(shown))
    found = folders_of(mount, own_groups(f"1:name=systemd:/x\n{line}\n")[version])
    assert found[-1] == mount.folder
    assert found[0] == mount.folder.joinpath(*below)
    assert len(found) == len(below) + 1


# --- this process, and files ----------------------------------------------------------------------------------------


def test_the_peak_is_seen_and_may_begin_anew() -> None:
    before = machine.resident().own
    with mmap.mmap(-1, 50_000_000) as memory:  # never out of what the allocator keeps
        memory.write(os.urandom(1) * 50_000_000)
        assert machine.resident().own >= before + 45_000_000
    assert machine.peak_memory() >= before + 45_000_000
    if machine.reset_peak():
        assert machine.peak_memory() < before + 45_000_000 + machine.resident().files


def test_what_proc_does_not_say_is_zero(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t  12 kB\nRssFile:\tmany kB\n")
    assert machine.resident(tmp_path / "status") == machine.Resident(0, 0, 12 * 1024)
    assert machine.resident(tmp_path / "nothing") == machine.Resident(0, 0, 0)


def test_hot_files_are_told_from_cold_ones(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 16 * 2**20
    path.write_bytes(os.urandom(size))
    assert machine.hot([path]) == 1
    os.truncate(path, 2 * size)  # the second half is a hole that nobody has read
    half = machine.hot([path])
    assert half == 0.5
    assert machine.hot([path, tmp_path / "nothing"]) < half
    assert machine.hot([tmp_path / "nothing"]) == machine.hot([]) == 0
    (tmp_path / "empty").touch()
    assert machine.hot([tmp_path / "empty"]) == 0


def test_of_another_users_pages_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says of files that one neither owns nor may write that all pages are there."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**20))
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    monkeypatch.setattr(os, "access", lambda *asked, **more: False)
    assert machine.hot([path]) == 0
    monkeypatch.setattr(os, "access", lambda *asked, **more: True)
    assert machine.hot([path]) == 1


def test_nothing_is_collected_meanwhile_and_all_is_as_before() -> None:
    assert gc.isenabled()
    with contextlib.suppress(KeyError), machine.uncollected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with machine.uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_windows_begin_at_pages() -> None:
    assert machine.WINDOW % mmap.PAGESIZE == 0


# --- rates ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(rates.CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "rates.json"


def test_rates_are_kept_for_this_machine(cache: Path) -> None:
    plain = rates.load(CPU)
    assert plain == rates.conservative(CPU)
    assert plain.known("float32") == "conservative rates, not calibrated"
    found = plain.measured("float32", date(2026, 3, 4), matrix=7e10, disk_read=2e9)
    rates.save(found, CPU)
    assert rates.load(CPU) == found
    assert found.matrix == {**plain.matrix, "float32": 7e10}
    assert found.known("float32") == "compute calibrated on 2026-03-04, disk calibrated on 2026-03-04"
    assert found.known("bfloat16") == "disk calibrated on 2026-03-04, compute not calibrated"
    assert [path.name for path in cache.parent.iterdir()] == ["rates.json"]


def test_other_machines_rates_stay_and_are_not_taken(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = rates.conservative(CPU).measured("float32", date.today(), disk_read=3e9)
    rates.save(here, CPU)
    with monkeypatch.context() as patch:
        patch.setattr(rates, "_processor", lambda: "another")
        assert rates.load(CPU) == rates.conservative(CPU)
        rates.save(rates.conservative(CPU), CPU)
    assert rates.load(CPU) == here
    assert len(json.loads(cache.read_text())["machines"]) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("fpwap-rates", "other"),
        lambda text: text.replace('"format_version": 1', '"format_version": 2'),
        lambda text: text.replace('"disk_read": 3000000000.0', '"disk_read": "fast"'),
        lambda text: text.replace('"disk_read": 3000000000.0', '"disk_read": -1'),
        lambda text: text.replace('"disk_read": 3000000000.0', '"disk_read": NaN'),
        lambda text: text.replace('"disk_read": 3000000000.0', '"disk_read": true'),
        lambda text: text.replace('"disk_read": 3000000000.0', f'"disk_read": {10**400}'),
        lambda text: "[" * 10**5,
        lambda text: text.replace('"disk_read"', '"other"'),
        lambda text: "[]",
        lambda text: '{"format": "fpwap-rates", "format_version": 1, "machines": []}',
    ],
)
def test_a_file_that_makes_no_sense_is_ignored_and_replaced(change: object, cache: Path) -> None:
    found = rates.conservative(CPU).measured("float32", date.today(), disk_read=3e9)
    rates.save(found, CPU)
    cache.write_text(change(cache.read_text()))  # type: ignore[operator]
    assert rates.load(CPU) == rates.conservative(CPU)
    rates.save(found, CPU)
    assert rates.load(CPU) == found


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(rates.CACHE, str(tmp_path / "file"))
    rates.save(rates.conservative(CPU), CPU)
    assert rates.load(CPU) == rates.conservative(CPU)


def test_a_full_disk_leaves_the_cache_as_it_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates.save(rates.conservative(CPU), CPU)
    before = cache.read_text()
    monkeypatch.setattr("json.dump", Mock(side_effect=OSError(errno.ENOSPC, "full")))
    rates.save(rates.conservative(CPU).measured("float32", date.today(), disk_read=3e9), CPU)
    assert [(path, path.read_text()) for path in cache.parent.iterdir()] == [(cache, before)]


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(rates.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert rates.cache_file() == tmp_path / "fpwap" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert rates.cache_file() == tmp_path / "home" / ".cache" / "fpwap" / "rates.json"


def scaled(found: Rates, before: Rates) -> set[str]:
    return {f.name for f in dataclasses.fields(Rates) if getattr(found, f.name) != getattr(before, f.name)}


def test_a_run_corrects_what_it_has_seen_long_enough() -> None:
    before, today = rates.conservative(CPU), date(2026, 5, 6)
    assert before.corrected("float32", today, Samples()) is before
    short = Samples(forward_s=0.9, predicted_products_s=5, read=2**20, read_s=5)
    assert before.corrected("float32", today, short) is before

    slower = before.corrected("float32", today, Samples(forward_s=7, predicted_products_s=3, predicted_beside_s=1))
    assert scaled(slower, before) == {"matrix", "attention", "since"}
    assert slower.matrix["float32"] == before.matrix["float32"] / 2
    assert slower.matrix["bfloat16"] == before.matrix["bfloat16"]
    again = slower.corrected("float32", today, Samples(forward_s=6, predicted_products_s=24))
    assert again.matrix["float32"] == pytest.approx(before.matrix["float32"]), "a second sample counts in part"

    assert before.corrected("float32", today, Samples(forward_s=6)) is before, "no product was planned"
    beside = Samples(forward_s=6, predicted_products_s=3, predicted_beside_s=4)
    assert before.corrected("float32", today, beside) is before, "little of it was products"

    disk = before.corrected("float32", today, Samples(read=4 * GB, read_s=2))
    assert scaled(disk, before) == {"disk_read", "since"}
    assert disk.disk_read == pytest.approx(2 * GB)
