"""The hard cases: far, flat, equal and one-hot views, padding, empty inputs, and arguments that make no sense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from inputs import KINDS, bound, head, views

import vppo_kernels as vk
from vppo_kernels import head as head_module
from vppo_kernels import reference, tiling, verify
from vppo_kernels.backends import torch as torch_backend
from vppo_kernels.statistics import SoftmaxStats, finish, merge, merge_pair

NAN = float("nan")


def check_logits(z_p: torch.Tensor, z_q: torch.Tensor, kind: str) -> None:
    got = vk.divergence(z_p, z_q, kind=kind).divergence
    truth = reference.divergence(z_p.double(), z_q.double(), None, kind).divergence.clamp_min(0)
    assert (got >= 0).all()
    assert ((got - truth).abs() <= bound(truth)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, -1e4, 1e4, 3e4])
def test_rows_far_from_zero_are_exact(kind: str, offset: float) -> None:
    """Logits on a grid of 1/256, so that the offset rounds nothing away."""
    generator = torch.Generator().manual_seed(0)
    z_p = (4 * torch.randn(9, 300, generator=generator) * 256).round() / 256
    z_q = z_p + (0.2 * torch.randn(9, 300, generator=generator) * 256).round() / 256
    check_logits(z_p + offset, z_q - offset, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_views_differ_by_exactly_nothing(kind: str) -> None:
    z = 5 * torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    assert (vk.divergence(z, z.clone(), kind=kind).divergence == 0).all()
    assert vk.divergence(z, z + 8.0, kind=kind).divergence.max() <= 1e-12  # softmax does not see a shift


@pytest.mark.parametrize("kind", KINDS)
def test_one_hot_views(kind: str) -> None:
    z = torch.full((3, 50), -1e4)
    z[0, 3] = z[1, 3] = z[2, 7] = 1e4
    check_logits(z, z.clone(), kind)
    if kind == "jsd":
        assert vk.divergence(z[:1], z[2:], kind=kind).divergence.item() == pytest.approx(torch.log(torch.tensor(2.0)))
    else:
        assert vk.divergence(z[:1], z[2:], kind=kind).divergence.item() == pytest.approx(2e4)


@pytest.mark.parametrize("kind", KINDS)
def test_views_so_far_apart_that_the_exponential_overflows(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z_p = torch.randn(6, 90, generator=generator)
    z_q = z_p.clone()
    z_q[:, 5] += torch.tensor([60.0, 85.0, 90.0, 120.0, 300.0, 2000.0])
    check_logits(z_p, z_q, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [90, 7])
def test_a_large_gap_where_neither_view_has_mass(kind: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The overflow is then nobody's business: the divergence is small and must keep its digits."""
    monkeypatch.setattr(tiling, "choose_tiling", lambda *a, **k: tiling.Tiling(4, columns))
    generator = torch.Generator().manual_seed(0)
    z_p = torch.randn(6, 90, generator=generator)
    z_q = z_p + 0.001 * torch.randn(6, 90, generator=generator)
    z_p[:, 40:60] = -400.0
    z_q[:, 40:60] = -200.0
    check_logits(z_p, z_q, kind)


def test_padding_rows_of_the_weight_are_never_read() -> None:
    (weight, bias), (clean, perturbed) = head(), views(9)
    padded, padded_bias = torch.cat([weight, torch.full((64, 24), NAN)]), torch.cat([bias, torch.full((64,), NAN)])
    options: dict[str, Any] = {"targets": torch.arange(9), "vocab_size": 700}
    got = vk.linear_divergence(clean, perturbed, padded.requires_grad_(), padded_bias, **options)
    truth = vk.linear_divergence(clean, perturbed, weight, bias, targets=torch.arange(9))
    assert all(torch.equal(a, b) for a, b in zip(got, truth, strict=True))
    got.divergence.sum().backward()
    assert padded.grad is not None
    assert torch.isfinite(padded.grad).all() and (padded.grad[700:] == 0).all()


def test_buffers_are_written_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, bias), (clean, perturbed) = head(), views(9)

    def run() -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_() for x in (clean, perturbed, weight, bias)]
        output = vk.linear_divergence(*inputs, targets=torch.arange(9), kind="jsd")
        sum(o.sum() for o in output).backward()  # type: ignore[union-attr]
        return [*output, *(x.grad for x in inputs)]  # type: ignore[list-item]

    clean_run, empty = run(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(NAN))
    assert all(torch.equal(a, b) for a, b in zip(clean_run, run(), strict=True))


