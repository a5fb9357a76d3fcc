"""python -m mso_hub.hub.devhub --dir FOLDER: a Hub on this machine; one line of JSON on stdout when it is ready."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mso_hub.errors import MsoError
from mso_hub.hub.devhub.server import serve
from mso_hub.hub.devhub.settings import Settings


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mso_hub.hub.devhub", description="A Hub on this machine.")
    parser.add_argument("--dir", type=Path, required=True, help="folder of all state; made if it does not exist")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port of the hub; 0 for any free one")
    parser.add_argument("--storage-port", type=int, default=0, help="port of the storage origin")
    parser.add_argument("--xet", action="store_true", help="files go through Xet, not LFS")
    parser.add_argument("--until-eof", action="store_true", help="stop when stdin ends")
    return parser.parse_args()


def main() -> int:
    """Run the server; 2 when it cannot start."""
    given = _arguments()

    def ready(endpoint: str) -> None:
        sys.stdout.write(json.dumps({"endpoint": endpoint}) + "\n")
        sys.stdout.flush()

    try:
        settings = Settings(given.dir, given.host, given.port, given.storage_port, given.xet)
        serve(settings, ready, until_eof=given.until_eof)
    except MsoError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
