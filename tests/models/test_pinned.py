"""Micro-batches ahead of a GPU. Only the copy to page-locked memory needs one; here it is a copy that is counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ray_det.bench.syncs import CUDA, _stand_in
from ray_det.models.detector import to_device
from ray_det.models.pinned import pinned
from ray_det.types import MicroBatch
from tests.models.zoo import CPU, micro_batch

GPU = torch.device("cuda", 0)


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, object]]:
    """What a GPU's driver is asked for, with the thread that asks."""
    calls: list[tuple[str, object]] = []

    empty = torch.empty

    def page_locked(*shape: int, pin_memory: bool, **more: Any) -> torch.Tensor:
        assert pin_memory
        calls.append(("pin", threading.get_ident()))
        return empty(*shape, **more)

    def set_device(number: int) -> None:
        calls.append(("device", (number, threading.get_ident())))

    monkeypatch.setattr(torch, "empty", page_locked)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return calls


def test_on_a_cpu_they_are_passed_on(calls):
    batches = [micro_batch(seed=i) for i in range(3)]
    assert all(one is other for one, other in zip(pinned(batches, CPU), batches, strict=True))
    assert not calls


@pytest.mark.parametrize(("name", "number"), [("cuda:1", 1), ("cuda", 3)])
def test_each_is_copied_once_by_a_thread_of_that_gpu(name, number, calls):
    batches = [micro_batch(seed=i) for i in range(3)]
    got = list(pinned(iter(batches), torch.device(name)))
    for one, other in zip(got, batches, strict=True):
        assert np.array_equal(one.pixels_BHW3, other.pixels_BHW3)
        assert one.pixels_BHW3 is not other.pixels_BHW3 and one.boxes_N4 is other.boxes_N4
    (_, (device, thread)), *pins = calls
    assert device == number and thread != threading.get_ident() and pins == [("pin", thread)] * 3


def test_the_next_is_fetched_while_one_is_used_and_no_further(calls):
    fetched, more = [threading.Event() for _ in range(4)], threading.Event()

    def source() -> Iterator[MicroBatch]:
        for i, event in enumerate(fetched):
            if i == 1:
                assert more.wait(30)
            event.set()
            yield micro_batch(seed=i)

    batches = pinned(source(), GPU)
    next(batches)  # the first does not wait for the second
    assert not fetched[1].is_set()
    more.set()
    assert fetched[1].wait(30)
    next(batches)
    assert fetched[2].wait(30)
    batches.close()
    assert not fetched[3].is_set()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("pinned")]


def test_as_many_are_ready_as_a_step_takes(calls):
    fetched = [threading.Event() for _ in range(8)]

    def source() -> Iterator[MicroBatch]:
        for i, event in enumerate(fetched):
            event.set()
            yield micro_batch(seed=i)

    batches = pinned(source(), GPU, 3)
    for _ in range(3):
        next(batches)
    assert fetched[5].wait(30) and not fetched[6].is_set()
    batches.close()
    assert not fetched[6].is_set()


def test_what_is_not_begun_when_it_is_closed_is_not_fetched(calls):
    fetched, more = [threading.Event() for _ in range(4)], threading.Event()

    def source() -> Iterator[MicroBatch]:
        for i, event in enumerate(fetched):
            event.set()
            assert i != 1 or more.wait(30)
            yield micro_batch(seed=i)

    batches = pinned(source(), GPU, 3)
    next(batches)
    assert fetched[1].wait(30)
    threading.Timer(0.2, more.set).start()
    batches.close()
    assert more.is_set() and not fetched[2].is_set()


def test_a_single_one_needs_no_thread(calls):
    batch = micro_batch()
    assert next(pinned([batch], GPU)) is batch
    assert not calls


def test_an_error_comes_in_its_turn(calls):
    def source() -> Iterator[MicroBatch]:
        yield micro_batch(seed=0)
        yield micro_batch(seed=1)
        raise OSError("the third")

    batches = pinned(source(), GPU)
    next(batches)
    next(batches)
    with pytest.raises(OSError, match="the third"):
        next(batches)


@pytest.mark.parametrize("already", [True, False])
def test_what_is_page_locked_is_not_copied_again(already, monkeypatch):
    with _stand_in():
        pins = []
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: already)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pins.append(tensor) or tensor)
        to_device(micro_batch(), CUDA)
    assert len(pins) == (not already)
