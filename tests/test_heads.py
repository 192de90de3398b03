"""Heads over packed rows: independence of proteins, and agreement with PyTorch's padded layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, gelu, linear, relu

from bionemo_esm.errors import ConfigError
from bionemo_esm.finetuning.config import POOLINGS, HeadConfig
from bionemo_esm.finetuning.heads import Head, PackedConvolution, Pooling, Segments, build_head, head_shapes
from bionemo_esm.finetuning.tasks import Task

LENGTHS = (1, 5, 2, 40, 3, 1, 17)
"""Residues per protein: one, fewer than the kernel size, and many."""
FEATURES = 6
RESIDUE = Task(
    name="structure", level="residue", kind="classification", metric="accuracy", classes=("helix", "strand", "coil")
)
SEQUENCE = Task(
    name="location", level="sequence", kind="classification", metric="accuracy", classes=("inside", "outside")
)
NUMBER = Task(name="melting", level="sequence", kind="regression", metric="mse", target_mean=50.0, target_scale=10.0)
CASES = [
    *((kind, RESIDUE, "mean") for kind in ("linear", "mlp", "convnet")),
    *((kind, SEQUENCE, pooling) for kind in ("linear", "mlp", "convnet") for pooling in POOLINGS),
    ("attention", NUMBER, "mean"),
]
case_of = pytest.mark.parametrize(("kind", "task", "pooling"), CASES, ids=lambda part: getattr(part, "level", part))


def bounds_of(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def rows(lengths: Sequence[int] = LENGTHS, features: int = FEATURES, seed: int = 0) -> Tensor:
    return torch.randn(sum(lengths), features, generator=torch.Generator().manual_seed(seed))


def head_of(kind: str, task: Task, pooling: str = "mean", **values: Any) -> Head:
    torch.manual_seed(3)
    return build_head(HeadConfig(kind=kind, pooling=pooling, **{"hidden": 5, **values}), task, FEATURES).eval()


def answers_and_gradients(head: Head, features: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return predictions, and the gradient by the features of a sum that weights each prediction differently."""
    seen = features.clone().requires_grad_()
    answers = head(seen, bounds_of(lengths))
    (gradient,) = torch.autograd.grad(answers.sin().sum(), seen)
    return answers.detach(), gradient


@case_of
def test_predictions_in_a_row_equal_those_of_each_protein_alone(kind: str, task: Task, pooling: str) -> None:
    head, features = head_of(kind, task, pooling), rows()
    together, gradients = answers_and_gradients(head, features, LENGTHS)
    assert together.dtype == torch.float32
    assert together.shape == (sum(LENGTHS) if task.is_per_residue else len(LENGTHS), task.outputs)
    pieces = zip(features.split(LENGTHS), gradients.split(LENGTHS), LENGTHS, strict=True)
    alone = []
    for piece, gradient, length in pieces:
        answer, own_gradient = answers_and_gradients(head, piece, [length])
        alone.append(answer)
        assert own_gradient.abs().max() > 1e-4
        assert torch.allclose(gradient, own_gradient, atol=1e-6)
    assert torch.allclose(together, torch.cat(alone), atol=1e-6)
    assert together.std(dim=0).min() > 1e-3


@case_of
def test_a_protein_does_not_affect_its_neighbours(kind: str, task: Task, pooling: str) -> None:
    head, features = head_of(kind, task, pooling), rows()
    other = features.clone()
    other[8:48] = 1e6  # the fourth protein (40 residues)
    other[8], other[47] = float("nan"), float("inf")
    before, after = (head(values, bounds_of(LENGTHS)) for values in (features, other))
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert set(changed) <= (set(range(8, 48)) if task.is_per_residue else {3})
    assert changed


@case_of
def test_bfloat16_features_are_computed_in_float32(kind: str, task: Task, pooling: str) -> None:
    head, narrow = head_of(kind, task, pooling), rows().bfloat16()
    assert torch.equal(head(narrow, bounds_of(LENGTHS)), head(narrow.float(), bounds_of(LENGTHS)))
    assert {parameter.dtype for parameter in head.parameters()} == {torch.float32}


