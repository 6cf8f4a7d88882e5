"""The residual stream of every token between two layer groups: in RAM, or in two files on disk.

`read` and `write` take slices of the token table's rows. On disk one file is read while the other is written, and
`turn` exchanges them, so that a group never overwrites what it was made from. The store can hold several named
per-token tensors; today there is one, "residual". It does not know layers, prompts or why a row is where it is.
"""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from .errors import StoreError

Tier = Literal["device", "ram", "disk"]


class Residual(Protocol):
    """``[rows, width]`` of each named tensor, in the model's dtype."""

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        """Fill ``out [rows, width]`` with what the group before wrote."""
        ...

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        """Keep ``values [rows, width]``; the caller may reuse them at once."""
        ...

    def turn(self) -> None:
        """All rows of a group are written: the next group reads them."""
        ...

    def close(self) -> None: ...


class InMemory:
    """On the device or in RAM. One tensor: a visit reads its rows before it writes them."""

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> None:
        self._tensors = {n: torch.empty(rows, width, dtype=dtype, device=device) for n, width in widths.items()}

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        out.copy_(self._tensors[name][rows])

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        self._tensors[name][rows].copy_(values)

    def turn(self) -> None:
        pass

    def close(self) -> None:
        self._tensors.clear()


class OnDisk:
    """Two files per tensor under ``folder``, removed by `close`."""

    def __init__(self, rows: int, widths: Mapping[str, int], dtype: torch.dtype, folder: Path) -> None:
        self._folder, self._dtype, self._widths = folder, dtype, dict(widths)
        self._reading = 0
        self._files: dict[tuple[str, int], int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, width in widths.items():
                for side in (0, 1):
                    fd = os.open(self._path(name, side), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                    self._files[name, side] = fd
                    os.posix_fallocate(fd, 0, max(1, rows * width * dtype.itemsize))
        except OSError as error:
            self.close()
            raise StoreError(f"cannot make the residual files in {folder}: {error}") from error

    def read(self, rows: slice, out: Tensor, name: str = "residual") -> None:
        fd, size = self._files[name, self._reading], self._widths[name] * self._dtype.itemsize
        host = out if out.device.type == "cpu" else torch.empty(out.shape, dtype=out.dtype)
        view = host.view(torch.uint8).numpy().data.cast("B")
        done = 0
        while done < len(view):
            got = os.preadv(fd, [view[done:]], rows.start * size + done)
            if got == 0:
                raise StoreError(f"the residual file in {self._folder} ends before row {rows.stop}: it was truncated")
            done += got
        if host is not out:
            out.copy_(host)

    def write(self, rows: slice, values: Tensor, name: str = "residual") -> None:
        fd, size = self._files[name, 1 - self._reading], self._widths[name] * self._dtype.itemsize
        view = values.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")
        done = 0
        try:
            while done < len(view):
                done += os.pwritev(fd, [view[done:]], rows.start * size + done)
        except OSError as error:
            raise StoreError(f"cannot write the residual stream to {self._folder}: {error}") from error

    def turn(self) -> None:
        self._reading = 1 - self._reading

    def close(self) -> None:
        for (name, side), fd in self._files.items():
            os.close(fd)
            self._path(name, side).unlink(missing_ok=True)
        self._files.clear()
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _path(self, name: str, side: int) -> Path:
        return self._folder / f"{name}.{'ab'[side]}"


def open_residual(
    tier: Tier, rows: int, widths: Mapping[str, int], dtype: torch.dtype, device: torch.device, folder: Path
) -> Residual:
    """The store of a tier for ``rows`` rows; ``folder`` is used by "disk" only and belongs to the store alone."""
    if tier == "disk":
        return OnDisk(rows, widths, dtype, folder)
    return InMemory(rows, widths, dtype, device if tier == "device" else torch.device("cpu"))
