"""Measure the page of `rfield show`: how long a move of a slider takes, and whether the server's memory stays flat.

`python studies/show/show.py --into studies/show` moves sliders in Chromium, from the event to the drawn labels, and
asks the server for 1,000 moves and 200 uploads. The weights are random: they do not change the times.
"""

import argparse
import io
import json
import platform
import statistics
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
import uvicorn
from playwright.sync_api import sync_playwright

from rfield.segmentation.config.train import TrainConfig
from rfield.segmentation.data import voc_palette
from rfield.segmentation.files.atomic import write_json
from rfield.segmentation.runs import Run, build_network
from rfield.segmentation.web.show import bind
from rfield.segmentation.web.show_app import make_app
from rfield.segmentation.web.show_pictures import Pictures
from rfield.segmentation.web.show_viewer import PathSlider, Viewer

SIZES = {"320x480": (320, 480), "512x1024": (512, 1024)}
NETWORKS: dict[str, dict[str, Any]] = {
    "EfficientNet-Lite0, 4 paths, 64 wide": {"model": "efficientnet_lite0", "paths": 4, "head_channels": 64},
    "LargeFOV VGG16, 1 path, 128 wide": {"model": "largefov_vgg16", "paths": 1, "head_channels": 128},
    "LargeFOV VGG16, 1 path, 1024 wide": {"model": "largefov_vgg16", "paths": 1, "head_channels": 1024},
}
CLASSES = 21


def make_viewer(options: dict[str, Any]) -> Viewer:
    torch.manual_seed(0)
    config = TrainConfig(data="synthetic", out="none", search="sampled", dilation=6, dropout=0.0, **options).resolved()
    network = build_network(config, CLASSES).eval()
    run = Run(Path("none"), config, tuple(f"class {index}" for index in range(CLASSES)), voc_palette(), network)
    sliders = [PathSlider(6.0, 1.0, 24.0, 1.0, [])] * config.model.paths
    return Viewer("network", network, "Random weights.", run, sliders)


class Server:
    """The page of one network in a thread."""

    def __init__(self, viewer: Viewer) -> None:
        self.pictures = Pictures(None, "val", None)
        listener = bind("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = make_app([viewer], self.pictures, ["127.0.0.1"])
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    def ask(self, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(self.address + path, data, method="GET" if data is None else "PUT")
        with urllib.request.urlopen(request) as answer:
            content: bytes = answer.read()
            return content

    def upload(self, size: tuple[int, int], seed: int) -> str:
        # Blocks of 16 px, as compressible as a photograph's labels, not noise.
        random = np.random.default_rng(seed).integers(0, 256, (-(-size[0] // 16), -(-size[1] // 16), 3), dtype=np.uint8)
        pixels = random.repeat(16, 0).repeat(16, 1)[: size[0], : size[1]]
        file = io.BytesIO()
        PIL.Image.fromarray(pixels).save(file, "PNG")
        return str(json.loads(self.ask("/upload?name=a.png", file.getvalue()))["key"])


MOVE = """async ([path, value]) => {
  const model = state.models[0];
  const begun = performance.now();
  const { range } = model.paths[path];
  range.value = value;
  range.oninput();
  while (model.busy) await new Promise((done) => setTimeout(done, 1));
  return [performance.now() - begun, model.milliseconds];
}"""


def measure_moves(browser: Any, viewer: Viewer, size: tuple[int, int], moves: int) -> dict[str, float]:
    """Return the milliseconds of a move, median and 95 %.

    In the browser: from the slider's event to the drawn labels. In the server: its computation. Processor: what the
    server's process used of it, in all threads, which other work on the machine does not change.
    """
    server = Server(viewer)
    try:
        key = server.upload(size, seed=0)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.goto(f"{server.address}/?image={key}")
        while not page.evaluate("state.models.length && state.models[0].labels && !state.models[0].busy"):
            page.wait_for_timeout(50)
        random = np.random.default_rng(1)
        taken = []
        for index in range(moves + 3):
            begun = time.process_time()
            whole, inside = page.evaluate(MOVE, [index % len(viewer.sliders), int(random.integers(1, 25))])
            taken.append((whole, inside, 1000 * (time.process_time() - begun)))
        page.close()
    finally:
        server.stop()
    result = {}
    for name, values in zip(("browser", "server", "processor"), zip(*taken[3:], strict=True), strict=True):
        result[f"{name}_median"] = round(statistics.median(values), 1)
        result[f"{name}_95"] = round(statistics.quantiles(values, n=20)[-1], 1)
    return result


def resident() -> float:
    """Return the memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096 / 2**20


def measure_memory(moves: int, uploads: int) -> dict[str, list[float]]:
    """Return the server's memory in MB: every 100 moves of one image, and every 20 uploads with a move and a field."""
    server = Server(make_viewer({"model": "small_cnn", "paths": 2, "head_channels": 32}))
    random = np.random.default_rng(0)
    found: dict[str, list[float]] = {"moves": [], "uploads": []}
    try:
        key = server.upload((160, 240), seed=0)
        for index in range(moves):
            dilations = ",".join(str(each) for each in random.integers(1, 25, 2))
            server.ask(f"/labels?image={key}&dilations={dilations}")
            if (index + 1) % (moves // 10) == 0:
                found["moves"].append(round(resident(), 1))
        for index in range(uploads):
            key = server.upload((160, 240), seed=index)
            server.ask(f"/labels?image={key}&dilations=3,6")
            server.ask(f"/field?image={key}&dilations=3,6&x={index}&y=7&share=0.95")
            if (index + 1) % (uploads // 10) == 0:
                found["uploads"].append(round(resident(), 1))
    finally:
        server.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, required=True, help="folder for show.json")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    parser.add_argument("--moves", type=int, default=50, help="moves for each network and size")
    options = parser.parse_args()
    memory = measure_memory(1000, 200)
    print(memory, flush=True)
    moves: dict[str, dict[str, dict[str, float]]] = {}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=options.chromium)
        for name, values in NETWORKS.items():
            viewer = make_viewer(values)
            moves[name] = {title: measure_moves(browser, viewer, size, options.moves) for title, size in SIZES.items()}
            print(name, moves[name], flush=True)
        browser.close()
    about = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    write_json(
        options.into / "show.json",
        {"moves_ms": moves, "memory_mb": memory, **about},
    )


if __name__ == "__main__":
    main()
