"""Draw the pictures of the page in README and docs: `python studies/show/stills.py runs/demo --out docs/images`.

The run is that of `rfield demo`. Chromium opens the page at several dilations, moves nothing by hand, and is captured.
"""

import argparse
import threading
from pathlib import Path

import uvicorn
from playwright.sync_api import sync_playwright

from rfield.segmentation.web.show import bind, open_pictures
from rfield.segmentation.web.show_app import make_app
from rfield.segmentation.web.show_viewer import open_viewer

# Each still: the link's query and the width in px. Height follows the page.
STILLS = {
    "show_narrow": ("image=val-0&view=labels&dilations=1", 1200),
    "show_learned": ("image=val-0&view=labels", 1200),
    "show_field": ("image=val-0&view=field&dilations=1&x=96&y=107&share=0.95", 1200),
    "show_phone": ("image=val-0&view=labels&dilations=1", 390),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--chromium", default="/usr/bin/chromium", help="the browser")
    options = parser.parse_args()
    viewer = open_viewer(options.run, None, "last")
    viewer.title = Path(options.run).name
    listener = bind("127.0.0.1", 0)
    app = make_app([viewer], open_pictures([viewer], None, None), ["127.0.0.1"])
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.chromium)
            for name, (query, width) in STILLS.items():
                page = browser.new_page(viewport={"width": width, "height": 760})
                page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/?{query}")
                ready = (
                    "state.models.length && state.models.every((m) => m.labels && !m.busy && (!state.pixel || m.field))"
                )
                while not page.evaluate(ready):
                    page.wait_for_timeout(50)
                page.wait_for_timeout(300)
                page.screenshot(path=options.out / f"{name}.jpg", type="jpeg", quality=82)
                page.close()
            browser.close()
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    main()
