"""How fast a machine is: what a plan's times are made of, kept per machine in the user's cache.

Before a machine was measured the rates are conservative ones, and every rate says which it is. They are measured by
`fpwap.calibrate` for the shapes of one plan (``fpwap plan --calibrate``) and corrected by every run that was long
enough to learn from (`Rates.corrected`). No decision that changes a bit depends on them.

A rate is of matrix products (flop/s, large ones), of attention (flop/s), of element-wise passes (bytes read and written
per second), of storage and of copies. Knows nothing of models, plans or files of weights.
"""

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch

FORMAT, FORMAT_VERSION = "fpwap-rates", 1
CACHE = "FPWAP_CACHE"
"""The environment variable that names the folder of ``rates.json``; else it is fpwap's in the user's cache."""
ENOUGH_S, ENOUGH_BYTES = 1.0, 2**26
"""What a sample must have taken, or moved, to be believed."""
MOSTLY = 0.5
"""The part of a run's maths that matrix products must have been, for it to tell their rate."""
TRUST = 0.5
"""Weight of a new sample against what was measured before."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one machine, all per second, and what single events take.

    matrix, attention (flop/s, a multiply-add counting two), passes (bytes read and written): by dtype. call_s: of one
    prompt's attention, beside its maths. commit_s: of one layer's commit, beside its bytes. disk_read, disk_write:
    past the page cache; cached: out of it. to_device, from_device: copies. since: name of a rate, or "name.dtype" ->
    "calibrated on DATE"; what is not in it is conservative.
    """

    matrix: Mapping[str, float]
    attention: Mapping[str, float]
    passes: Mapping[str, float]
    call_s: float
    commit_s: float
    disk_read: float = 1e9
    disk_write: float = 5e8
    cached: float = 4e9
    to_device: float = 1e10
    from_device: float = 1e10
    since: Mapping[str, str] = field(default_factory=dict)

    def known(self, dtype: str) -> str:
        """How far the rates that matter most, of maths in ``dtype`` and of reading, are measured: for a reader."""
        names = {"compute": f"matrix.{dtype}", "disk": "disk_read"}
        said = [f"{what} {self.since[name]}" for what, name in names.items() if name in self.since]
        missing = [what for what, name in names.items() if name not in self.since]
        if not said:
            return "conservative rates, not calibrated"
        return ", ".join(said + [f"{what} not calibrated" for what in missing])

    def measured(self, dtype: str, today: date, **found: float) -> "Rates":
        """These with what was measured in their place; matrix, attention and passes are of ``dtype``."""
        changes: dict[str, Any] = {}
        since = dict(self.since)
        for name, rate in found.items():
            by_dtype = name in ("matrix", "attention", "passes")
            changes[name] = {**getattr(self, name), dtype: rate} if by_dtype else rate
            since[f"{name}.{dtype}" if by_dtype else name] = f"calibrated on {today.isoformat()}"
        return replace(self, **changes, since=since)

    def corrected(self, dtype: str, today: date, samples: "Samples") -> "Rates":
        """These, drawn towards what a run has seen; what was too short, or is not to be believed, is left out."""
        found: dict[str, float] = {}
        products_s = samples.forward_s - samples.predicted_beside_s
        believed = samples.predicted_products_s > 0 and products_s >= MOSTLY * samples.forward_s
        if samples.forward_s >= ENOUGH_S and believed:
            factor = self._drawn(f"matrix.{dtype}", samples.predicted_products_s / products_s)
            for name in ("matrix", "attention"):
                found[name] = factor * getattr(self, name)[dtype]
        if samples.read >= ENOUGH_BYTES and samples.read_s >= ENOUGH_S / 10:
            factor = self._drawn("disk_read", samples.read / samples.read_s / self.disk_read)
            found["disk_read"] = factor * self.disk_read
        return self.measured(dtype, today, **found) if found else self

    def _drawn(self, name: str, factor: float) -> float:
        """The first sample is taken whole, a later one in part."""
        return float(factor ** (TRUST if name in self.since else 1.0))


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What a run has seen: seconds of maths and what its plan said of them, bytes and the seconds they took.

    predicted_products_s: of matrix products and attention; predicted_beside_s: of all else in the maths. Zero for what
    it cannot say; bytes out of the page cache are not the disk's.
    """

    forward_s: float = 0.0
    predicted_products_s: float = 0.0
    predicted_beside_s: float = 0.0
    read: int = 0
    read_s: float = 0.0


def conservative(device: torch.device) -> Rates:
    """Rates that most machines with such a device exceed."""
    if device.type == "cpu":
        matrix = {"bfloat16": 3e11, "float16": 3e10, "float32": 1.5e11}
        return Rates(
            matrix=matrix,
            attention={name: rate / 3 for name, rate in matrix.items()},
            passes=dict.fromkeys(matrix, 5e9),
            call_s=4e-5,
            commit_s=0.01,
        )
    every = ("bfloat16", "float16", "float32")
    return Rates(
        matrix=dict.fromkeys(every, 5e13),
        attention=dict.fromkeys(every, 1.5e13),
        passes=dict.fromkeys(every, 5e11),
        call_s=4e-5,
        commit_s=0.01,
    )


# --- the file -------------------------------------------------------------------------------------------------------

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError)
"""What reading one that is no file of rates may raise; RuntimeError if it is nested too deep."""


def cache_file() -> Path:
    """Where rates are kept."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named) / "rates.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fpwap" / "rates.json"


def machine_key(device: torch.device) -> str:
    """What of a machine its rates depend on, in one line."""
    name = "" if device.type == "cpu" else f", {_device_name(device)}"
    cores = psutil.cpu_count(logical=False) or 0
    return f"{_processor()}, {cores} cores, {torch.get_num_threads()} threads, torch {torch.__version__}{name}"


def load(device: torch.device) -> Rates:
    """The rates of this machine; conservative ones if there are none, or none that can be read."""
    plain = conservative(device)
    try:
        record = _read(cache_file())["machines"][machine_key(device)]
        found = {name: _checked(getattr(plain, name), record[name]) for name in asdict(plain) if name != "since"}
        since = {str(name): str(words) for name, words in record["since"].items()}
        return replace(plain, **found, since=since)
    except UNREADABLE:
        return plain


def save(rates: Rates, device: torch.device) -> None:
    """Keeps the rates for this machine, beside those of others. A cache that cannot be written is left as it is."""
    with contextlib.suppress(OSError, RuntimeError):
        path = cache_file()
        try:
            machines = _read(path)["machines"]
        except UNREADABLE:
            machines = {}
        record = {"format": FORMAT, "format_version": FORMAT_VERSION, "machines": machines}
        record["machines"] = {**machines, machine_key(device): asdict(rates)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".rates.", delete=False) as file:
            try:
                json.dump(record, file, indent=1)
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise


def _read(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_text())
    if record["format"] != FORMAT or record["format_version"] != FORMAT_VERSION:
        raise ValueError(f"{path} is not a file of rates that is known here")
    if not isinstance(record["machines"], dict):
        raise ValueError(f"{path} holds no machines")
    return dict(record)


def _checked(like: Any, value: Any) -> Any:
    """A stored rate, or a table of rates by dtype, of the kind of ``like``; all finite and positive."""
    if isinstance(like, Mapping):
        return {name: _checked(rate, value[name]) for name, rate in like.items()}
    rate = float(value)
    if isinstance(value, bool) or not 0 < rate < float("inf"):
        raise ValueError(f"{value!r} is not a rate")
    return rate


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def _device_name(device: torch.device) -> str:
    return str(torch.get_device_module(device).get_device_name(device))