@pytest.mark.parametrize("leading", [(0,), (0, 5), (2, 0)])
def test_no_rows(leading: tuple[int, ...]) -> None:
    weight, _ = head()
    hidden = torch.zeros(*leading, 24, requires_grad=True)
    targets = torch.zeros(leading, dtype=torch.long)
    weight.requires_grad_()
    for kind in KINDS:
        output = vk.linear_divergence(hidden, hidden, weight, targets=targets, kind=kind)
        assert all(o.shape == leading for o in output if o is not None)
        sum(o.sum() for o in output if o is not None).backward()  # type: ignore[union-attr]
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.shape == hidden.shape and (weight.grad == 0).all()


def test_a_vocabulary_of_one() -> None:
    clean, perturbed = views(3)
    output = vk.linear_divergence(clean, perturbed, torch.randn(1, 24), targets=torch.zeros(3, dtype=torch.long))
    assert all((o == 0).all() for o in output if o is not None)


def counted_products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    rows: list[int] = []
    product, mm = head_module._product, torch.mm

    def counting(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rows.append(len(a))
        return product(a, b, dtype)

    def counting_mm(a: torch.Tensor, b: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if "out" in kwargs:
            rows.append(len(a))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(head_module, "_product", counting)
    monkeypatch.setattr(torch, "mm", counting_mm)
    return rows


def test_rows_without_gradient_meet_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    (weight, _), (clean, _) = head(), views(40)
    clean.requires_grad_()
    upstream = torch.zeros(40)
    upstream[[3, 17, 29]] = torch.tensor([1.0, -2.0, NAN])
    logprobs = vk.linear_logprob(clean, weight, torch.arange(40)).logprobs
    products = counted_products(monkeypatch)
    logprobs.backward(upstream)
    assert set(products) == {3}
    products.clear()
    logprobs = vk.linear_logprob(clean, weight.requires_grad_(), torch.arange(40)).logprobs
    products.clear()
    clean.grad = None
    logprobs.backward(torch.zeros(40))
    assert products == []
    assert clean.grad is not None and (clean.grad == 0).all() and (weight.grad == 0).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("limit", [1 << 20, 4 << 20, 64 << 20])
def test_working_memory_stays_within_the_limit(limit: int) -> None:
    """Live bytes beyond inputs and outputs, seen by following every allocation."""
    from memory import peak_bytes

    weight, (clean, perturbed) = torch.randn(40_000, 32), views(300, width=32)
    weight.requires_grad_()
    with vk.workspace_limit(limit):
        used = peak_bytes(lambda: vk.linear_divergence(clean, perturbed, weight))
        output = vk.linear_divergence(clean, perturbed, weight)
        gradient = peak_bytes(lambda: output.divergence.sum().backward())
    assert used <= limit + 2**20
    assert gradient <= limit + weight.nbytes + 2**20
    assert max(used, gradient) < 2 * 300 * 40_000 * 4 / 2


def test_autocast_does_not_round_logits() -> None:
    (weight, _), (clean, perturbed) = head(), views(9, gap=0.01)
    plain = vk.linear_divergence(clean, perturbed, weight).divergence
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vk.linear_divergence(clean, perturbed, weight).divergence, plain)


def test_strided_inputs_are_neither_misread_nor_changed() -> None:
    (weight, _), (clean, perturbed) = head(), views(12)
    wide, tall = torch.stack([clean, perturbed], dim=-1), torch.stack([weight, weight * NAN], dim=1)
    before = wide.clone()
    got = vk.linear_divergence(wide[..., 0], wide[..., 1], tall[:, 0])
    truth = vk.linear_divergence(clean, perturbed, weight)
    assert torch.equal(got.divergence, truth.divergence)
    assert torch.equal(wide, before)


def test_the_same_call_twice_is_the_same_to_the_bit() -> None:
    (weight, _), (clean, perturbed) = head(), views(12)
    assert torch.equal(
        vk.linear_divergence(clean, perturbed, weight).divergence,
        vk.linear_divergence(clean, perturbed, weight).divergence,
    )


def test_statistics_are_a_monoid() -> None:
    generator = torch.Generator().manual_seed(0)
    z = (5 * torch.randn(2, 8, 90, generator=generator)).double()
    z[1] += 0.01 * z[0]

    def part(start: int, stop: int) -> Any:
        tile = z[:, :, start:stop].contiguous()
        return torch_backend.fold_pair(tile, None, start, torch.empty(3, *tile.shape[1:], dtype=z.dtype))

    a, b, c, whole = part(0, 20), part(20, 21), part(21, 90), part(0, 90)
    for joined in (
        merge_pair(merge_pair(a, b), c),
        merge_pair(a, merge_pair(b, c)),
        merge_pair(c, merge_pair(b, a)),
    ):
        for got, expected in (
            (joined.gap, whole.gap),
            (joined.excess, whole.excess),
            (joined.p.moment, whole.p.moment),
        ):
            assert torch.allclose(got, expected, rtol=1e-12, atol=1e-12)
    nothing = SoftmaxStats(torch.full((8,), -torch.inf).double(), *torch.zeros(2, 8).double(), None)
    for got, expected in zip(finish(merge(nothing, whole.p)), finish(whole.p), strict=True):
        assert got is expected is None or torch.equal(got, expected)
    assert torch.equal(finish(merge(whole.p, nothing)).entropy, finish(whole.p).entropy)


WEIGHT, (CLEAN, PERTURBED) = head()[0], views(4)


def pair(clean: Any = CLEAN, perturbed: Any = PERTURBED, weight: Any = WEIGHT, bias: Any = None, **options: Any) -> Any:
    return vk.linear_divergence(clean, perturbed, weight, bias, **options)


TARGETS = torch.arange(4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: pair(perturbed=PERTURBED[:3]), ValueError, ["hidden_perturbed", "[3, 24]", "[4, 24]"]),
        (lambda: pair(weight=WEIGHT[:, :5]), ValueError, ["hidden", "[4, 24]", "5"]),
        (lambda: pair(CLEAN.long()), TypeError, ["hidden", "int64", "float32"]),
        (lambda: pair([1.0]), TypeError, ["hidden", "list", "Tensor"]),
        (lambda: pair(CLEAN.to("meta")), ValueError, ["hidden", "meta", "cpu"]),
        (lambda: pair(bias=torch.zeros(3)), ValueError, ["bias", "[3]", "[700]"]),
        (lambda: pair(kind="k3"), ValueError, ["kind", "k3", "reverse_kl"]),
        (lambda: pair(temperature=0.0), ValueError, ["temperature", "0.0"]),
        (lambda: pair(temperature=NAN), ValueError, ["temperature", "nan"]),
        (lambda: pair(softcap=-1.0), ValueError, ["softcap", "-1.0"]),
        (lambda: pair(vocab_size=701), ValueError, ["vocab_size", "701", "700"]),
        (lambda: pair(backend="fast"), ValueError, ["backend", "fast", "torch"]),
        (lambda: pair(process_group=1), NotImplementedError, ["process_group"]),
        (lambda: vk.linear_logprob(CLEAN, WEIGHT, TARGETS + 697), ValueError, ["targets", "700", "row 3", "0..699"]),
        (lambda: vk.linear_logprob(CLEAN, WEIGHT, TARGETS - 1), ValueError, ["targets", "-1", "row 0"]),
        (lambda: vk.linear_logprob(CLEAN, WEIGHT, TARGETS.float()), TypeError, ["targets", "float32", "int64"]),
        (lambda: vk.linear_logprob(CLEAN, WEIGHT, TARGETS[:2]), ValueError, ["targets", "[2]", "[4]"]),
        (lambda: vk.divergence(WEIGHT, WEIGHT[:3]), ValueError, ["logits_perturbed", "[3, 24]", "[700, 24]"]),
        (lambda: vk.sampled_divergence(CLEAN, PERTURBED, kind="kl"), ValueError, ["kind", "kl", "k3"]),
        (lambda: pair(CLEAN * NAN, check=True), ValueError, ["hidden", "NaN", "row 0"]),
        (lambda: vk.workspace_limit(5).__enter__(), ValueError, ["nbytes", "5", "1 MiB"]),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call: Callable[[], Any], error: type[Exception], words: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(words[0])
    for word in words:
        assert word in str(caught.value)


def test_check_catches_a_backend_that_is_off_by_a_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    fold_pair, fold = torch_backend.fold_pair, torch_backend.fold

    def off(*args: Any) -> Any:
        stats = fold_pair(*args)
        return stats._replace(excess=stats.excess * 1.01)

    clean, perturbed = views(40, gap=0.3)
    vk.linear_divergence(clean, perturbed, WEIGHT, check=True)
    monkeypatch.setattr(torch_backend, "fold_pair", off)
    with pytest.raises(RuntimeError, match="divergence of row 0"):
        vk.linear_divergence(clean, perturbed, WEIGHT, check=True)
    monkeypatch.setattr(torch_backend, "fold", lambda *a: fold(*a)._replace(moment=fold(*a).moment * 1.01))
    with pytest.raises(RuntimeError, match="entropy of row"):
        vk.linear_logprob(clean, WEIGHT, torch.arange(40), check=True)
    assert len(verify.sample_rows(1000, torch.device("cpu"))) == verify.SAMPLE
