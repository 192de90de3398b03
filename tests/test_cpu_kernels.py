"""Tests of the CPU kernels: linear layers by oneDNN, dropout, and attention with dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as reference_linear
from torch.profiler import ProfilerActivity, profile

from bionemo_esm.alphabet import encode
from bionemo_esm.model.attention import PackedRow, attention_by_sequence, nested_attention
from bionemo_esm.model.backends import choose_backends
from bionemo_esm.model.cpu_kernels import dropout_scale, linear, product
from bionemo_esm.model.encoder import Dropout, get_dropout_add
from models import TINY, tiny_model
from peers import PROTEIN, batch_of

DTYPES = [torch.float32] + ([torch.bfloat16] if choose_backends("cpu", torch.bfloat16, 0.0).linear == "oneDNN" else [])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(mine: Tensor, exact: Tensor) -> bool:
    """Return whether the error is within the tolerance of the dtype, relative to the largest value."""
    return bool((mine.double() - exact).abs().max() <= TOLERANCE[mine.dtype] * exact.abs().max())


def leaves(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return copies that require gradients."""
    return [part.to(dtype, copy=True).requires_grad_() for part in parts]


# --- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_linear_layer_and_its_gradients_equal_float64(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(*shape).to(dtype) for shape in ((tokens, 1, 48), (72, 48), (72,))]
    sent_back = torch.randn(tokens, 1, 72).to(dtype)
    mine, exact = (
        [part.detach().to(kind, copy=True).requires_grad_() for part in parts] for kind in (dtype, torch.float64)
    )
    output, expected = linear(*mine), reference_linear(*exact)
    output.backward(sent_back)
    expected.backward(sent_back.double())
    assert close(output, expected)
    for own, other in zip(mine, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert own.grad.shape == own.shape
        assert close(own.grad, other.grad)


def test_strided_inputs_are_copied_before_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product of strided rows would be correct but very slow."""
    seen: list[Tensor] = []

    def watched(input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        seen.extend((input_TI, weight_OI))
        return product(input_TI, weight_OI, bias_O)

    monkeypatch.setattr("bionemo_esm.model.cpu_kernels.product", watched)
    wide, weight, bias = torch.randn(40, 1, 64), torch.randn(16, 24, requires_grad=True), torch.randn(16)
    output = linear(wide[..., :24].requires_grad_(), weight, bias)
    assert torch.allclose(output, reference_linear(wide[..., :24], weight, bias), atol=1e-5)
    # The gradient of the output is a slice of wider rows.
    torch.cat([output, torch.randn(40, 1, 16)], dim=-1).backward(torch.randn(40, 1, 32))
    assert len(seen) == 2 * 3
    assert all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in seen)


def test_no_gradient_is_computed_for_frozen_weights() -> None:
    weight, bias = torch.randn(8, 4), torch.randn(8)
    given = torch.randn(3, 1, 4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        linear(given, weight, bias).sum().backward()
    (products,) = (event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise")
    assert products == 2  # the output and the gradient of the input
    assert weight.grad is bias.grad is None


def test_every_large_product_of_a_step_uses_onednn() -> None:
    """PyTorch uses MKL for float32, which is half as fast on AMD processors."""
    model = tiny_model().train()
    batch = batch_of([encode(PROTEIN * times) for times in (1, 3, 2)])
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        model(batch).sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["mkldnn::_linear_pointwise"] == TINY["num_layers"] * 4 * 3
    others = [event for event in seen.key_averages(group_by_input_shape=True) if event.key == "aten::mm"]
    assert all(event.input_shapes[0][0] < len(batch.tokens) for event in others), "only the head, which is small"


# --- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("probability", [0.1, 0.5])
def test_dropout_rate_and_scale_are_correct(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    scales = dropout_scale((400, 500), probability, dtype)
    kept = torch.tensor(1 / (1 - round(probability * 65536) / 65536), dtype=torch.float64).to(dtype)
    assert set(scales.unique().tolist()) == {0.0, kept.item()}
    deviation = (probability * (1 - probability) / scales.numel()) ** 0.5
    assert (scales == 0).double().mean().item() == pytest.approx(probability, abs=5 * deviation)


def test_dropout_depends_on_the_seed_of_pytorch_and_differs_between_calls() -> None:
    torch.manual_seed(3)
    first, second = dropout_scale((64, 64), 0.3, torch.float32), dropout_scale((64, 64), 0.3, torch.float32)
    torch.manual_seed(3)
    assert torch.equal(first, dropout_scale((64, 64), 0.3, torch.float32))
    assert not torch.equal(first, second)


def test_float32_and_bfloat16_drop_the_same_elements() -> None:
    torch.manual_seed(3)
    wide = dropout_scale((33, 7), 0.3, torch.float32)
    torch.manual_seed(3)
    assert torch.equal(wide == 0, dropout_scale((33, 7), 0.3, torch.bfloat16) == 0)


@pytest.mark.parametrize("shape", [(0, 5), (1,), (3,), (5, 1, 3), (2, 4)])
def test_dropout_scale_supports_any_shape(shape: tuple[int, ...]) -> None:
    scales = dropout_scale(shape, 0.5, torch.float32)
    assert scales.shape == shape
    assert set(scales.unique().tolist()) <= {0.0, 2.0}


def test_dropout_draws_are_uncorrelated() -> None:
    """Covers neighbours, the four draws of a word, rows of an activation, and consecutive calls."""
    torch.manual_seed(0)
    size = 2**20
    one, other = ((dropout_scale((size,), 0.5, torch.float64) - 1) for _ in range(2))
    for lag in (1, 2, 64, 768, size // 4, size // 2, 3 * size // 4):
        assert abs((one[lag:] * one[:-lag]).mean().item()) < 5 / (size - lag) ** 0.5, lag
    assert abs((one * other).mean().item()) < 5 / size**0.5


def test_dropout_is_off_in_evaluation() -> None:
    layer, ones = Dropout(0.5), torch.ones(100, 10)
    assert set(layer(ones).unique().tolist()) == {0.0, 2.0}
    assert layer.eval()(ones) is ones


def test_output_and_bias_are_dropped_together_and_added_to_the_residual() -> None:
    output, residual = (torch.randn(20, 1, 8, requires_grad=True) for _ in range(2))
    bias = torch.randn(8)
    torch.manual_seed(5)
    added = get_dropout_add(True, False)((output, bias), residual, 0.25)
    torch.manual_seed(5)
    kept = dropout_scale((20, 1, 8), 0.25, torch.float32)
    assert torch.allclose(added, residual + (output + bias) * kept, atol=1e-6)
    added.sum().backward()
    assert output.grad is not None
    assert torch.equal(output.grad, kept)
    assert torch.equal(get_dropout_add(False, False)((output, bias), residual, 0.25), residual + (output + bias))


def test_residual_is_not_modified_without_gradients() -> None:
    output, residual = torch.ones(4, 1, 2), torch.ones(4, 1, 2)
    with torch.no_grad():
        assert get_dropout_add(False, False)((output, None), residual, 0.0).eq(2).all()
    assert residual.eq(1).all()


# --- attention with dropout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_with_dropout_equals_the_formula(dtype: torch.dtype, dropout: float) -> None:
    """softmax(q k^T / sqrt(D)) with dropout, times v, in float64 with the same dropout mask."""
    torch.manual_seed(0)
    lengths, heads, size = (9, 9, 4), 3, 16
    bounds = torch.tensor([0, 9, 18, 22], dtype=torch.int32)
    rows = [torch.randn(22, heads, size).to(dtype) for _ in range(3)]
    layout = PackedRow(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=9, max_seqlen_kv=9)
    mine, exact = (
        [row.detach().to(kind, copy=True).requires_grad_() for row in rows] for kind in (dtype, torch.float64)
    )

    torch.manual_seed(8)
    output = attention_by_sequence(*mine, layout, dropout)
    torch.manual_seed(8)
    drawn = (9, 4) if dtype == torch.float32 else (32, 32)  # bfloat16 uses padded lengths
    kept = [
        *dropout_scale((6, drawn[0], drawn[0]), dropout, dtype)[:, :9, :9].double().split(3),
        dropout_scale((3, drawn[1], drawn[1]), dropout, dtype)[:, :4, :4].double(),
    ]
    pieces = zip(*(row.transpose(0, 1).split(lengths, dim=1) for row in exact), kept, strict=True)
    attended = [((q @ k.mT * size**-0.5).softmax(-1) * keep) @ v for q, k, v, keep in pieces]
    expected = torch.cat(attended, dim=1).transpose(0, 1)

    sent_back = torch.randn(22, heads, size).to(dtype)
    output.backward(sent_back)
    expected.backward(sent_back.double())
    assert output.dtype == dtype
    assert close(output, expected)
    for own, other in zip(mine, exact, strict=True):
        assert own.grad is not None
        assert other.grad is not None
        assert close(own.grad, other.grad)


def test_nested_gpu_attention_at_selected_positions_equals_the_cpu_kernel() -> None:
    """The last block uses it in training. The test runs it on a CPU and compares gradients too."""
    torch.manual_seed(0)
    bounds, places = torch.tensor([0, 9, 18, 22], dtype=torch.int32), torch.tensor([0, 3, 9, 10, 11, 18, 21])
    layout = PackedRow(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=9, max_seqlen_kv=9)
    rows, sent_back = [torch.randn(22, 3, 16) for _ in range(3)], torch.randn(7, 3, 16)
    found = []
    for attend in (attention_by_sequence, nested_attention):
        query, key, value = leaves(rows, torch.float32)
        output = attend(query[places], key, value, layout.query_index(places), 0.0)
        output.backward(sent_back)
        found.append([output, query.grad, key.grad, value.grad])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert torch.allclose(one, other, atol=1e-5)
