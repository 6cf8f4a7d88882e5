"""What is installed: the wheel holds both packages and nothing else, and a foreign ``archs`` is named."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from build import ProjectBuilder

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sdist -> wheel, as an installer would make it."""
    import tarfile

    folder = tmp_path_factory.mktemp("dist")
    sdist = Path(ProjectBuilder(ROOT).build("sdist", folder))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return Path(ProjectBuilder(folder / sdist.name.removesuffix(".tar.gz")).build("wheel", folder))


def test_wheel_holds_both_packages_the_demo_model_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"fpwap", "archs"}
    for name in ("fpwap/py.typed", "archs/py.typed", "archs/llama.py", "fpwap/demo_model/model.safetensors"):
        assert name in names
    tracked = subprocess.run(["git", "ls-files", "fpwap", "archs"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0 and tracked.stdout:
        packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
        assert packed >= {name for name in tracked.stdout.split() if (ROOT / name).exists()}


def test_wheel_works_where_only_it_is(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import fpwap, archs; print(fpwap.__file__, [f.name for f in archs.FAMILIES])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout.decode()
    assert "Llama" in done.stdout.decode()


def test_a_foreign_archs_is_named(tmp_path: Path) -> None:
    (tmp_path / "archs").mkdir()
    (tmp_path / "archs" / "__init__.py").write_text("")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", "import fpwap"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert str(tmp_path / "archs") in done.stderr
    assert "ImportError" in done.stderr


def test_import_is_quiet_and_does_not_wait_for_torch() -> None:
    code = "import sys, fpwap; assert 'torch' not in sys.modules; import fpwap.cli; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
