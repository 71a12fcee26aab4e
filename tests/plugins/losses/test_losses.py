"""Claim: the chunked loss has the plain loss's numbers, without its logits and without a sync."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pegboard import Batch, Head, Targets
from pegboard_plugins.losses.component import ChunkedCrossEntropy, CrossEntropy

T, K, D, V = 13, 7, 5, 11

Inputs = tuple[Tensor, Tensor, Tensor | None, Targets]


def make_chunked(chunk_size: int | str = "auto") -> Any:
    config = ChunkedCrossEntropy.Config.model_validate({"chunk_size": chunk_size})
    return ChunkedCrossEntropy(config).build()


def make_full() -> Any:
    return CrossEntropy(CrossEntropy.Config()).build()


def make_inputs(
    *,
    tokens: int = T,
    labels: int = K,
    size: int = D,
    words: int = V,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden_TD = normal(tokens, size).to(dtype).requires_grad_()
    weight_VD = (normal(words, size) / size**0.5).to(dtype).requires_grad_()
    bias_V = normal(words).to(dtype).requires_grad_() if bias else None
    targets = Targets(
        positions_K=torch.randperm(tokens, generator=generator)[:labels].sort().values,
        labels_K=torch.randint(words, (labels,), generator=generator),
        weights_K=torch.rand(labels, generator=generator) + 0.1,
        source_ids_K=torch.zeros(labels, dtype=torch.int64),
        scale=0.37,
    )
    return hidden_TD, weight_VD, bias_V, targets


def make_head(weight_VD: Tensor, bias_V: Tensor | None) -> Head:
    return Head(weight_VD, bias_V, lambda rows: F.linear(rows, weight_VD, bias_V))


def run(
    loss_fn: Any, inputs: Inputs, factor: float = 1.0
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    hidden_TD, weight_VD, bias_V, targets = inputs
    output = loss_fn(hidden_TD, make_head(weight_VD, bias_V), targets)
    leaves = [
        part for part in (hidden_TD, weight_VD, bias_V) if part is not None and part.requires_grad
    ]
    gradients = torch.autograd.grad(output.loss * factor, leaves)
    return output.loss.detach(), output.token_losses_K, list(gradients)


def assert_same(
    ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None], bound: float = 1e-12
) -> None:
    assert len(ours) == len(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert left is not None and right is not None
        assert left.dtype == right.dtype
        torch.testing.assert_close(left, right, rtol=0, atol=bound)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_size", [*range(1, K + 2), "auto"])
def test_every_chunk_size_gives_the_plain_loss_and_its_gradients(
    chunk_size: int | str, bias: bool
) -> None:
    inputs = make_inputs(bias=bias)
    full = run(make_full(), inputs, factor=1.7)
    chunked = run(make_chunked(chunk_size), inputs, factor=1.7)
    assert_same([chunked[0], chunked[1], *chunked[2]], [full[0], full[1], *full[2]])


def test_the_plain_loss_is_the_scaled_weighted_sum_written_out() -> None:
    hidden_TD, weight_VD, bias_V, targets = make_inputs()
    assert bias_V is not None
    expected = 0.0
    for position, label, weight in zip(*(t.tolist() for t in targets[:3]), strict=True):
        row = (weight_VD @ hidden_TD[position] + bias_V).tolist()
        expected += weight * (math.log(sum(math.exp(value) for value in row)) - row[label])
    got = make_full()(hidden_TD, make_head(weight_VD, bias_V), targets).loss
    assert got.item() == pytest.approx(expected * targets.scale, abs=1e-12)


def test_the_gradients_are_the_finite_differences_of_the_loss() -> None:
    hidden_TD, weight_VD, bias_V, targets = make_inputs()
    loss_fn = make_chunked(3)
    (_, _, gradients) = run(loss_fn, (hidden_TD, weight_VD, bias_V, targets))
    step = 1e-6
    for leaf, gradient in zip((hidden_TD, weight_VD, bias_V), gradients, strict=True):
        assert leaf is not None and gradient is not None
        direction = torch.randn(
            leaf.shape, dtype=leaf.dtype, generator=torch.Generator().manual_seed(1)
        )
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * step * direction
                values.append(loss_fn(hidden_TD, make_head(weight_VD, bias_V), targets).loss)
                leaf -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(slope, (gradient * direction).sum(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("loss_fn", [make_full(), make_chunked(2)], ids=["full", "chunked"])
def test_no_targets_give_a_zero_loss_that_reaches_hidden_head_and_bias(loss_fn: Any) -> None:
    hidden_TD, weight_VD, bias_V, targets = make_inputs(labels=0)
    with torch.no_grad():
        hidden_TD[0] = math.inf
    loss, token_losses_K, gradients = run(loss_fn, (hidden_TD, weight_VD, bias_V, targets))
    assert loss.item() == 0.0
    assert token_losses_K.shape == (0,)
    assert [g.shape for g in gradients if g is not None] == [(T, D), (V, D), (V,)]
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_a_frozen_part_changes_no_other_gradient(frozen: str) -> None:
    inputs = make_inputs()
    inputs[["hidden", "weight", "bias"].index(frozen)].requires_grad_(False)  # type: ignore[union-attr]
    full, chunked = run(make_full(), inputs), run(make_chunked(3), inputs)
    assert len(chunked[2]) == 2
    assert_same(chunked[2], full[2])


def test_losses_stay_apart_by_rows_without_a_label() -> None:
    inputs = make_inputs()
    _, _, gradients = run(make_chunked(3), inputs)
    assert gradients[0] is not None
    supervised = set(inputs[3].positions_K.tolist())
    assert {row for row in range(T) if gradients[0][row].any()} == supervised


@pytest.mark.parametrize("chunk_size", [16, 37, 128])
def test_bf16_gradients_are_as_near_to_exact_as_the_plain_loss_has_them(chunk_size: int) -> None:
    inputs = make_inputs(tokens=512, labels=256, size=128, words=1024, dtype=torch.bfloat16)
    wide = tuple(part.detach().double().requires_grad_() for part in inputs[:3] if part is not None)
    exact = run(make_full(), (*wide, inputs[3]))  # type: ignore[arg-type]
    full, chunked = run(make_full(), inputs), run(make_chunked(chunk_size), inputs)
    assert chunked[0].dtype == chunked[1].dtype == torch.float32
    for truth, plain, ours in zip(exact[2], full[2], chunked[2], strict=True):
        assert truth is not None and plain is not None and ours is not None
        assert ours.dtype == torch.bfloat16
        error_full, error_ours = (plain.double() - truth).norm(), (ours.double() - truth).norm()
        assert error_full > 0
        assert error_ours <= 1.1 * error_full


class Watch(TorchDispatchMode):
    """Shows every operation's name (before) and result (after) to a function."""

    def __init__(self, see: Callable[[str, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.see = see

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        self.see(name, None)
        result = func(*args, **(kwargs or {}))
        self.see(name, result)
        return result


def largest_result(loss_fn: Any, inputs: Inputs) -> int:
    """Most elements that any operation of forward and backward returned."""
    numels = [0]

    def see(name: str, result: Any) -> None:
        results = result if isinstance(result, (tuple, list)) else (result,)
        numels.extend(value.numel() for value in results if isinstance(value, Tensor))

    with Watch(see):
        run(loss_fn, inputs)
    return max(numels)


def refuse_sync(name: str, result: Any) -> None:
    del result
    syncs = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select")
    assert name not in syncs, f"{name} waits for the device"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_chunk_or_the_weight(dtype: torch.dtype) -> None:
    inputs = make_inputs(tokens=64, labels=48, size=8, words=100, dtype=dtype)
    assert largest_result(make_full(), inputs) == 48 * 100
    assert largest_result(make_chunked(6), inputs) <= max(6 * 100, 8 * 100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="waits"), Watch(refuse_sync):
        torch.ones(()).item()
    inputs = make_inputs(dtype=dtype)
    with Watch(refuse_sync):
        run(make_chunked(3), inputs)


@pytest.mark.parametrize(
    ("mode", "per_chunk"), [("eval", 1), ("weight", 2), ("hidden", 2), ("train", 3)]
)
def test_gradients_that_nobody_wants_are_not_made(mode: str, per_chunk: int) -> None:
    hidden_TD, weight_VD, _, targets = make_inputs(bias=False, labels=6)
    hidden_TD.requires_grad_(mode != "weight")
    weight_VD.requires_grad_(mode != "hidden")
    products = []

    def see(name: str, result: Any) -> None:
        if result is not None and name in ("mm", "addmm", "addmm_"):
            products.append(name)

    with torch.set_grad_enabled(mode != "eval"), Watch(see):
        output = make_chunked(3)(hidden_TD, make_head(weight_VD, None), targets)
    assert len(products) == 2 * per_chunk
    assert output.loss.requires_grad == (mode != "eval")
    assert not output.token_losses_K.requires_grad


def test_auto_sizes_a_chunk_by_its_bytes_and_evens_it_out() -> None:
    loss_fn = make_chunked()
    hidden_KD = torch.empty(2048, 1, dtype=torch.bfloat16)
    assert loss_fn._rows(hidden_KD, 151936) == 256  # 276 fit, in 8 chunks
    assert loss_fn._rows(hidden_KD, 1000) == 2048
    assert loss_fn._rows(hidden_KD[:0], 1000) == 1


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden_TD, weight_VD, bias_V, targets = make_inputs()
    loss = make_chunked(3)(hidden_TD, make_head(weight_VD, bias_V), targets).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("loss_fn", [make_full(), make_chunked()], ids=["full", "chunked"])
def test_step_counts_are_the_sum_of_weights(loss_fn: Any) -> None:
    targets = make_inputs()[3]
    batch = Batch(
        input_ids_T=torch.zeros(T, dtype=torch.int64),
        position_ids_T=torch.arange(T),
        cu_seqlens=torch.tensor([0, T], dtype=torch.int32),
        max_seqlen=T,
        targets=targets,
        num_tokens=T,
    )
    counts = loss_fn.step_counts(batch)
    assert set(counts) == {"targets"}
    assert isinstance(counts["targets"], float)
    assert counts["targets"] == pytest.approx(math.fsum(targets.weights_K.tolist()), abs=1e-12)


@pytest.mark.parametrize("size", [0, -1, "all", 2.5, None])
def test_a_chunk_size_is_a_positive_count_or_auto(size: Any) -> None:
    with pytest.raises(ValidationError):
        ChunkedCrossEntropy.Config.model_validate({"chunk_size": size})
