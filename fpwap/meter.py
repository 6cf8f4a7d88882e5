"""What a run really took: the most memory and disk it had at once, beside what its plan said.

Knows no part of a run, only the machine and the folder.
"""

from pathlib import Path

import torch

from . import machine

Peaks = dict[str, dict[str, int]]


class Meter:
    """Measures from its making on.

    RAM is resident memory beyond what the process had before, maps of the checkpoint included; a kernel that does not
    let its high-water mark be reset says nothing of a run that stayed below an earlier one.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self._device, self._folder = device, folder
        self._asked = machine.reset_peak()
        now = machine.resident()
        self._before = now.own + now.files
        self._device_before = 0
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
            self._device_before = torch.accelerator.memory_allocated(device)

    def peaks(self, *, memory: int, device: int, disk: int) -> Peaks:
        """name -> {"planned", "measured"}, bytes; asked while all files are there. The arguments are the plan's."""
        found = {"disk": (disk, sum(512 * path.stat().st_blocks for path in self._folder.rglob("*")))}
        if self._asked:
            found["memory"] = memory, max(0, machine.peak_memory() - self._before)
        if self._device.type != "cpu":
            measured = torch.accelerator.max_memory_allocated(self._device) - self._device_before
            found["device"] = device, measured
        return {name: {"planned": planned, "measured": measured} for name, (planned, measured) in found.items()}
