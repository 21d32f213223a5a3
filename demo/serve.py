#!/usr/bin/env python3
"""Serve folders over HTTP on loopback, with connections kept alive as real image hosts do.

python demo/serve.py FOLDER PORT [NAME=FOLDER ...]      FOLDER as /, each other one as /NAME
"""

import sys

from aiohttp import web


def main() -> None:
    """Serve until killed."""
    folder, port, *others = sys.argv[1:]
    named = [other.partition("=") for other in others]
    app = web.Application()
    app.add_routes([web.static(f"/{name}", path) for name, _, path in named])
    app.add_routes([web.static("/", folder)])
    web.run_app(app, host="127.0.0.1", port=int(port), access_log=None, print=None)


if __name__ == "__main__":
    main()
