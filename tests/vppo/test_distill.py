"""The distillation loss against plain float64 formulae, and against what TRL computes of the same tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import families
from torch import Tensor
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from vppo.distill import Distillation, Head, distillation_loss, visual_weights
from vppo_kernels import reference

B, T, D, E, V = 3, 5, 12, 20, 101
K = 7
OPTIONS: dict[str, dict[str, Any]] = {
    "forward_kl": {"kind": "forward_kl"},
    "reverse_kl": {"kind": "reverse_kl"},
    "reverse_kl, a beta that it does not read": {"kind": "reverse_kl", "beta": 1.0},
    "jsd": {"kind": "jsd"},
    "jsd 0.1": {"kind": "jsd", "beta": 0.1},
    "jsd 0.999": {"kind": "jsd", "beta": 0.999},
    "topk": {"kind": "topk", "k": K},
}
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 0]], dtype=torch.bool)


def made(seed: int = 0, other: float = 1.0, rows: tuple[int, int] = (V, V)) -> tuple[Tensor, Head, Tensor, Head]:
    """Student and teacher of unlike width in float64; `other` scales how far apart their distributions are."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows[0], D, generator=g, dtype=torch.float64)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(E, D, generator=g, dtype=torch.float64))[0]  # [E, D], orthonormal columns
    theirs = torch.randn(rows[1], E, generator=g, dtype=torch.float64) * other
    shared = min(rows)
    theirs[:shared] += weight[:shared] @ mix.T
    return hidden, Head(weight), hidden @ mix.T, Head(theirs)


