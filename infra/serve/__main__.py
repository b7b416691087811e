"""Serves a model on Ray Serve: image files in, class names and probabilities out, in batches.

    python -m infra.serve [--model MODEL] [--port 8000] [--replicas 1]
    curl --data-binary @digit.png http://127.0.0.1:8000/

Each request is one image file; requests that arrive together are one batch of the model. RCNN_... variables say where the
registry and the cluster are. The server listens on loopback; to reach it from elsewhere, put a proxy with TLS and a login in
front of it.
"""

import argparse
import os
import signal
import sys
import threading

from infra.serve.app import start
from rcnn.errors import RcnnError
from rcnn.evaluate.batch_predict import read_model_files
from rcnn.progress import say, show_on_screen
from rcnn.recipes import resolve_config
from rcnn.registry.answers import model_folder


def main() -> int:
    """Serves until SIGINT or SIGTERM."""
    options = _parser().parse_args()
    show_on_screen()
    try:
        config = resolve_config(environ=os.environ).rooted()
        with model_folder(config, options.model) as (name, folder):
            files = read_model_files(folder)
        stop = start(config, files, host=options.host, port=options.port, num_replicas=options.replicas)
    except RcnnError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    is_over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: is_over.set())
    say(f"serving {name} at http://{options.host}:{options.port}/ (Ctrl-C stops it)")
    is_over.wait()
    stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m infra.serve", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="", help="NAME, NAME@ALIAS, NAME/VERSION or a folder (default: the only model)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--replicas", type=int, default=1, help="processes, with a core each (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
