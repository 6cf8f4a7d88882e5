"""Options of the suite: ``--device`` runs it somewhere else than on the CPU. Tiny checkpoints, made once."""

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

# Threads that wait by spinning take the processor from each other where more runs than there are cores: five times
# slower beside two other jobs. Read once, when torch is imported; no bit depends on it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

collect_ignore = [] if shutil.which("gcc") else ["faults/test_faults.py"]
"""What needs a compiler is not there where there is none."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="torch device that the sweeps of the suite run on")


class Conformance:
    """Says at the end what of the conformance grid was compared with Hugging Face, and what was deselected.

    Where workers share the suite, each of them deselects the same tests and tells the one that reports.
    """

    def __init__(self) -> None:
        self.equal, self.deselected, self.seen = 0, 0, (set[str](), set[str](), set[str]())

    @staticmethod
    def _is_ours(nodeid: str) -> bool:
        return "test_conformance.py::test_padded_has_the_bits" in nodeid

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        self.deselected += sum(self._is_ours(item.nodeid) for item in items)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["deselected"] = self.deselected

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.deselected = max(self.deselected, getattr(node, "workeroutput", {}).get("deselected", 0))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and self._is_ours(report.nodeid):
            from checkpoints import VARIANTS

            import archs

            name, dtype, _ = report.nodeid.partition("[")[2].rstrip("]").rsplit("-", 2)
            self.equal += 1
            for kind, value in zip(self.seen, (archs.family(VARIANTS[name].values).name, name, dtype), strict=True):
                kind.add(value)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.equal:
            families, variants, dtypes = map(len, self.seen)
            terminalreporter.write_line(
                f"conformance: {families} families, {variants} variants, {dtypes} dtypes: {self.equal} runs equal to "
                f"Hugging Face in every bit, {self.deselected} deselected (make test-full)"
            )


def pytest_collection_finish() -> None:
    """What the modules hold stays: no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Conformance())


@pytest.fixture(scope="session", autouse=True)
def _rates_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a run learns of the machine's speed is not kept for the user's own runs."""
    os.environ["FPWAP_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit after every visit."""
    from fpwap import commits

    monkeypatch.setattr(commits, "AT_RISK_S", 0.0)
    monkeypatch.setattr(commits, "SHARE", float("inf"))