@case_of
def test_every_parameter_gets_a_gradient(kind: str, task: Task, pooling: str) -> None:
    head = head_of(kind, task, pooling)
    head(rows(), bounds_of(LENGTHS)).sin().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-5, name


@case_of
def test_shapes_are_computed_without_drawing_random_numbers(kind: str, task: Task, pooling: str) -> None:
    head, state = head_of(kind, task, pooling), torch.get_rng_state()
    config = HeadConfig(kind=kind, pooling=pooling, hidden=5)
    shapes = head_shapes(config, task, FEATURES)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert torch.equal(torch.get_rng_state(), state)


@case_of
def test_a_seed_determines_the_initial_head(kind: str, task: Task, pooling: str) -> None:
    one, same = head_of(kind, task, pooling), head_of(kind, task, pooling)
    other = build_head(HeadConfig(kind=kind, pooling=pooling, hidden=5), task, FEATURES)
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
        assert not torch.equal(parameter, other.get_parameter(name))


@pytest.mark.parametrize(
    ("kind", "task"),
    [("mlp", RESIDUE), ("mlp", SEQUENCE), ("convnet", RESIDUE), ("convnet", SEQUENCE), ("attention", SEQUENCE)],
    ids=lambda part: getattr(part, "level", part),
)
def test_dropout_is_active_in_training_only(kind: str, task: Task) -> None:
    head, bounds = head_of(kind, task, dropout=0.5), bounds_of(LENGTHS)
    assert torch.equal(head(rows(), bounds), head(rows(), bounds))
    head.train()
    assert not torch.equal(head(rows(), bounds), head(rows(), bounds))


def shapes_of(config: HeadConfig, task: Task) -> dict[str, tuple[int, ...]]:
    """Return a head's shapes without `shift` and `scale`, which every head has."""
    shapes = head_shapes(config, task, FEATURES)
    assert (shapes.pop("shift"), shapes.pop("scale")) == ((FEATURES,), (FEATURES,))
    return shapes


def test_parameter_names_match_the_archive_format() -> None:
    named = {(kind, task.level, pooling): sorted(shapes_of(HeadConfig(kind=kind, hidden=5, pooling=pooling), task))
             for kind, task, pooling in CASES}  # fmt: skip
    output, convolution, hidden = ([f"{part}.bias", f"{part}.weight"] for part in ("output", "convolution", "hidden"))
    assert named["linear", "residue", "mean"] == named["linear", "sequence", "max"] == output
    assert named["linear", "sequence", "attention"] == [*output, "pooling.score.weight"]
    assert named["mlp", "residue", "mean"] == named["mlp", "sequence", "mean"] == [*hidden, *output]
    assert named["convnet", "residue", "mean"] == [*convolution, *output]
    assert named["convnet", "sequence", "max"] == [*convolution, *output, "widening.bias", "widening.weight"]
    assert named["attention", "sequence", "mean"] == [*output, "scores.weight", "values.bias", "values.weight"]


def test_shapes_follow_the_configuration() -> None:
    convnet, attention = (
        HeadConfig(kind="convnet", hidden=5, kernel_size=9),
        HeadConfig(kind="attention", hidden=5, kernel_size=9),
    )
    assert shapes_of(convnet, RESIDUE) == {
        "convolution.weight": (5, 6, 9), "convolution.bias": (5,), "output.weight": (3, 5, 9), "output.bias": (3,),
    }  # fmt: skip
    assert shapes_of(convnet, NUMBER) == {
        "convolution.weight": (5, 6, 9), "convolution.bias": (5,), "widening.weight": (10, 5), "widening.bias": (10,),
        "output.weight": (1, 10), "output.bias": (1,),
    }  # fmt: skip
    assert shapes_of(attention, SEQUENCE) == {
        "values.weight": (5, 6, 9), "values.bias": (5,), "scores.weight": (5, 6, 9),
        "output.weight": (2, 10), "output.bias": (2,),
    }  # fmt: skip


