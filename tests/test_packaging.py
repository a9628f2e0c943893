"""What is distributed: the wheel by itself, with torch alone; the environment report; the files that others read."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import rfield
from rfield.segmentation.cli import main
from rfield.segmentation.doctor import _OPTIONAL

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")

# Finds no third-party package but torch and what torch itself requires.
TORCH_ALONE = """
import importlib.metadata, re, sys
from importlib.machinery import PathFinder

def same(name):
    return re.sub("[-_.]+", "-", name).lower()

def required(name, found):
    if name not in found:
        found.add(name)
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            return found
        for line in lines:
            if "extra ==" not in line:
                required(same(re.match(r"[\\w.-]+", line)[0]), found)
    return found

packages = required("torch", set())
allowed = {"rfield", "torch", "torchgen", "functorch", *sys.stdlib_module_names}
for module, names in importlib.metadata.packages_distributions().items():
    if packages & set(map(same, names)):
        allowed.add(module)

class OfTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in allowed or name.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = OfTorch
"""

USE = """
import torch, rfield
assert "site-packages" in rfield.__file__, rfield.__file__
convs = [torch.nn.Conv2d(3, 4, 3, padding=4, dilation=4), torch.nn.Conv2d(4, 2, 1)]
model = torch.nn.Sequential(*convs)
rfield.adapt(model)
images = [(torch.rand(1, 3, 17, 17), torch.randint(2, (1, 17, 17))) for _ in range(4)]
loss = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
assert rfield.parameter_groups(model, lr=1e-3, factor_lr=1e-2)
search = rfield.SampledSearch(model, loss, 2, held_out=images[:2])
for batch in images[2:]:
    search.loss(batch).backward()
    search.step()
plain = rfield.fuse(model)
assert type(plain[0]) is torch.nn.Conv2d
field = rfield.theoretical_receptive_field(plain)
assert set(field) == {2.0 * plain[0].dilation[0] + 1}, field
assert rfield.effective_receptive_field(plain, torch.rand(1, 3, 17, 17)).shape == (17, 17)
for name, module in rfield._PUBLIC.items():
    if not module.startswith("rfield.segmentation"):
        assert getattr(rfield, name) is not None
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel that was built from the source archive, without the network."""
    folder = tmp_path_factory.mktemp("dist")
    build = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"
    command = [sys.executable, "-c", build]
    copy = folder / "tree"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("studies/", "tests/", "docs/")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, "build_sdist", str(folder)], cwd=copy, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    subprocess.run([*command, "build_wheel", str(folder)], cwd=source, check=True, capture_output=True)
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
@pytest.mark.processes
def test_the_wheel_works_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rfield/py.typed", "rfield/segmentation/data/scenes/LICENCE.txt"} <= set(names)
    assert not [name for name in names if not name.startswith(("rfield/", f"rfield-{rfield.__version__}.dist-info/"))]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    python = str(tmp_path / "env/bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    torch = importlib.metadata.distribution("torch").locate_file("")
    # After the wheel's own, so that an installed rfield beside torch is not the one that is found.
    (Path(site.stdout.strip()) / "torch.pth").write_text(f"{torch}\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = tmp_path / "use.py"
    script.write_text(TORCH_ALONE + USE, encoding="utf-8")
    used = subprocess.run([python, str(script)], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert used.returncode == 0, used.stderr


def test_doctor_names_versions_and_no_path(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(["doctor"])
    shown = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in shown.splitlines())
    assert lines["rfield"] == rfield.__version__
    assert lines["numpy"] == importlib.metadata.version("numpy")
    assert {"Python", "torch", "GPU", "processor", "OMP_NUM_THREADS"} <= set(lines)
    for private in (str(Path.home()), os.environ.get("USER"), sys.prefix, str(ROOT)):
        assert not private or private == "/root" or private not in shown
    assert not re.search(r"(/home|/root|/Users|site-packages)", shown)
    extras = PYPROJECT.partition("[project.optional-dependencies]")[2].partition("# The documentation's site")[0]
    assert set(_OPTIONAL) >= set(re.findall(r'"([\w-]+)(?:\[\w+\])?[><=!]', extras))


def test_citation_and_templates_are_in_step() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rfield.__version__
    assert f'version = "{rfield.__version__}"' in PYPROJECT
    assert citation["license"] in PYPROJECT
    for path in sorted((ROOT / ".github").rglob("*.yml")):
        assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict), path
    assert "rfield doctor" in (ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text(encoding="utf-8")
    assert "run: .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
