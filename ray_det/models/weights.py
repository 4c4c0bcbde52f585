"""Reading weight files and fitting them to a network, with a table of what happened to every tensor.

Nothing is unpickled outside `weights_only=True`.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ray_det.types import UserError

WRAPPERS = ("model", "state_dict", "model_state_dict", "ema", "module", "params")
"""Keys under which training scripts put a state dict, from the outside in."""
IGNORED = "num_batches_tracked"
"""A buffer of BatchNorm that nothing here reads; older files and frozen norms do not have it."""


@dataclass(frozen=True)
class WeightsReport:
    """What became of a file's tensors and of the network's. Names are the network's, `skipped` the file's."""

    source: str
    loaded: tuple[str, ...]
    skipped: tuple[str, ...]  # in the file, not in the network
    remade: tuple[str, ...]  # in both, of other shapes (another number of classes): freshly initialised
    missing: tuple[str, ...]  # in the network, not in the file: freshly initialised

    def table(self) -> str:
        """A line per outcome, with the number of tensors and the modules they belong to."""
        rows = [f"weights from {self.source}"]
        for name in ("loaded", "skipped", "remade", "missing"):
            keys: tuple[str, ...] = getattr(self, name)
            label = "re-made" if name == "remade" else name
            shown = _modules(keys, whole=name == "remade")
            rows.append(f"  {label:<8} {len(keys):>5} tensors  {shown}".rstrip())
        return "\n".join(rows)


def read_weights(path: str) -> dict[str, Tensor]:
    """The state dict in a safetensors file or in a torch file that loads with `weights_only=True`.

    Raises:
        UserError: no such file, not readable as weights, or without a single tensor.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"weights file not found: {path}")
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _torch_load(file)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "Unsupported class" in str(error):
            raise UserError(f"weights file {path} holds pickled objects; only plain tensors are loaded") from None
        raise UserError(f"weights file {path} cannot be read: neither torch nor safetensors") from None
    except Exception as error:  # torch raises many kinds for a broken or hostile file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"weights file {path} cannot be read: {reason}") from None
    state = _unwrap(content)
    if not state:
        raise UserError(f"weights file {path} holds no state dict")
    return state


def load_weights(network: nn.Module, state: Mapping[str, Tensor], source: str) -> WeightsReport:
    """Copy into `network` every tensor of `state` that fits by name and shape.

    A file may name its tensors under another prefix than the network (`module.`, or a backbone alone, such as a
    classifier's `features.`): the pair of prefixes under which most tensors fit is taken.

    Args:
        network: changed in place. What does not fit keeps its fresh initialisation.
        state: the file's tensors.
        source: the file's name, for messages.

    Raises:
        UserError: not one tensor fits.
    """
    own = {k: v for k, v in network.state_dict().items() if not k.endswith(IGNORED)}
    theirs = {k: v for k, v in state.items() if not k.endswith(IGNORED)}
    file_prefix, own_prefix = best_prefixes(theirs, own)
    renamed = {own_prefix + k[len(file_prefix) :]: k for k in theirs if k.startswith(file_prefix)}
    loaded = {k: theirs[renamed[k]] for k in own if k in renamed and theirs[renamed[k]].shape == own[k].shape}
    if not any(v.numel() > 1 for v in loaded.values()):
        raise UserError(f"{source}: not one of its {len(theirs)} tensors fits this model")
    network.load_state_dict(loaded, strict=False)
    return WeightsReport(
        source=source,
        loaded=tuple(loaded),
        skipped=tuple(k for k in theirs if k not in {renamed[name] for name in renamed.keys() & own.keys()}),
        remade=tuple(k for k in own if k in renamed and k not in loaded),
        missing=tuple(k for k in own if k not in renamed),
    )


def best_prefixes(theirs: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[str, str]:
    """(file prefix, own prefix) such that most tensors agree in shape and in the name after the prefix.

    Among equals the shortest prefixes win.
    """
    by_suffix: dict[str, list[str]] = {}
    for key in own:
        for prefix, suffix in _splits(key):
            by_suffix.setdefault(suffix, []).append(prefix)
    votes: Counter[tuple[str, str]] = Counter()
    for key, value in theirs.items():
        for prefix, suffix in _splits(key):
            for own_prefix in by_suffix.get(suffix, ()):
                if own[own_prefix + suffix].shape == value.shape:
                    votes[prefix, own_prefix] += 1
    return max(votes, key=lambda pair: (votes[pair], -len(pair[0]) - len(pair[1])), default=("", ""))


def _splits(key: str) -> list[tuple[str, str]]:
    """Every (prefix with its dot, suffix) whose suffix still names a module and a tensor, and ("", key)."""
    parts = key.split(".")
    cuts = range(max(1, len(parts) - 1))
    return [("".join(p + "." for p in parts[:i]), ".".join(parts[i:])) for i in cuts]


def _torch_load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True)


def _unwrap(content: Any) -> dict[str, Tensor]:
    """The innermost dict of tensors."""
    while isinstance(content, Mapping):
        if any(isinstance(v, Tensor) for v in content.values()):
            return {str(k): v for k, v in cast("dict[str, Any]", content).items() if isinstance(v, Tensor)}
        content = next((content[k] for k in WRAPPERS if k in content), None)
    return {}


def _modules(keys: tuple[str, ...], whole: bool) -> str:
    """The modules that tensors belong to: whole names, or the first two parts with their counts."""
    if whole:
        return ", ".join(keys)
    counts = Counter(".".join(k.split(".")[:2]) for k in keys)
    return ", ".join(f"{name} ({n})" for name, n in counts.most_common(6)) + (", ..." if len(counts) > 6 else "")
