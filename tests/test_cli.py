"""The command line: where values come from, what they may be, and how errors read."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from ray_det import cli, recipes, yaml12
from ray_det.config import TrainJobConfig
from ray_det.types import UserError


class Inner(BaseModel):
    rate: float = Field(0.5, gt=0, description="rate, per second")
    sizes: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    others: tuple[str, ...] | None = None
    kind: Literal["big", "small"] = "big"
    count: int | None = None
    on: bool = False
    maybe: bool | None = None


class Small(BaseModel):
    """A job with a required field and a list of text, which no configuration of training has."""

    checkpoint: str
    output: Path = Path("out")
    note: str | None = None
    inner: Inner = Inner.model_validate({})


def small(*argv: str) -> Small:
    return cli.parse(Small, ["--checkpoint", "c", *argv], description="A job.")[0]


def train(*argv: str) -> TrainJobConfig:
    return cli.parse(TrainJobConfig, argv, description="Train.", recipes=True)[0]


def error(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        train(*argv)
    return str(caught.value)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--inner.rate", "5e-5"], 5e-5),
        (["--inner.rate=2"], 2.0),
        (["--inner.rate", "1", "--inner.rate", "2"], 2.0),  # the last wins
        (["--inner.rate", "1.e3"], 1000.0),
        (["--inner.rate", ".5"], 0.5),
    ],
)
def test_numbers(argv: list[str], expected: float) -> None:
    assert small(*argv).inner.rate == expected


def test_text_stays_as_typed() -> None:
    assert small("--checkpoint", "007").checkpoint == "007"
    assert small("--checkpoint", "none").checkpoint == "none"
    assert small("--checkpoint=a=b").checkpoint == "a=b"
    assert small("--checkpoint", "{x: [").checkpoint == "{x: ["
    assert small("--note", "1e-3").note == "1e-3"
    assert small("--note", "").note == ""
    assert small("--output", "1").output == Path("1")


@pytest.mark.parametrize("none", ["none", "null", "None"])
def test_none_is_for_optional_fields(none: str) -> None:
    assert small("--note", "x", "--note", none).note is None
    assert small("--inner.count", "3", "--inner.count", none).inner.count is None
    with pytest.raises(UserError, match=r"--inner.rate: expected float > 0, got"):
        small("--inner.rate", none)


def test_lists_with_and_without_brackets() -> None:
    for text in ("320,640", "[320, 640]", "320, 640"):
        assert small("--inner.sizes", text).inner.sizes == (320, 640)
    assert small("--inner.sizes", "320").inner.sizes == (320,)
    assert small("--inner.sizes", "[]").inner.sizes == ()
    assert small("--inner.names", "007,no").inner.names == ("007", "no")
    assert small("--inner.others", "007,no, a: b,#1").inner.others == ("007", "no", "a: b", "#1")
    assert train("--augment.scale", "0.9,1.1").augment.scale == (0.9, 1.1)
    assert train("--model.config", '{"d_model": 64, "act": "relu"}').model.config == {"d_model": 64, "act": "relu"}


def test_booleans_alone_or_with_a_value() -> None:
    assert small("--inner.on").inner.on is True
    assert small("--inner.on", "--note", "x").inner.on is True
    assert small("--inner.on", "false").inner.on is False
    assert small("--inner.maybe").inner.maybe is True
    assert small("--inner.maybe", "false").inner.maybe is False
    assert small("--inner.maybe", "--inner.maybe", "none").inner.maybe is None


def test_order_is_defaults_recipe_file_flags(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("recipe: baseline\noptim:\n  clip_norm: 7\n  lr: 3e-4\n")
    config, recipe = cli.parse(
        TrainJobConfig, ["--config", str(file), "--optim.lr", "2e-4"], description="", recipes=True
    )
    assert recipe == "baseline"
    assert config.train.epochs == TrainJobConfig.model_validate({}).train.epochs  # default
    assert config.data.padding == "zero"  # recipe
    assert config.optim.clip_norm == 7  # file over the recipe's 0
    assert config.optim.lr == 2e-4  # flag over both


def test_default_recipe_only_where_nothing_was_named(tmp_path: Path) -> None:
    def pick(flags: dict) -> str:
        return "finetune" if flags.get("data.train") else "quickstart"

    def recipe(*argv: str) -> str | None:
        return cli.parse(TrainJobConfig, argv, description="", recipes=True, default_recipe=pick)[1]

    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert recipe() == "quickstart"
    assert recipe("--data.train", "a.json") == "finetune"
    assert recipe("--recipe", "baseline") == "baseline"
    assert recipe("--config", str(empty)) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--optim.lrr 1", "unknown option --optim.lrr; did you mean --optim.lr?"),
        ("--data.trian x", "unknown option --data.trian; did you mean --data.train?"),
        ("--lr 1", "unknown option --lr; did you mean --optim.lr?"),
        (
            "--train.global-batch-size=4",
            "unknown option --train.global-batch-size; did you mean --train.global_batch_size?",
        ),
        ("--recipee x", "unknown option --recipee; did you mean --recipe?"),
        ("--optim 3", "--optim is a section; name one of its fields, such as --optim.lr"),
        ("--optim.lr abc", "--optim.lr: expected float > 0, got 'abc'"),
        ("--optim.lr -1", "--optim.lr: expected float > 0, got '-1'"),
        ("--train.epochs 2.5", "--train.epochs: expected int >= 1, got '2.5'"),
        ("--train.epochs true", "--train.epochs: expected int >= 1, got 'true'"),
        ("--train.epochs=", "--train.epochs: expected int >= 1, got ''"),
        ("--train.micro_batch_size 0", "--train.micro_batch_size: expected int >= 1 or none, got '0'"),
        ("--data.resize big", "--data.resize: expected longest | shortest | square, got 'big'"),
        ("--overwrite maybe", "--overwrite: expected true | false, got 'maybe'"),
        ("--augment.scale 3", "--augment.scale: expected float > 0, float > 0, got '3'"),
        ("--augment.scale 3,1", "augment: scale: 3.0 > 1.0"),
        ("--workers.num 3", "train.global_batch_size 16 is not divisible by workers.num 3"),
        ("--model.config [1]", "--model.config: expected JSON object, got '[1]'"),
        ("--train.epochs", "--train.epochs: the value is missing; expected int >= 1"),
        ("--train.epochs --seed 1", "--train.epochs: the value is missing; expected int >= 1"),
        ("stray", "unexpected argument 'stray'; options are --section.field VALUE (see --help)"),
        ("-x 1", "unexpected argument '-x'; options are --section.field VALUE (see --help)"),
        ("--recipe nope", "unknown recipe 'nope'; there are baseline, finetune, from_imagenet, quickstart"),
        ("--config nope.yaml", "--config nope.yaml: No such file or directory"),
        ("--config a --recipe finetune", "give --config or --recipe, not both (a file may itself say `recipe: NAME`)"),
    ],
)
def test_errors_name_option_value_and_what_is_expected(argv: str, message: str) -> None:
    assert error(*argv.split(" ")) == message


def test_a_field_looked_for_in_another_section_is_found() -> None:
    for wrong, right in (
        ("--wandb.name", "--name"),
        ("--workers.lr", "--optim.lr"),
        ("--data.epochs", "--train.epochs"),
    ):
        assert error(wrong, "1") == f"unknown option {wrong}; did you mean {right}?"


def test_a_required_field() -> None:
    with pytest.raises(UserError, match=r"^--checkpoint is required: text$"):
        cli.parse(Small, [], description="")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lrr: 1}", "unknown key optim.lrr; did you mean optim.lr?"),
        ("seeed: 1", "unknown key seeed; did you mean seed?"),
        ("optim: 5", "optim is a section; name one of its fields, such as optim.lr"),
        ("name: 007", "name: expected text matching ^[A-Za-z0-9][A-Za-z0-9._-]*$, got 7 (put it in quotes)"),
        ("train: {epochs: yes}", 'train.epochs: expected int >= 1, got "yes"'),
        ("train: {epochs: true}", "train.epochs: expected int >= 1, got true"),
        ("optim: {lr: 1, lr: 2}", "not valid YAML: a key appears twice"),
        ("seed: 1\noptim: {lr: [", "not valid YAML in line 2: expected the node content, but found '<stream end>'"),
        ("[1, 2]", "expected `section: {field: value}`, got list"),
        ("seed: !!python/name:os.system", "not valid YAML: could not determine a constructor for the tag"),
    ],
)
def test_errors_in_a_file_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(text)
    assert error("--config", str(file)).startswith(f"{file}: {message}")


def test_yaml_is_version_1_2(tmp_path: Path) -> None:
    text = "a: 5e-5\nb: no\nc: 1:30\nd: 2024-01-01\ne: 010\nf: [1., -.inf, ~, True]\n"
    assert yaml12.read(text, "x") == {
        "a": 5e-5,
        "b": "no",
        "c": "1:30",
        "d": "2024-01-01",
        "e": 10,
        "f": [1.0, -math.inf, None, True],
    }


def test_help_names_every_field_and_fits_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit) as exit_:
        train("--help")
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert max(map(len, text.splitlines())) <= 70
    words = " ".join(text.split())
    for section, info in TrainJobConfig.model_fields.items():
        nested = getattr(info.annotation, "model_fields", None)
        for name, field in (nested or {section: info}).items():
            head = f"--{section}.{name} " if nested else f"--{section} "
            assert words.count(head) == 1
            assert field.description
            assert " ".join(field.description.split()) in words
    assert "--optim.lr float > 0 learning rate at the start [default: 5e-05]" in words
    assert "--data.padding mean | zero" in words
    assert "--train.micro_batch_size int >= 1 or none" in words
    assert all(name in words for name in recipes.names())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train("--version")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("ray_det 0.")


def test_main_prints_one_line_and_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise UserError("first\n  second\n")

    with pytest.raises(SystemExit) as exit_:
        cli.main(job)
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "error: first second\n")


def test_main_lets_success_and_bugs_through() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    def bug() -> None:
        raise ZeroDivisionError

    cli.main(lambda: None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(interrupted)
    assert exit_.value.code == 130
    with pytest.raises(ZeroDivisionError):
        cli.main(bug)


def test_it_starts_without_torch_and_ray() -> None:
    code = (
        "import sys; from ray_det import cli, config; print(cli.to_yaml(config.TrainJobConfig.model_validate({}))); "
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
awkward = st.sampled_from(
    ["null", "none", "5e-5", "007", "no", "1:30", "2024-01-01", "~", "", " x ", "a: b", "<<", "#"]
)
configs = st.builds(
    TrainJobConfig.model_validate,
    st.fixed_dictionaries(
        {
            "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,8}\Z"),
            "storage": st.text(max_size=12) | awkward,
            "seed": st.integers(0, 2**40),
            "overwrite": st.booleans(),
            "data": st.fixed_dictionaries(
                {
                    "train": st.none() | st.text(max_size=8) | awkward,
                    "multi_scale": st.lists(st.integers(1, 999), max_size=3),
                }
            ),
            "model": st.fixed_dictionaries({"config": st.dictionaries(st.text() | awkward, json_values, max_size=3)}),
            "optim": st.fixed_dictionaries({"lr": st.floats(min_value=0, exclude_min=True, allow_nan=False)}),
            "workers": st.fixed_dictionaries({"use_gpu": st.none() | st.booleans()}),
        }
    ),
)


@settings(max_examples=60, deadline=None)
@given(config=configs)
def test_yaml_round_trip(tmp_path_factory: pytest.TempPathFactory, config: TrainJobConfig) -> None:
    text = cli.to_yaml(config)
    assert cli.from_yaml(TrainJobConfig, text) == config
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(text, encoding="utf-8")
    assert train("--config", str(file)) == config


def test_yaml_round_trip_of_paths_and_lists() -> None:
    config = small("--output", "5e-5", "--inner.sizes", "1,2", "--inner.names", "007")
    assert cli.from_yaml(Small, cli.to_yaml(config)) == config


def test_help_may_be_read_in_part() -> None:
    job = Path(__file__).parents[1] / "jobs" / "train.py"
    said = subprocess.run(
        f"{sys.executable} {job} --help | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith("usage: train.py") and said.stderr == ""
