"""Start the page on which one moves the dilations of a network and sees its labels change: `rfield show`."""

import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence

import uvicorn

from rfield.segmentation.config.inspect import ShowConfig
from rfield.segmentation.data import ParsingDataset, load_dataset
from rfield.segmentation.web.show_app import make_app
from rfield.segmentation.web.show_pictures import Pictures
from rfield.segmentation.web.show_viewer import Viewer, open_viewer

_PORT = 7860


def run_show(config: ShowConfig) -> None:
    """Serve the page until it is interrupted.

    Raises:
        FileNotFoundError, ValueError: a network or the data cannot be opened, or the two work at different sizes.
        OSError: the port is taken, or there is no such address.
    """
    names = [config.run] if config.against is None else [config.run, config.against]
    viewers = [open_viewer(name, config.weights, config.checkpoint) for name in names]
    pictures = open_pictures(viewers, config.data, config.split)
    with bind(config.host, config.port) as listener:
        app = make_app(viewers, pictures, allowed_hosts(config.host))
        host, port = listener.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"the page is at http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
        if not is_loopback(host):
            print(
                f"warning: everybody who reaches this machine at {config.host} can use the page and upload images to "
                "it; without --host only this machine can",
                file=sys.stderr,
            )
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False))
        try:
            server.run(sockets=[listener])
        except KeyboardInterrupt:
            print("ended")


def open_pictures(viewers: Sequence[Viewer], data: str | None, split: str | None) -> Pictures:
    """Return the images to choose from: those of a data set, by default that of the first run.

    Without a run they are the images that the package ships. If a run's data set is no longer there, the page has
    uploads alone, and a line on stderr says why.

    Raises:
        FileNotFoundError, ValueError: `data` cannot be opened, or the runs work at different sizes.
    """
    runs = [viewer.run for viewer in viewers if viewer.run is not None]
    sizes = {run.size for run in runs}
    if len(sizes) > 1:
        raise ValueError(f"the two runs bring images to different sizes, {sizes}: they cannot be shown side by side")
    size = next(iter(sizes), None)
    own = runs[0].config.data if runs else None
    split = split or (own.val_split if own else "val")
    spec = data or (own.data if own else "scenes")
    dataset: ParsingDataset | None = None
    try:
        dataset = load_dataset(spec, split) if spec else None
    except (OSError, ValueError) as error:
        if data is not None:
            raise
        print(f"note: the page has uploads alone, since the run's data set cannot be opened: {error}", file=sys.stderr)
    return Pictures(dataset, split, size)


def bind(host: str, port: int | None) -> socket.socket:
    """Return a listening socket; without a port 7860, or a free one if that is taken.

    Raises:
        OSError: the port is taken, or there is no such address; says what to do.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, _PORT if port is None else port), family=family)
    except OSError as error:
        if port is None and error.errno == errno.EADDRINUSE:
            return bind(host, 0)
        at, reason = f"{host}, port {port or _PORT}", str(error.strerror).partition(" (while")[0].lower()
        raise OSError(f"the page cannot be served at {at}: {reason}; give another --host or --port") from error


def allowed_hosts(host: str) -> list[str] | None:
    """Return the names that a browser may use for a server on `host`; None for a server that is open to all.

    >>> allowed_hosts("127.0.0.1"), allowed_hosts("0.0.0.0")
    (['127.0.0.1', 'localhost'], None)
    """
    if is_loopback(host):
        return sorted({host, "127.0.0.1", "localhost"})
    return None if host in ("0.0.0.0", "::") or "SPACE_ID" in os.environ else [host, "127.0.0.1", "localhost"]


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a server on `host`.

    >>> is_loopback("localhost"), is_loopback("127.0.0.1"), is_loopback("192.168.0.2")
    (True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
