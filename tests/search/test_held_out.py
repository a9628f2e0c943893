"""Samples held out of a loader: which, that the loader leaves them out, and that it gets them back."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rfield.search.held_out import HeldOut, held_out_count


def seen(loader: Any) -> list[int]:
    return sorted(int(value) for (batch,) in loader for value in batch)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.processes])])
def test_held_out_samples_are_left_out_until_they_are_given_back(workers: int) -> None:
    data = TensorDataset(torch.arange(20))
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    held_out = HeldOut(loader, seed=3)
    assert len(held_out.indices) == len(held_out) == held_out_count(20) == 6
    assert [batch[0].tolist() for batch in held_out] == [[index] for index in held_out.indices]
    rest = seen(loader)
    assert len(rest) == 20
    assert not {*rest} & {*held_out.indices}
    assert loader.dataset.tensors is data.tensors
    held_out.give_back()
    assert seen(loader) == [*range(20)]
    assert loader.dataset is data
    assert HeldOut(loader, seed=4).indices != held_out.indices
    assert "6 samples of 20 are held out; with fewer than 16" in held_out.note()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_half_of_the_samples_is_the_same_for_any_number_of_processes(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    for count in (20, 170):
        half, whole = set(), set()
        for rank in range(processes):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            held_out = HeldOut(DataLoader(TensorDataset(torch.arange(count)), batch_size=4))
            assert held_out.half(), "each process reads one or more"
            half |= {int(batch[0]) for batch in held_out.half()}
            whole |= {int(batch[0]) for batch in held_out}
        assert sorted(whole) == held_out.indices
        assert sorted(half) == (held_out.indices if count == 20 else held_out.indices[::2])


def test_loaders_that_nothing_can_be_held_out_of() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(9))

    for loader, message in (
        ([1, 2, 3], "held out of a DataLoader, got a list: give batches by held_out="),
        (DataLoader(Stream()), "the samples of a Stream have no index"),
        (DataLoader(range(9), batch_size=None), "the loader makes no batches"),
        (DataLoader(range(2)), "up to a third of the samples out, but there are 2"),
    ):
        with pytest.raises(ValueError, match=message):
            HeldOut(loader)
