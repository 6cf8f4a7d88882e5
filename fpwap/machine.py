"""What this machine has: memory that may still be taken, free disk, its device. Nothing is allocated to find out."""

import contextlib
import ctypes
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),  # v2
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),  # v1
)

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""


def available_memory() -> int:
    """Bytes of RAM that may be taken: the smaller of what the machine and its control group have left."""
    free = [int(psutil.virtual_memory().available)]
    for limit, used in CGROUPS:
        try:
            most, now = Path(limit).read_text().strip(), Path(used).read_text().strip()
        except OSError:
            continue
        if most.isdigit() and now.isdigit():
            free.append(max(0, int(most) - int(now)))
    return min(free)


def free_disk(folder: Path) -> int:
    """Bytes free where ``folder`` is or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto": the accelerator if there is one, else the CPU. Raises RuntimeError for a device that is not here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return found or torch.device("cpu")
    asked = torch.device(device)
    if asked.type not in ("cpu", found.type if found else "cpu"):
        here = f"this machine has cpu and {found.type}" if found else "this machine has only the cpu"
        raise RuntimeError(here)
    return asked


def device_memory(device: torch.device) -> int:
    """Bytes free on the device; RAM for the CPU."""
    if device.type == "cpu":
        return available_memory()
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)


@contextlib.contextmanager
def kept_pages(most: int = 2**30) -> Iterator[None]:
    """While it lasts, glibc keeps up to ``most`` bytes of freed memory, instead of giving pages back and faulting them
    in again at every operation (13 % of a sweep's time). Elsewhere than on glibc it does nothing.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(MMAP_THRESHOLD, 2**25)  # the most that glibc takes; larger blocks are mapped one by one
        libc.mallopt(TRIM_THRESHOLD, most)
    try:
        yield
    finally:
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
