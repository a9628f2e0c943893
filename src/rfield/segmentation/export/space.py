"""The folder of a Space of the Hugging Face Hub: the page of `rfield show` for one run, in a container."""

from pathlib import Path
from typing import Any

import yaml

from rfield import __version__
from rfield.segmentation.export.hub import share_run
from rfield.segmentation.files.atomic import write_json, write_text
from rfield.segmentation.files.untrusted import read_json
from rfield.segmentation.runs import SEARCH_WEIGHTS, load_run

_DOCKERFILE = """\
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
USER user
ENV PATH=/home/user/.local/bin:$PATH
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --no-cache-dir --user --requirement requirements.txt
COPY --chown=user . .
EXPOSE 7860
CMD ["rfield", "show", "shown", "--host", "0.0.0.0", "--port", "7860"]
"""
# The first line keeps the container small: torch for the CPU alone.
_REQUIREMENTS = f"--extra-index-url https://download.pytorch.org/whl/cpu\nrfield[all]=={__version__}\n"
_TEXT = """\
The page of `rfield show` for a network of rfield: move the dilations and watch the labels, click a pixel to see what it
sees. Uploaded images stay in the container's memory and are gone when it stops.

- `shown`: the network of the page, with its learned layers ({weights})
- `network`: the same network, fused, for `rfield predict`

`rfield show shown` starts the same page on your own machine.
"""


def share_space(run_folder: str | Path, out: str | Path, checkpoint: str = "last", repo_id: str = "USER/NAME") -> None:
    """Write the folder of a Space. It holds no paths of the run's config, and no data.

    Args:
        run_folder: a run folder of `rfield train`.
        out: the folder for the files.
        checkpoint: `last` or `best`.
        repo_id: the Space's name on the Hub, for its title.

    Raises:
        FileNotFoundError, ValueError: as `share_run` does.
    """
    out, searched = Path(out), (Path(run_folder) / SEARCH_WEIGHTS).is_file()
    (out / "network").mkdir(parents=True, exist_ok=True)
    share_run(run_folder, out / "network", checkpoint, repo_id)
    run = load_run(run_folder, checkpoint, search_weights=searched)
    notes = {
        "class_names": run.class_names,
        "palette": run.palette,
        "size": run.size,
        "freeze_backbone": run.config.model.freeze_backbone,
        "search_weights": searched,
    }
    run.network.save_pretrained(out / "shown", config=notes)
    write_json(out / "shown/metrics.json", _curves(run.folder))
    title = repo_id.rpartition("/")[2]
    front = {"title": title, "sdk": "docker", "app_port": 7860, "tags": ["rfield", "semantic-segmentation"]}
    weights = "the weights of its search, for all dilations" if searched else "its final weights"
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    write_text(out / "README.md", f"---\n{head}---\n\n# {title}\n\n{_TEXT.format(weights=weights)}")
    write_text(out / "Dockerfile", _DOCKERFILE)
    write_text(out / "requirements.txt", _REQUIREMENTS)


def _curves(folder: Path) -> dict[str, Any]:
    """Return the held-out curves of a run's metrics, without the names of its images."""
    try:
        search = read_json(folder / "metrics.json")["search"]
        factors = search.get("factors", [{"path": 0, "axis": "height", **search}])
        kept = [{key: each[key] for key in ("path", "axis", "readings")} for each in factors]
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return {}
    return {"search": {"factors": kept}}
