"""Search hyperparameters: `python jobs/tune.py [--recipe NAME | --config FILE] [--section.field VALUE …]`.

Takes what `jobs/train.py` takes. Learning rate and weight decay are searched, or whatever is named with
`--space.optim.lr "loguniform(1e-5, 1e-3)"`; also uniform(low, high), randint(low, high), choice(a, b, …).
"""

from ray_det import cli
from ray_det.tune.config import TuneJobConfig


def main() -> None:
    config = cli.parse_training(TuneJobConfig, __doc__ or "")
    from ray_det.tune.launch import sweep

    sweep(config, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    cli.main(main)
