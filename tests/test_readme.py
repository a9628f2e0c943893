"""Every Python block of the README and the docs runs; every command is parsed, and many run on a tiny training.

The docs' reference pages name every command and every public name, and no page links to nothing.
"""

import doctest
import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import huggingface_hub
import PIL.Image
import pytest

import rfield
import rfield.segmentation
from rfield.segmentation.cli import COMMANDS, main, parse
from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.training import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
REPORTS = (ROOT / "studies/reports/README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINKS = re.findall(r"\]\(([^)#]+)", README)


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str = README) -> list[list[str]]:
    lines = "\n".join(blocks("sh", text)).splitlines()
    return [shlex.split(line.partition(" > ")[0], comments=True)[1:] for line in lines if line.startswith("rfield ")]


def test_python_blocks_run_one_after_the_other() -> None:
    namespace: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert len(blocks("python")) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    # tests/test_examples.py runs those of adapt.md.
    [page for page in PAGES if blocks("python", page.read_text()) and page.name != "adapt.md"],
    ids=lambda page: page.name,
)
def test_python_blocks_of_the_docs_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in blocks("python", page.read_text()):
        block = block.replace("range(40)", "range(1)").replace("steps=120", "steps=4")  # of the tutorial
        block = block.replace("fcn_resnet50", "lraspp_mobilenet_v3_large").replace("model, 256", "model, 97")
        exec(compile(block, page.name, "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page.read_text())], ids=lambda page: page.name)
def test_commands_of_the_docs_are_parsed(page: Path) -> None:
    for words in commands(page.read_text()):
        parse([word for word in words if word != "\\"])


def test_no_page_needs_files_that_a_clone_lacks() -> None:
    # Studies need the data sets that they are about.
    needing = [page.stem for page in PAGES if "../shared" in page.read_text(encoding="utf-8")]
    assert needing == ["results"]
    assert "../shared" not in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_the_docs_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link, fragment in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", text):
        if not link.startswith("http"):
            target = page.parent / link if link else page
            assert target.exists(), link
            if fragment and target.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert fragment in [slug(heading) for heading in headings], f"{link}#{fragment}"


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_every_page_is_in_the_site_once() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert sorted(re.findall(r"(\w+\.md)", text)) == [page.name for page in PAGES]
    home = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    assert {page.name for page in PAGES} - set(re.findall(r"\((\w+\.md)", home)) == {"index.md"}


def module(name: str) -> ModuleType:
    """Return one of the documentation's scripts, whose doctests hold."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    assert doctest.testmod(found).failed == 0
    return found


def test_reference_pages_are_filled_with_every_name() -> None:
    hooks = module("hooks")
    filled = hooks.names()
    for face in (rfield, rfield.segmentation):
        for name in set(face.__all__) - {"__version__", "models"}:
            found = getattr(face, name)
            assert f"::: {found.__module__}.{found.__qualname__}\n" in filled
    shown = hooks.on_page_markdown((ROOT / "docs/commands.md").read_text(encoding="utf-8"), None, None, None)
    assert re.findall(r"^## rfield (.*)$", shown, re.MULTILINE) == list(COMMANDS)
    assert shown.count("Usage: ") + shown.count("usage: ") >= len(COMMANDS)
    assert "--search" in shown
    assert hooks.studies().count("\n## ") > 10


def test_commands_are_parsed() -> None:
    assert {words[0] for words in commands()} <= set(COMMANDS)
    assert len(commands()) >= 3
    for words in commands():
        parse(words)


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere(link: str) -> None:
    assert (Path(__file__).parents[1] / link).exists()


def test_the_two_set_up_commands_are_the_makefile_s() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(f"\n{target}: " in makefile for target in targets)


FROZEN = """```sh
rfield train --data voc:../shared/data/msrc21_voc --model largefov_vgg16 --weights ../shared/weights/vgg16_features_imagenet_fp16.pth --freeze-backbone --head-channels 128 --dilation 24 --search sampled --epochs 10 --seed 0 --out runs/msrc
rfield evaluate runs/msrc --split val
rfield predict runs/msrc ../shared/data/msrc21_voc/JPEGImages --out out
rfield fuse runs/msrc --out plain
```"""  # noqa: E501


@pytest.mark.shared
def test_commands_run_on_a_few_images_with_a_frozen_backbone(
    shared: Path, small_msrc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for words in commands(FROZEN):
        words = [
            word.replace("../shared/data/msrc21_voc", str(small_msrc)).replace("../shared", str(shared))
            for word in words
        ]
        if words[0] == "train":
            words[words.index("--epochs") + 1] = "2"
        main(words)
    shown = capsys.readouterr().out
    assert shown.count("mIoU") == 2
    assert len(list((tmp_path / "out").glob("*.png"))) == len(list((small_msrc / "JPEGImages").iterdir()))


@pytest.mark.slow
def test_commands_of_the_readme_and_the_tutorial_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "src"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    pages = [README, *((ROOT / f"docs/{name}.md").read_text() for name in ("training", "tutorial"))]
    done: list[list[str]] = []
    for words in (words for page in pages for words in commands(page)):
        # The tests of `inspect` measure larger networks; `show` serves a page until it is interrupted.
        if words[0] in ("inspect", "show") or words in done:
            continue
        done.append(words)
        if words[0] == "demo":  # trains like the config of scenes; its own tests run it
            shutil.copytree("runs/scenes", "runs/demo")
            continue
        main([*words, "--epochs", "1"] if words[0] == "train" else words)
    assert {words[0] for words in done} == {"train", "evaluate", "predict", "fuse", "demo", "export"}
    assert capsys.readouterr().out.count("mIoU") >= 5
    assert len(list((tmp_path / "out").glob("*.png"))) == 12


def test_the_notebook_is_the_tutorial_executed() -> None:
    notebook = module("notebook")
    cells = json.loads(notebook.NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    assert found == notebook.cells(notebook.PAGE.read_text(encoding="utf-8")), "run docs/notebook.py"
    shown = "".join("".join(output["text"]) for cell in cells for output in cell.get("outputs", []))
    assert "the search's verdict: clear" in shown
    assert not re.search(r"Error|Traceback|/home|/tmp|site-packages", shown)
    assert len(notebook.NOTEBOOK.read_bytes()) < 50_000


@pytest.mark.slow
def test_commands_on_shipping_run_as_written(
    make: Callable[..., TrainConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Hub:
        def create_repo(self, repo_id: str, **options: object) -> str:
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id: str, folder_path: Path, **options: object) -> None:
            shutil.copytree(folder_path, tmp_path / "hub" / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id: str(tmp_path / "hub" / repo_id))
    monkeypatch.chdir(tmp_path)
    train(make("runs/scenes", epochs=1))
    (tmp_path / "images").mkdir()
    PIL.Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "images/one.png")
    text = (ROOT / "docs/ship.md").read_text()
    assert [words[0] for words in commands(text)] == ["fuse", "export", "predict", "evaluate", "push", "predict"]
    # The run was trained on generated images of a few classes.
    mine = {"scenes": "data.yaml"}
    for words in commands(text):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        main([mine.get(word, word) for word in words])
        if words[0] == "predict":
            assert (tmp_path / "out/one.png").is_file()
    shown = capsys.readouterr().out
    assert "mIoU" in shown
    assert "the network is at https://hub/USER/NAME" in shown
    assert (tmp_path / "plain/model.safetensors").is_file()

    (inline,) = re.findall(r"`rfield (fuse [^`]+)`", (ROOT / "docs/adapt.md").read_text())
    words = shlex.split(inline.replace("RUN", "runs/scenes"))
    main([*words, "--data", "data.yaml", "--split", "val"])
    assert (tmp_path / "DIR/model.safetensors").is_file()
    assert capsys.readouterr().out.count("mIoU") >= 1


def test_the_tests_of_reported_faults_exist() -> None:
    path, found = "", 0
    for name in re.findall(r"[\w/]*test_\w+\.py(?:::\w+)*|(?<![\w.])(?:::\w+)+", REPORTS):
        path, *names = [name.partition("::")[0] or path, *name.split("::")[1:]]
        source = (ROOT / path).read_text()
        assert path.startswith("tests/"), path
        for each in names:
            assert re.search(rf"^ *(def|class) {each}\b", source, re.MULTILINE), f"{path}::{each}"
        found += 1
    assert found > 50
