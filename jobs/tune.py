"""Search hyperparameters: `python jobs/tune.py [--recipe NAME | --config FILE] [--section.field VALUE …]`.

Takes what `jobs/train.py` takes. Learning rate and weight decay are searched, or whatever is named with
`--space.optim.lr "loguniform(1e-5, 1e-3)"`; also uniform(low, high), randint(low, high), choice(a, b, …).
"""

import sys

from ray_det import cli
from ray_det.tune.config import TuneJobConfig


def main() -> None:
    config, recipe = cli.parse(
        TuneJobConfig,
        sys.argv[1:],
        description=__doc__ or "",
        recipes=True,
        default_recipe=lambda given: "finetune" if given.get("data.train") else "quickstart",
    )
    if recipe:
        print(f"recipe {recipe}", flush=True)
    from ray_det.tune.launch import sweep

    sweep(config, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    cli.main(main)