def test_attention_is_refused_for_tasks_per_residue() -> None:
    with pytest.raises(ConfigError, match=r"head\.kind attention .* structure .* take linear, mlp or convnet"):
        build_head(HeadConfig(kind="attention"), RESIDUE, FEATURES)
    with pytest.raises(ConfigError, match=r"head\.kind attention"):
        head_shapes(HeadConfig(kind="attention"), RESIDUE, FEATURES)


@case_of
def test_features_are_standardised_by_the_given_mean_and_deviation(kind: str, task: Task, pooling: str) -> None:
    head, features = head_of(kind, task, pooling), rows()
    mean, deviation = torch.linspace(-3, 3, FEATURES), torch.tensor([0.5, 2.0, 4.0, 1.0, 0.0, 3.0])
    raw = features * deviation + mean  # the fifth feature is constant
    expected = head(torch.where(deviation > 0, features, 0.0), bounds_of(LENGTHS))
    unlike = head(raw, bounds_of(LENGTHS))
    head.standardise(mean.double(), deviation.double())
    assert torch.allclose(head(raw, bounds_of(LENGTHS)), expected, atol=1e-5)
    assert not torch.allclose(unlike, expected, atol=1e-2)
    restored = build_head(HeadConfig(kind=kind, pooling=pooling, hidden=5), task, FEATURES).eval()
    restored.load_state_dict(head.state_dict())
    assert torch.equal(restored(raw, bounds_of(LENGTHS)), head(raw, bounds_of(LENGTHS)))
    raw[:, 4] += 1  # a letter absent from training
    assert (head(raw, bounds_of(LENGTHS)) - expected).abs().max() < 10


# --- comparison with PyTorch's layers for each protein ----------------------------------------------------------------


