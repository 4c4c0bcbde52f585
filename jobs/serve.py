"""A trained model behind HTTP: pictures in, detections out, and a page to try it at /.

python jobs/serve.py --checkpoint runs/cells --port 8000
"""

from __future__ import annotations

import sys

from ray_det import cli
from ray_det.serve.config import ServeConfig
from ray_det.types import UserError


def main() -> None:
    config, _ = cli.parse(ServeConfig, sys.argv[1:], description=__doc__ or "")
    try:
        from ray_det.serve.launch import serve_until_stopped
    except ModuleNotFoundError as error:
        raise UserError(f"serving needs {error.name}: pip install 'ray-det[serve]'") from None
    serve_until_stopped(config)


if __name__ == "__main__":
    cli.main(main)
