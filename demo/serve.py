#!/usr/bin/env python3
"""Serve a folder over HTTP on loopback, with connections kept alive as real image hosts do.

python demo/serve.py FOLDER PORT
"""

import sys
from pathlib import Path

from aiohttp import web


def main() -> None:
    """Serve until killed."""
    app = web.Application()
    app.add_routes([web.static("/", Path(sys.argv[1]))])
    web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), access_log=None, print=None)


if __name__ == "__main__":
    main()
