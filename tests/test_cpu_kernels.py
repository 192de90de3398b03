"""What a CPU computes by our own hand: linear layers by oneDNN, dropout, and attention with dropout."""

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
    """Within the dtype's tolerance of the largest number."""
    return bool((mine.double() - exact).abs().max() <= TOLERANCE[mine.dtype] * exact.abs().max())


def leaves(parts: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies that want gradients."""
    return [part.to(dtype, copy=True).requires_grad_() for part in parts]


# --- linear layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_a_linear_layer_and_its_gradients_are_those_of_float64(tokens: int, dtype: torch.dtype) -> None:
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


def test_no_product_is_given_rows_with_gaps_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be right, and so slow that nobody would wait for it: such rows are copied first."""
    seen: list[Tensor] = []

    def watched(input_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        seen.extend((input_TI, weight_OI))
        return product(input_TI, weight_OI, bias_O)

    monkeypatch.setattr("bionemo_esm.model.cpu_kernels.product", watched)
    wide, weight, bias = torch.randn(40, 1, 64), torch.randn(16, 24, requires_grad=True), torch.randn(16)
    output = linear(wide[..., :24].requires_grad_(), weight, bias)
    assert torch.allclose(output, reference_linear(wide[..., :24], weight, bias), atol=1e-5)
    torch.cat([output, torch.randn(40, 1, 16)], dim=-1).backward(torch.randn(40, 1, 32))  # gives a part of wider rows
    assert len(seen) == 2 * 3
    assert all(matrix.is_contiguous() or matrix.t().is_contiguous() for matrix in seen)


def test_nothing_is_computed_for_what_is_frozen() -> None:
    weight, bias = torch.randn(8, 4), torch.randn(8)
    given = torch.randn(3, 1, 4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        linear(given, weight, bias).sum().backward()
    (products,) = (event.count for event in seen.key_averages() if event.key == "mkldnn::_linear_pointwise")
    assert products == 2  # the output, and the gradient of the input
    assert weight.grad is bias.grad is None


def test_every_large_product_of_a_step_is_onednns() -> None:
    """MKL, to which PyTorch gives float32, is half as fast on AMD's processors."""
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
def test_a_share_is_dropped_and_the_rest_scaled_so_that_the_mean_stays(probability: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    scales = dropout_scale((400, 500), probability, dtype)
    kept = torch.tensor(1 / (1 - round(probability * 65536) / 65536), dtype=torch.float64).to(dtype)
    assert set(scales.unique().tolist()) == {0.0, kept.item()}
    deviation = (probability * (1 - probability) / scales.numel()) ** 0.5
    assert (scales == 0).double().mean().item() == pytest.approx(probability, abs=5 * deviation)


def test_what_is_dropped_follows_from_pytorchs_seed_and_is_another_at_every_call() -> None:
    torch.manual_seed(3)
    first, second = dropout_scale((64, 64), 0.3, torch.float32), dropout_scale((64, 64), 0.3, torch.float32)
    torch.manual_seed(3)
    assert torch.equal(first, dropout_scale((64, 64), 0.3, torch.float32))
    assert not torch.equal(first, second)


def test_both_precisions_drop_the_same() -> None:
    torch.manual_seed(3)
    wide = dropout_scale((33, 7), 0.3, torch.float32)
    torch.manual_seed(3)
    assert torch.equal(wide == 0, dropout_scale((33, 7), 0.3, torch.bfloat16) == 0)


@pytest.mark.parametrize("shape", [(0, 5), (1,), (3,), (5, 1, 3), (2, 4)])
def test_any_shape_is_filled(shape: tuple[int, ...]) -> None:
    scales = dropout_scale(shape, 0.5, torch.float32)
    assert scales.shape == shape
    assert set(scales.unique().tolist()) <= {0.0, 2.0}


def test_draws_do_not_hang_together() -> None:
    """Neither neighbours, nor the four draws of a word, nor rows of an activation, nor one call with the next."""
    torch.manual_seed(0)
    size = 2**20
    one, other = ((dropout_scale((size,), 0.5, torch.float64) - 1) for _ in range(2))
    for lag in (1, 2, 64, 768, size // 4, size // 2, 3 * size // 4):
        assert abs((one[lag:] * one[:-lag]).mean().item()) < 5 / (size - lag) ** 0.5, lag
    assert abs((one * other).mean().item()) < 5 / size**0.5


def test_dropout_is_for_training() -> None:
    layer, ones = Dropout(0.5), torch.ones(100, 10)
    assert set(layer(ones).unique().tolist()) == {0.0, 2.0}
    assert layer.eval()(ones) is ones


def test_output_bias_and_residual_are_added_with_what_is_kept() -> None:
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


def test_without_gradients_the_residual_is_left_as_it_was() -> None:
    output, residual = torch.ones(4, 1, 2), torch.ones(4, 1, 2)
    with torch.no_grad():
        assert get_dropout_add(False, False)((output, None), residual, 0.0).eq(2).all()
    assert residual.eq(1).all()


# --- attention with dropout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_drops_weights_as_the_formula_does(dtype: torch.dtype, dropout: float) -> None:
    """softmax(q k^T / sqrt(D)) with some weights dropped, times v; in float64, with what our draws keep."""
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
    drawn = (9, 4) if dtype == torch.float32 else (32, 32)  # bfloat16 computes padded lengths
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


def test_the_gpus_nested_kernel_answers_at_some_places_as_the_cpus_does() -> None:
    """Which the last block asks for in training; run here on a CPU, gradients included."""
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
