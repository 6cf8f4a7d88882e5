"""Options of the suite: ``--device`` runs it somewhere else than on the CPU. Tiny checkpoints, made once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Threads that wait by spinning take the processor from each other where more runs than there are cores: five times
# slower beside two other jobs. Read once, when torch is imported; no bit depends on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device that the sweeps of the suite run on")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    chosen: str = request.config.getoption("--device")
    return chosen


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `checkpoints.VARIANTS`, made at the first call; not for writing."""
    from checkpoints import VARIANTS, write  # brings transformers, which most tests do without

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write(VARIANTS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return folder
