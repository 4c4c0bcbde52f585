"""Train a detector: `python jobs/train.py [--recipe NAME | --config FILE] [--section.field VALUE …]`.

Without data it trains on an embedded data set (recipe `quickstart`); with `--data.train` it fine-tunes.
"""

import time

STARTED_AT = time.time()

from ray_det import cli  # noqa: E402  the clock starts before the imports
from ray_det.config import TrainJobConfig  # noqa: E402


def main() -> None:
    config = cli.parse_training(TrainJobConfig, __doc__ or "")
    from ray_det.report.progress import results_table
    from ray_det.storage import Folder
    from ray_det.train.launch import train

    summary = train(config, started_at=STARTED_AT)
    print(results_table(summary))
    print(f"run folder: {(Folder.at(config.storage) / config.name).uri} (open report.html)")


if __name__ == "__main__":
    cli.main(main)