def logits(hidden: Tensor, head: Head, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    return reference.logits(hidden, *head[:2], logit_scale=head.logit_scale, softcap=head.softcap,
                            temperature=temperature, vocab_size=vocab_size)  # fmt: skip


def divergence(p: Tensor, q: Tensor, kind: str, beta: float = 0.5, k: int = 100) -> Tensor:
    """`[...]` from the logits of student and teacher."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    if kind == "topk":
        top = q.topk(k, -1).indices
        rest = torch.ones_like(q).scatter(-1, top, 0.0)
        p, q = (torch.cat([x.gather(-1, top), (x.exp() * rest).sum(-1, keepdim=True).log()], -1) for x in (p, q))
    if kind in ("forward_kl", "topk"):
        return (q.exp() * (q - p)).sum(-1)
    if kind == "reverse_kl":
        return (p.exp() * (p - q)).sum(-1)
    m = torch.logaddexp(q + math.log(beta), p + math.log1p(-beta))
    return (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(-1)


def entropy(z: Tensor) -> Tensor:
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def in_dtype(head: Head, dtype: torch.dtype) -> Head:
    return head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def within(found: Tensor, truth: Tensor) -> bool:
    return bool(((found.double() - truth).abs() <= reference.divergence_bound(truth)).all() and (found >= 0).all())


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("other", [1.0, 1e-3], ids=["apart", "nearly alike"])
def test_every_token_is_that_of_float64(options: dict[str, Any], other: float) -> None:
    student, head, teacher, teacher_head = made(other=other)
    args = student.float(), in_dtype(head, torch.float32), teacher.float(), in_dtype(teacher_head, torch.float32)
    z = [logits(h.double(), in_dtype(x, torch.float64)) for h, x in (args[:2], args[2:])]
    truth = divergence(*z, **options)
    found = distillation_loss(*args, MASK, **options)
    assert within(found.divergence[MASK], truth[MASK]) and not found.divergence[~MASK].any()
    for value, its in zip((found.entropy, found.teacher_entropy), z, strict=True):
        torch.testing.assert_close(value[MASK].double(), entropy(its)[MASK], rtol=0, atol=reference.LOGPROB_BOUND)
        assert not value[~MASK].any()
    torch.testing.assert_close(found.loss.double(), found.divergence.double().sum() / MASK.sum(), rtol=1e-6, atol=0)


CHANGES: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 2.5},
    "scales": {"student": {"logit_scale": 0.3}, "teacher": {"logit_scale": 1.7}},
    "caps": {"student": {"softcap": 4.0}, "teacher": {"softcap": 9.0, "logit_scale": 0.5}},
    "one cap": {"teacher": {"softcap": 3.0}, "temperature": 0.7},
    "biases": {"student": {"bias": 1.0}, "teacher": {"bias": 2.0}},
    "one bias": {"teacher": {"bias": 2.0}},
    "padded": {"rows": (V + 11, V + 4), "vocab_size": V},
    "teacher padded": {"rows": (V, V + 27), "vocab_size": V},
    "bfloat16 teacher": {"teacher_dtype": torch.bfloat16},
    "bfloat16 both": {"teacher_dtype": torch.bfloat16, "student_dtype": torch.bfloat16},
}


def changed(change: dict[str, Any]) -> tuple[tuple[Tensor, Head, Tensor, Head], dict[str, Any]]:
    student, head, teacher, teacher_head = made(3, rows=change.get("rows", (V, V)))
    heads = []
    for name, given_head in (("student", head), ("teacher", teacher_head)):
        fields = dict(change.get(name, {}))
        if "bias" in fields:
            fields["bias"] *= torch.randn(len(given_head.weight), generator=torch.Generator().manual_seed(9)).double()
        dtype = change.get(f"{name}_dtype", torch.float32)
        heads.append(in_dtype(given_head._replace(**fields), dtype))
    args = student.to(heads[0].weight.dtype), heads[0], teacher.to(heads[1].weight.dtype), heads[1]
    return args, {name: change[name] for name in ("temperature", "vocab_size") if name in change}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "topk"])
def test_heads_may_differ(kind: str, change: dict[str, Any]) -> None:
    args, options = changed(change)
    z = [logits(h.double(), in_dtype(x, torch.float64), **options) for h, x in (args[:2], args[2:])]
    k = K if kind == "topk" else None
    found = distillation_loss(*args, MASK, kind=kind, k=k, **options)
    truth = divergence(*z, kind, k=K)
    assert within(found.divergence[MASK], truth[MASK])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("change", [{}, CHANGES["caps"], CHANGES["padded"], CHANGES["biases"]])
def test_gradient_is_the_students_alone(options: dict[str, Any], change: dict[str, Any]) -> None:
    args, more = changed(change)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(1))

    def leaves(dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
        student, head, teacher, teacher_head = args
        heads = [in_dtype(x, dtype) for x in (head, teacher_head)]
        heads = [x._replace(weight=x.weight.clone().requires_grad_()) for x in heads]
        heads = [x if x.bias is None else x._replace(bias=x.bias.clone().requires_grad_()) for x in heads]
        hidden = [h.to(dtype).clone().requires_grad_() for h in (student, teacher)]
        return (hidden[0], heads[0], hidden[1], heads[1]), [
            x for side in (0, 1) for x in (hidden[side], *heads[side][:2]) if x is not None
        ]

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        (student, head, teacher, teacher_head), found = leaves(dtype)
        values = divergence(logits(student, head, **more), logits(teacher, teacher_head, **more), **options)
        (values * weights.to(dtype))[MASK].mean().backward()
        return [x.grad for x in found[: len(found) // 2] if x.grad is not None]

    truth, plain = gradients(torch.float64), gradients(torch.float32)
    given_args, found = leaves(torch.float32)
    distillation_loss(*given_args, MASK, weights=weights, **options, **more).loss.backward()
    ours, theirs = found[: len(found) // 2], found[len(found) // 2 :]
    assert all(x.grad is None for x in theirs)
    for got, exact, usual in zip(ours, truth, plain, strict=True):
        assert got.grad is not None
        allowed = (usual.double() - exact).norm() + 1e-6 * exact.norm()
        assert (got.grad.double() - exact).norm() <= allowed


def test_gradcheck_in_float64() -> None:
    student, head, teacher, teacher_head = made(5)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return distillation_loss(
            hidden, Head(weight, softcap=5.0), teacher, teacher_head, MASK, kind="jsd", beta=0.3
        ).loss

    assert torch.autograd.gradcheck(loss, (student.requires_grad_(), head.weight.requires_grad_()))


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("change", [{}, CHANGES["caps"], CHANGES["biases"], CHANGES["temperature"]])
def test_the_same_as_trls(beta: float, change: dict[str, Any]) -> None:
    (student, head, teacher, teacher_head), more = changed(change)
    student.requires_grad_()
    head.weight.requires_grad_()
    theirs, entropies, count = _chunked_divergence_loss(
        student, teacher, head.weight, teacher_head.weight, MASK, beta, 7,
        student_lm_head_bias=head.bias, teacher_lm_head_bias=teacher_head.bias,
        student_logit_scale=head.logit_scale, teacher_logit_scale=teacher_head.logit_scale,
        student_final_logit_softcapping=head.softcap, teacher_final_logit_softcapping=teacher_head.softcap, **more,
    )  # fmt: skip
    found = distillation_loss(
        student, head, teacher, teacher_head, MASK, kind="jsd", beta=beta, denominator=7.0, **more
    )
    torch.testing.assert_close(found.loss, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.entropy.sum(), entropies, rtol=1e-5, atol=1e-5)
    assert count == MASK.sum()
    for leaf in (student, head.weight):
        ours, trls = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (found.loss, theirs))
        torch.testing.assert_close(ours, trls, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_same_as_gkds(beta: float) -> None:
    (student, head, teacher, teacher_head), _ = changed({})
    labels = torch.where(MASK, 1, -100)
    z = logits(student, head), logits(teacher, teacher_head)
    theirs = GKDTrainer.generalized_jsd_loss(*z, labels=labels, beta=beta, temperature=0.8)
    found = distillation_loss(student, head, teacher, teacher_head, MASK, kind="jsd", beta=beta, temperature=0.8)
    torch.testing.assert_close(found.loss, theirs, rtol=1e-5, atol=1e-6)


def test_it_keeps_the_digits_that_trls_loses() -> None:
    g = torch.Generator().manual_seed(0)
    weight, hidden = torch.randn(4096, 64, generator=g), 0.4 * torch.randn(4, 16, 64, generator=g)
    other = weight + 3e-5 * torch.randn(weight.shape, generator=g)
    mask = torch.ones(4, 16, dtype=torch.bool)
    truth = divergence(hidden.double() @ weight.double().T, hidden.double() @ other.double().T, "forward_kl")
    assert truth.max() < 1e-6
    found = distillation_loss(hidden, Head(weight), hidden, Head(other), mask).divergence
    assert within(found, truth)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    rows = hidden.view(-1, 64)
    theirs = ChunkedDivergenceFunction.apply(rows, weight, None, rows, other, None, 0.0)[0].view(mask.shape)
    assert not within(theirs, truth)


@pytest.mark.parametrize("loss_agg", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum", "none"])
def test_averages(loss_agg: str) -> None:
    (student, head, teacher, teacher_head), _ = changed({})
    weights = torch.rand(B, T)
    found = distillation_loss(student, head, teacher, teacher_head, MASK, weights=weights, loss_agg=loss_agg)
    each, n = found.divergence * weights, MASK.sum(1)
    expected = {
        "token-mean": each.sum() / MASK.sum(),
        "seq-mean-token-mean": (each.sum(1) / n).mean(),
        "seq-mean-token-sum": each.sum(1).mean(),
        "token-sum": each.sum(),
        "none": each,
    }[loss_agg]
    torch.testing.assert_close(found.loss, expected)
    assert not found.divergence.requires_grad and not found.entropy.requires_grad


@given(st.integers(0, 2**B * 2**T - 1), st.floats(0.05, 0.95))
@settings(max_examples=25, deadline=None)
def test_what_is_masked_is_not_read(bits: int, beta: float) -> None:
    mask = torch.tensor([(bits >> i) % 2 for i in range(B * T)]).view(B, T).bool()
    (student, head, teacher, teacher_head), _ = changed({})
    clean = student.clone().requires_grad_()
    poisoned = torch.where(mask[..., None], student, torch.nan).requires_grad_()
    theirs = torch.where(mask[..., None], teacher, torch.nan)
    weights = torch.where(mask, 1.5, torch.nan)
    runs: list[Distillation] = [
        distillation_loss(a, head, b, teacher_head, mask, kind="jsd", beta=beta, weights=weights)
        for a, b in ((clean, teacher), (poisoned, theirs))
    ]
    assert torch.equal(runs[0].loss, runs[1].loss) and torch.isfinite(runs[0].loss)
    for run in runs:
        run.loss.backward()
    assert clean.grad is not None and poisoned.grad is not None
    assert torch.equal(clean.grad, poisoned.grad) and not clean.grad[~mask].any()


def test_the_ends_of_beta_are_the_kls() -> None:
    args, _ = changed({})
    for beta, kind in ((0, "forward_kl"), (1.0, "reverse_kl")):
        found, expected = (distillation_loss(*args, MASK, kind=x, beta=beta) for x in ("jsd", kind))
        assert torch.equal(found.divergence, expected.divergence)


def test_all_words_apart_are_the_forward_kl() -> None:
    args, _ = changed({})
    found, expected = (distillation_loss(*args, MASK, **x) for x in ({"kind": "topk", "k": V + 1}, {}))
    torch.testing.assert_close(found.divergence, expected.divergence, rtol=1e-5, atol=1e-6)


def test_no_tokens_give_a_zero_that_can_be_differentiated() -> None:
    (student, head, teacher, teacher_head), _ = changed({})
    student.requires_grad_()
    head.weight.requires_grad_()
    loss = distillation_loss(student, head, teacher, teacher_head, torch.zeros_like(MASK)).loss
    loss.backward()
    assert loss == 0 and not student.grad.any() and not head.weight.grad.any()  # type: ignore[union-attr]


def test_a_student_that_is_its_teacher_has_nothing_to_learn() -> None:
    (student, head, _, _), _ = changed({})
    for options in OPTIONS.values():
        leaf = student.clone().requires_grad_()
        found = distillation_loss(leaf, head, student, head, MASK, **options)
        found.loss.backward()
        assert found.loss <= 1e-8 and leaf.grad is not None and leaf.grad.abs().max() < 1e-6


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "kl"}, "kind: got 'kl', takes one of"),
    "beta below 0": ({"kind": "jsd", "beta": -0.1}, "beta: got -0.1, takes a number from 0 to 1"),
    "beta above 1": ({"kind": "jsd", "beta": 1.1}, "beta: got 1.1, takes a number from 0 to 1"),
    "beta": ({"kind": "jsd", "beta": math.nan}, "beta: got nan"),
    "temperature": ({"temperature": 0.0}, "temperature: got 0.0"),
    "no k": ({"kind": "topk"}, "k: got None"),
    "k of another": ({"kind": "jsd", "k": 3}, "k: got 3, takes None"),
    "k 0": ({"kind": "topk", "k": 0}, "k: got 0"),
    "weights": ({"weights": torch.ones(B, T + 1)}, r"weights: got shape \[3, 6\], takes \[3, 5\]"),
    "loss_agg": ({"loss_agg": "mean"}, "loss_agg: got 'mean'"),
    "denominator": ({"denominator": 0.0}, "denominator: got 0.0"),
    "vocab_size": ({"vocab_size": V + 1}, f"vocab_size: got {V + 1}"),
    "backend": ({"backend": "cuda"}, "backend: got 'cuda'"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    args, _ = changed({})
    with pytest.raises(ValueError, match=message):
        distillation_loss(*args, MASK, **options)


def test_bad_shapes() -> None:
    (student, head, teacher, teacher_head), _ = changed({})
    with pytest.raises(ValueError, match=r"teacher: got shape \[3, 4, 20\] beside a mask of \[3, 5\]"):
        distillation_loss(student, head, teacher[:, :4], teacher_head, MASK)
    with pytest.raises(ValueError, match=r"student: got shape \[15, 12\] beside a mask of \[15\]"):
        distillation_loss(student.view(-1, D), head, teacher.view(-1, E), teacher_head, MASK.view(-1))
    with pytest.raises(ValueError, match="vocab_size"):
        distillation_loss(student, head, teacher, teacher_head._replace(weight=teacher_head.weight[:90]), MASK)
    with pytest.raises(ValueError, match="takes"):
        distillation_loss(student, head, teacher, Head(head.weight), MASK)


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl"])
def test_the_head_of_a_model(family: str) -> None:
    model, _ = families.build(family)
    head = Head.of(model)
    assert head.weight is model.get_output_embeddings().weight and head.bias is None and head.logit_scale == 1.0
    assert head.softcap == getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def test_weights_of_tokens() -> None:
    scores = torch.tensor(
        [[0.1, 0.9, 0.0, 0.5, 0.2], [3.0, torch.nan, 1.0, 2.0, torch.inf], [0.0, 7, 7, 7, 7], [1.0] * 5]
    )
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    found = visual_weights(scores, mask, share=0.3, mass=0.5)
    expected = torch.tensor([[5 / 6, 1.25, 5 / 6, 1.25, 5 / 6], [1.5, 0, 0.75, 0.75, 0], [1, 0, 0, 0, 0], [0] * 5])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(visual_weights(scores, mask, share=0.4, mass=0.4)[0], torch.ones(5))
    with pytest.raises(ValueError, match=r"mass: got 1\.5"):
        visual_weights(scores, mask, mass=1.5)


@given(st.integers(0, 10**6), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=50, deadline=None)
def test_weights_have_the_mean_1(seed: int, share: float, mass: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores, mask = torch.rand(4, 9, generator=g), torch.rand(4, 9, generator=g) < 0.7
    weights = visual_weights(scores, mask, share=share, mass=mass)
    torch.testing.assert_close(weights.sum(1), mask.sum(1).float(), rtol=1e-5, atol=1e-5)
    assert not weights[~mask].any() and (weights >= 0).all()
