"""What this machine has: memory that may still be taken, free disk, its device. Nothing is allocated to find out."""

import contextlib
import ctypes
import gc
import mmap
import os
import re
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of glibc's `mallopt`."""
MAPPED, MOST_MAPPED = 2**25, 2**16
"""Bytes from which on glibc maps a block for itself once it has adapted to a process, and how many blocks at most."""


def available_memory() -> int:
    """Bytes of RAM that may be taken: the smaller of what the machine and this process's control groups have left."""
    return min([int(psutil.virtual_memory().available), *rooms()])


# --- control groups -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mount:
    """A mounted hierarchy that accounts for memory: version 1 or 2, its folder, and which group that folder shows."""

    version: int
    folder: Path
    root: PurePosixPath


LIMITS = {1: ("memory.limit_in_bytes",), 2: ("memory.max", "memory.high")}
"""The files with a group's limits, by version: above the lower one of the second, everything is slowed down."""
USAGE = {1: "memory.usage_in_bytes", 2: "memory.current"}
RECLAIMABLE = {1: ("total_inactive_file", "total_active_file"), 2: ("inactive_file", "active_file")}
"""What of ``memory.stat`` is page cache: the kernel takes it back before it refuses memory."""
UNLIMITED = 2**60
"""A version 1 group without a limit has one of about 2**63."""


def rooms(proc: Path = Path("/proc/self"), root: Path = Path("/")) -> list[int]:
    """Bytes left in each limited control group that this process is in, up to the root of what is mounted.

    root: put before the folders that ``proc`` names. What cannot be read limits nothing.
    """
    try:
        groups = own_groups((proc / "cgroup").read_text())
        mounts = memory_mounts((proc / "mountinfo").read_text())
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for mount in mounts:
        group = groups.get(mount.version)
        if group is not None:
            found += [_room(root / str(at).lstrip("/"), mount.version) for at in folders_of(mount, group)]
    return [room for room in found if room is not None]


def own_groups(text: str) -> dict[int, PurePosixPath]:
    """``/proc/self/cgroup`` -> version -> this process's group in the hierarchy that accounts for memory."""
    groups = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if not colon or not path.startswith("/"):
            continue
        if "memory" in controllers.split(","):
            groups[1] = PurePosixPath(path)
        elif number == "0" and not controllers:
            groups[2] = PurePosixPath(path)
    return groups


def memory_mounts(text: str) -> list[Mount]:
    """The control group mounts of ``/proc/self/mountinfo`` that may account for memory."""
    found = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, behind = before.split(" "), after.split(" ")
        if not dash or len(fields) < 5 or len(behind) < 3:
            continue
        folder, shown = Path(_unescaped(fields[4])), PurePosixPath(_unescaped(fields[3]))
        if behind[0] == "cgroup2":
            found.append(Mount(2, folder, shown))
        elif behind[0] == "cgroup" and "memory" in behind[2].split(","):
            found.append(Mount(1, folder, shown))
    return found


def folders_of(mount: Mount, group: PurePosixPath) -> list[Path]:
    """The folders of a group and its ancestors that a mount shows, the innermost first.

    A container may see a part of the hierarchy only, or its group under a name from outside: then the mount's own
    folder is all that can be said.
    """
    try:
        below = group.relative_to(mount.root)
    except ValueError:
        return [mount.folder]
    if ".." in below.parts:
        return [mount.folder]
    return [mount.folder.joinpath(*below.parts[:depth]) for depth in range(len(below.parts), -1, -1)]


def _unescaped(word: str) -> str:
    """Spaces and the like are octal in ``mountinfo``."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)


def _room(folder: Path, version: int) -> int | None:
    """Bytes left in one group; None if it has no limit, or none that can be read."""
    found = []
    for name in LIMITS[version]:
        with contextlib.suppress(OSError, UnicodeDecodeError):
            most, now = (folder / name).read_text().strip(), (folder / USAGE[version]).read_text().strip()
            if most.isdigit() and now.isdigit() and int(most) < UNLIMITED:
                found.append(min(int(most), max(0, int(most) - int(now) + _page_cache(folder, version))))
    return min(found, default=None)


def _page_cache(folder: Path, version: int) -> int:
    try:
        stat = (folder / "memory.stat").read_text()
    except OSError:
        return 0
    values = dict(line.split(" ", 1) for line in stat.splitlines() if " " in line)
    return sum(int(values[name]) for name in RECLAIMABLE[version] if values.get(name, "").isdigit())


# --- what this process takes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resident:
    """Bytes of this process in RAM: its own pages, pages of files, and the peak of both together."""

    own: int
    files: int
    peak: int


def resident(status: Path = Path("/proc/self/status")) -> Resident:
    """What this process takes now, and the most since it began or `reset_peak`; zeros where that cannot be known."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    except (OSError, UnicodeDecodeError):
        lines = {}

    def kilobytes(*names: str) -> int:
        words = (lines.get(name, "").split() for name in names)
        return 1024 * sum(int(found[0]) for found in words if found and found[0].isdigit())

    return Resident(kilobytes("RssAnon", "RssShmem"), kilobytes("RssFile"), kilobytes("VmHWM"))


