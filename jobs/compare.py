"""What single changes are worth: `python jobs/compare.py [--recipe NAME | --config FILE] [--section.field VALUE …]`.

Takes what `jobs/train.py` takes, and trains that and each of `--compare.arms` with `--compare.seeds` seeds.
"""

from ray_det import cli
from ray_det.tune.config import CompareJobConfig


def main() -> None:
    config = cli.parse_training(CompareJobConfig, __doc__ or "")
    from ray_det.tune.compare import compare

    compare(config, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    cli.main(main)