def padded_twin(head: Head) -> Callable[[Tensor], Tensor]:
    """Return the same head as a function of one protein [R, F], written with `conv1d` and its padding."""
    tensors = head.state_dict()

    def convolved(name: str, piece: Tensor) -> Tensor:
        weight = tensors[f"{name}.weight"]
        return conv1d(piece.T[None], weight, tensors.get(f"{name}.bias"), padding=weight.shape[2] // 2)[0].T

    def dense(name: str, piece: Tensor) -> Tensor:
        return linear(piece, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def answer(piece: Tensor) -> Tensor:
        if "scores.weight" in tensors:
            values, weights = convolved("values", piece), convolved("scores", piece).softmax(dim=0)
            return dense("output", torch.cat([(values * weights).sum(0), values.amax(0)]))[None]
        hidden = relu(convolved("convolution", piece))
        if "widening.weight" not in tensors:
            return convolved("output", hidden)
        return dense("output", relu(dense("widening", hidden)).amax(0))[None]

    return answer


@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize(
    ("kind", "task"),
    [("convnet", RESIDUE), ("convnet", SEQUENCE), ("attention", NUMBER)],
    ids=["residue", "max", "own"],
)
def test_packed_convolutions_match_pytorch_on_each_protein(kind: str, task: Task, kernel_size: int) -> None:
    head, features = head_of(kind, task, "max", kernel_size=kernel_size), rows()
    answers, gradients = answers_and_gradients(head, features, LENGTHS)
    seen, twin = features.clone().requires_grad_(), padded_twin(head)
    expected = torch.cat([twin(piece) for piece in seen.split(LENGTHS)])
    (expected_gradients,) = torch.autograd.grad(expected.sin().sum(), seen)
    assert torch.allclose(answers, expected, atol=1e-6)
    assert torch.allclose(gradients, expected_gradients, atol=1e-6)


def test_weight_gradients_of_a_convolution_match_a_padded_batch() -> None:
    packed, plain = PackedConvolution(FEATURES, 4, 5), torch.nn.Conv1d(FEATURES, 4, 5, padding=2)
    plain.load_state_dict(packed.state_dict())
    features = rows()
    packed(features, Segments.of(bounds_of(LENGTHS), len(features))).sin().sum().backward()
    padded = torch.nn.utils.rnn.pad_sequence(features.split(LENGTHS), batch_first=True)
    answered = plain(padded.transpose(1, 2)).transpose(1, 2)
    sum(answer[:length].sin().sum() for answer, length in zip(answered, LENGTHS, strict=True)).backward()
    for name, parameter in packed.named_parameters():
        assert torch.allclose(parameter.grad, plain.get_parameter(name).grad, atol=1e-5)


def test_the_linear_head_and_the_mlp_match_their_formulas() -> None:
    features = rows()
    flat, deep = head_of("linear", RESIDUE), head_of("mlp", SEQUENCE, "mean")
    tensors = flat.state_dict() | {f"deep.{name}": tensor for name, tensor in deep.state_dict().items()}
    expected = linear(features, tensors["output.weight"], tensors["output.bias"])
    assert torch.equal(flat(features, bounds_of(LENGTHS)), expected)
    means = torch.stack([piece.mean(0) for piece in features.split(LENGTHS)])
    hidden = gelu(linear(means, tensors["deep.hidden.weight"], tensors["deep.hidden.bias"]))
    expected = linear(hidden, tensors["deep.output.weight"], tensors["deep.output.bias"])
    assert torch.allclose(deep(features, bounds_of(LENGTHS)), expected, atol=1e-6)


# --- pooling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_matches_each_protein_alone(kind: str) -> None:
    pooling, features = Pooling(kind, FEATURES), rows()
    found = pooling(features, Segments.of(bounds_of(LENGTHS), len(features)))
    for protein, piece in zip(found, features.split(LENGTHS), strict=True):
        expected = {
            "mean": lambda piece=piece: piece.mean(0),
            "max": lambda piece=piece: piece.amax(0),
            "attention": lambda piece=piece: (piece * pooling.score(piece).softmax(0)).sum(0),
        }[kind]()
        assert torch.allclose(protein, expected, atol=1e-6)
        if len(piece) == 1 and kind != "attention":
            assert torch.equal(protein, piece[0])


def test_pooling_30_000_residues_is_as_accurate_as_pooling_one() -> None:
    lengths = (30_000, 1)
    features = rows(lengths, 3) + 1
    segments = Segments.of(bounds_of(lengths), sum(lengths))
    exact = features[:30_000].double().mean(0)
    assert torch.allclose(segments.mean(features)[0].double(), exact, rtol=2e-7, atol=0)
    scores = rows(lengths, 3, seed=1)
    exact = (features[:30_000].double() * scores[:30_000].double().softmax(0)).sum(0)
    found = segments.attended(features, scores)
    assert torch.allclose(found[0].double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(found[1], features[30_000])
    assert torch.equal(segments.maximum(features)[0], features[:30_000].amax(0))


def test_attention_pooling_is_finite_for_extreme_scores() -> None:
    values, scores = rows((3, 2), 1), torch.tensor([[1e30], [0.0], [-1e30], [-1e30], [-1e30]])
    seen = scores.requires_grad_()
    found = Segments.of(bounds_of((3, 2)), 5).attended(values, seen)
    assert torch.allclose(found, torch.stack([values[0], values[3:].mean(0)]))
    found.sum().backward()
    assert seen.grad is not None
    assert seen.grad.isfinite().all()


def test_pooling_passes_gradcheck() -> None:
    segments = Segments.of(bounds_of((3, 1, 4)), 8)
    values, scores = (rows((8,), 2, seed=seed).double().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(segments.mean, values)
    assert torch.autograd.gradcheck(segments.maximum, values)
    assert torch.autograd.gradcheck(segments.attended, (values, scores))


@case_of
def test_repeated_runs_give_bit_identical_results(kind: str, task: Task, pooling: str) -> None:
    head, lengths = head_of(kind, task, pooling), LENGTHS * 100
    runs = [answers_and_gradients(head, rows(lengths), lengths) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
