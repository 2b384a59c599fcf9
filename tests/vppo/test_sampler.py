"""The order of prompts over epochs, lived through or skipped to."""

from __future__ import annotations

from trl.trainer.utils import RepeatSampler

from vppo.sampler import EpochSampler


def make() -> RepeatSampler:
    return RepeatSampler(list(range(12)), mini_repeat_count=2, batch_size=3, repeat_count=2, seed=7)


def test_every_epoch_has_trls_order_whether_lived_through_or_skipped_to() -> None:
    plain = make()
    epochs = [list(plain) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]

    through = EpochSampler(make())
    for epoch, order in enumerate(epochs):
        through.set_epoch(epoch)
        assert list(through) == order

    for epoch, order in enumerate(epochs):
        resumed = EpochSampler(make())
        resumed.set_epoch(epoch)
        resumed.set_epoch(epoch)  # accelerate and transformers both call it
        assert list(resumed) == order
    assert len(EpochSampler(make())) == len(make())


def test_unshuffled_order_needs_no_epoch() -> None:
    plain = RepeatSampler(list(range(6)), mini_repeat_count=2, batch_size=3, shuffle=False)
    sampler = EpochSampler(RepeatSampler(list(range(6)), mini_repeat_count=2, batch_size=3, shuffle=False))
    sampler.set_epoch(4)
    assert list(sampler) == list(plain)