def peak_memory() -> int:
    """The most RAM that this process has taken since it began, or since `reset_peak`, pages of files included."""
    return resident().peak


def reset_peak() -> bool:
    """Let `peak_memory` begin anew; False where that is not allowed."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def crowded() -> bool:
    """Whether others have kept the processors busy for the last minute, so that no time taken here means much."""
    return psutil.getloadavg()[0] > (os.cpu_count() or 1) + 1


# --- files ----------------------------------------------------------------------------------------------------------

WINDOW, WINDOWS, LOOKED_AT = 2**20, 32, 64
"""Bytes of a window of a file whose pages are looked at, windows of a file, and files, at most."""


def hot(files: Sequence[Path]) -> float:
    """The share of these files' pages that the page cache holds, by samples; 0 where it cannot be known."""
    step = max(1, len(files) // LOOKED_AT)
    held = seen = 0
    for path in files[::step]:
        try:
            there, looked = _cached_pages(path)
        except (OSError, ValueError):
            there, looked = 0, 1
        held, seen = held + there, seen + looked
    return held / seen if seen else 0.0


def _cached_pages(path: Path) -> tuple[int, int]:
    """Pages in the page cache, and pages looked at, in windows spread over the file. Nothing is read."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ctypes.c_ubyte)]
    held = seen = 0
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() and not os.access(path, os.W_OK, effective_ids=True):
            raise PermissionError(f"{path} is another user's: of its pages the kernel says that all are there")
        size = status.st_size
        for start in range(0, size, max(WINDOW, -(-size // WINDOWS // WINDOW) * WINDOW)):
            length = min(WINDOW, size - start)
            pages = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
            address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
            if address in (None, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
            try:
                if libc.mincore(address, length, pages):
                    raise OSError(ctypes.get_errno(), f"{path} cannot be looked at")
            finally:
                libc.munmap(address, length)
            held, seen = held + sum(page & 1 for page in pages), seen + len(pages)
    finally:
        os.close(fd)
    return held, seen


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def held_disk(folder: Path) -> int:
    """Bytes of the disk that files in ``folder`` and below take, links not followed."""
    found = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # gone meanwhile
                found += os.lstat(os.path.join(at, name)).st_blocks * 512
    return found


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto": the accelerator if there is one, else the CPU. Raises RuntimeError for a device that is not here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return found or torch.device("cpu")
    asked = torch.device(device)
    if asked.type not in ("cpu", found.type if found else "cpu"):
        here = f"this machine has cpu and {found.type}" if found else "this machine has only the cpu"
        raise RuntimeError(here)
    if asked.type != "cpu" and (asked.index or 0) >= (count := torch.accelerator.device_count()):
        raise RuntimeError(f"this machine has {count} of {asked.type}, counted from 0")
    return asked


def device_memory(device: torch.device) -> int:
    """Bytes free on the device; RAM for the CPU."""
    if device.type == "cpu":
        return available_memory()
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)


def most_files() -> int:
    """Files that this process may have open, if it asks for as many as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """While it lasts, the process may have as many files open as it is allowed to ask for: a visit to all layers has
    all their outputs open, and the usual limit is a thousand.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While it lasts, nothing looks for garbage in cycles: among a hundred thousand tensors' names, shapes and places
    that is a third of the time, and finds none.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def kept_pages(most: int = 2**30) -> Iterator[None]:
    """While it lasts, glibc keeps up to ``most`` bytes of freed memory, instead of giving pages back and faulting them
    in again at every operation (13 % of a sweep's time). It maps no block for itself, however large: those it would
    give back each time (of what lies between a 70B block's products that is half the time). Elsewhere than on glibc
    nothing is done.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, most)
    try:
        yield
    finally:
        libc.mallopt(MMAP_MAX, MOST_MAPPED)
        libc.mallopt(MMAP_THRESHOLD, MAPPED)
        libc.mallopt(TRIM_THRESHOLD, 2 * MAPPED)
        libc.malloc_trim(0)
