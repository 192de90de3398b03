"""Tests of cost estimates: formulas against the counts of PyTorch and against published figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.model.config import RECOMPUTE, EncoderConfig
from bionemo_esm.model.costs import CHOSEN_SHARE, memory_per_device, parameters_per_device, training_flops
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.pretraining.hardware import DEVICES, find_device, memory_bytes, peak_flops
from runs import ROOT, composed

SMALL = EncoderConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=256, attention_dropout=0.0)
WIDER = SMALL.replace(num_layers=3, hidden_size=96, num_attention_heads=6, ffn_hidden_size=288, hidden_dropout=0.0)
ESM1B = SMALL.replace(embedding_layernorm=True, token_dropout=True)
ESM2 = SMALL.replace(token_dropout=True, position_embedding="rotary", hidden_dropout=0.0)
LENGTHS = (148, 250, 98, 30)  # residues
SQUARES = sum((length + 2) ** 2 for length in LENGTHS)


def model_of(config: EncoderConfig, precision: str = "32") -> ESM1nvModel:
    settings = {"encoder": config.to_dict(), "precision": precision, "seed": 1}
    model = ESM1nvModel(OmegaConf.create(settings)).train()
    assert model.encoder is not None
    model.encoder.pads_rows = False  # the counts are of the tokens that there are
    return model


def row() -> PackedBatch:
    """Return a packed row of four sequences with 15% of the tokens as targets."""
    residues = np.random.default_rng(0).integers(4, 24, sum(LENGTHS)).astype(np.uint8)
    batch = pack(residues, np.array(LENGTHS))
    asked = torch.arange(1, len(batch.tokens), 7)[: round(0.15 * len(batch.tokens))]
    return replace(batch, target_index=asked, targets=batch.tokens[asked])


def loss_of(model: ESM1nvModel, batch: PackedBatch) -> torch.Tensor:
    return cross_entropy(model(batch), batch.targets, reduction="sum")


def asked(batch: PackedBatch) -> torch.Tensor:
    """Return the number of query tokens in the last block for each sequence: int64 [S]."""
    places = torch.cat([batch.cu_seqlens[:-1].long(), batch.target_index]).sort().values
    return torch.searchsorted(places, batch.cu_seqlens.long()).diff()


def attended_rows(config: EncoderConfig, batch: PackedBatch) -> int:
    """Return the number of query tokens, summed over layers."""
    return (config.num_layers - 1) * len(batch.tokens) + int(asked(batch).sum())


def attended_pairs(config: EncoderConfig, batch: PackedBatch) -> int:
    """Return the number of query-key pairs, summed over layers."""
    return (config.num_layers - 1) * SQUARES + int((asked(batch) * batch.cu_seqlens.diff()).sum())


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count FLOPs with PyTorch. The mapping adds our linear operator, which PyTorch's table lacks."""

    def product_flops(input_shape: list[int], weight_shape: list[int], *_: object, **__: object) -> int:
        return 2 * input_shape[0] * input_shape[1] * weight_shape[0]

    ours = {torch.ops.mkldnn._linear_pointwise: product_flops}
    with FlopCounterMode(display=False, custom_mapping=ours) as counted, sdpa_kernel(SDPBackend.MATH):
        yield counted


@pytest.fixture(autouse=True)
def unpadded_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the tokens that there are: the plan leaves out the padding of lengths on a CPU."""
    monkeypatch.setattr("bionemo_esm.model.cpu_kernels._LENGTH_BUCKET", 1)


def bytes_kept_for_backward(model: ESM1nvModel, batch: PackedBatch) -> int:
    """Return the bytes of storages that autograd keeps after a forward pass, without parameters, each storage once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # the reference prevents reuse of its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss_of(model, batch)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("config", [SMALL, WIDER, ESM1B, ESM2], ids=["small", "wider", "as ESM-1b", "as ESM-2"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_activation_memory_equals_what_autograd_keeps(config: EncoderConfig, precision: str) -> None:
    batch = row()
    measured = bytes_kept_for_backward(model_of(config, precision), batch)
    if precision == "bf16":  # CPU attention then keeps its probabilities, but no output and no log-sum-exp
        measured -= 2 * config.num_attention_heads * attended_pairs(config, batch)
        measured += (2 * config.hidden_size + 4 * config.num_attention_heads) * attended_rows(config, batch)
    expected = memory_per_device(config, len(batch.tokens), precision=precision, device_type="cpu").activations
    assert expected == pytest.approx(measured, rel=0.012)


def test_gpu_dropout_masks_are_bytes_and_attention_makes_no_copy() -> None:
    layers, hidden, tokens = SMALL.num_layers, SMALL.hidden_size, 1000
    on_cpu, on_gpu = (
        memory_per_device(SMALL, tokens, precision="32", device_type=device).activations for device in ("cpu", "cuda")
    )
    blocks = layers - 1 + CHOSEN_SHARE  # the last block computes the masked positions only
    masks = (2 * blocks + 1) * hidden * (4 - 1)
    assert on_cpu - on_gpu == pytest.approx(tokens * (masks + blocks * hidden * 4), abs=1)


@pytest.mark.parametrize("config", [SMALL, WIDER, ESM2], ids=["small", "wider", "as ESM-2"])
def test_flops_equal_the_count_of_pytorch(config: EncoderConfig) -> None:
    """Exact equality, with all tokens as queries. Attention uses matrix products, which the counter of PyTorch sees."""
    model, batch = model_of(config), row()
    assert model.encoder is not None
    with counted_flops() as counted:
        logits = model.encoder.logits(model.hidden_states(batch)[batch.target_index])
        cross_entropy(logits, batch.targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert training_flops(config, len(batch.tokens), SQUARES, len(batch.targets)) == counted.get_total_flops()


@pytest.mark.parametrize("config", [SMALL, WIDER, ESM2], ids=["small", "wider", "as ESM-2"])
def test_last_block_saves_flops_for_tokens_that_are_not_targets(config: EncoderConfig) -> None:
    """Exact count: output projection, feed-forward network and attention of the tokens that are not targets."""
    model, batch = model_of(config), row()
    with counted_flops() as counted:
        loss_of(model, batch).backward()  # type: ignore[no-untyped-call]
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    unasked = config.num_layers * len(batch.tokens) - attended_rows(config, batch)
    spared_pairs = config.num_layers * SQUARES - attended_pairs(config, batch)
    spared = 3 * (unasked * (2 * hidden**2 + 4 * hidden * ffn) + spared_pairs * 4 * hidden)
    whole = training_flops(config, len(batch.tokens), SQUARES, len(batch.targets))
    assert counted.get_total_flops() == whole - spared


def test_flops_follow_six_per_parameter_and_token() -> None:
    """Kaplan et al.: 6 N per token, N without embeddings. Holds for short sequences, where attention costs little."""
    esm1nv = EncoderConfig()
    per_token = training_flops(esm1nv, 1, 0, 0)
    without_embeddings = esm1nv.num_layers * 12 * esm1nv.hidden_size**2
    assert per_token == 6 * without_embeddings
    assert training_flops(esm1nv, 512, 512**2, 0) / 512 == pytest.approx(per_token + 12 * 6 * 768 * 512)  # as in PaLM


def test_memory_of_esm1nv_in_bf16() -> None:
    config = EncoderConfig()
    memory = memory_per_device(config, 370 * 290, precision="bf16")
    assert memory.parameters == 2 * config.parameters
    assert memory.masters == memory.gradients == memory.moments / 2 == 4 * config.parameters
    assert memory.total == 18 * config.parameters + memory.activations
    assert 15e9 < memory.activations < 16e9


def test_float32_training_has_no_master_weights() -> None:
    memory = memory_per_device(SMALL, 100, precision="32")
    assert memory.masters == 0
    assert memory.parameters == memory.gradients == 4 * SMALL.parameters


def test_optimizer_sharding_splits_the_moments_over_data_parallel_ranks() -> None:
    whole = memory_per_device(SMALL, 100, precision="bf16", data_parallel=4)
    sharded = memory_per_device(SMALL, 100, precision="bf16", data_parallel=4, sharding="optimizer")
    assert sharded == replace(whole, moments=whole.moments // 4)


def test_full_sharding_splits_masters_gradients_and_moments_and_gathers_two_blocks_at_a_time() -> None:
    config = SMALL.replace(num_layers=20)
    whole, half, eighth = (
        memory_per_device(config, 100, precision="bf16", data_parallel=ranks, sharding="full") for ranks in (1, 2, 8)
    )
    assert half.masters == 4 * half.moments // 8 == whole.masters // 2
    assert eighth.masters + eighth.moments == (half.masters + half.moments) // 4
    assert half.parameters == eighth.parameters < 0.3 * whole.parameters, "gathered block by block"
    assert half.gradients - eighth.gradients == (4 * config.parameters) * 3 // 8
    assert eighth.activations == whole.activations


@pytest.mark.parametrize("name", ["esm2_3b", "esm2_15b"])
def test_table_of_what_runs_where_has_the_numbers_of_the_formulas(name: str) -> None:
    config = EncoderConfig.from_config(OmegaConf.to_container(composed(f"model={name}").model))
    layouts = [("none", 8), ("optimizer", 8), ("full", 8), ("full", 64)]
    state = [
        memory_per_device(config, 0, precision="bf16", data_parallel=ranks, sharding=sharding).total
        for sharding, ranks in layouts
    ]
    kinds = (memory_per_device(config, 16_384, precision="bf16", recompute=kind) for kind in RECOMPUTE)
    numbers = [*state, *(memory.activations + memory.recomputed for memory in kinds)]
    row = f"| `{name}` | " + " | ".join(f"{number / 1e9:.1f}" for number in numbers) + " |"
    assert row in (ROOT / "docs" / "scaling.md").read_text()


def test_tensor_parallel_memory_splits_the_tensors_that_megatron_splits() -> None:
    config = EncoderConfig()
    split = {"qkv.weight": 1, "qkv.bias": 1, "proj.weight": 1, "fc1.weight": 1, "fc1.bias": 1, "fc2.weight": 1}
    split |= {"word_embeddings.weight": 1, "output_layer.bias": 1}
    expected = sum(
        int(np.prod(shape)) // (2 if any(name.endswith(ending) for ending in split) else 1)
        for name, shape in config.tensors()
    )
    assert parameters_per_device(config, 2) == expected
    assert parameters_per_device(config) == config.parameters
    one, two = (memory_per_device(config, 10_000, precision="bf16", tensor_parallel=n) for n in (1, 2))
    assert one.activations / 2 < two.activations < one.activations


def test_costs_import_neither_torch_nor_nemo() -> None:
    code = (
        "import sys, bionemo_esm.model.costs, bionemo_esm.pretraining.hardware\n"
        "print({'torch', 'nemo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-40GB", "32", 19.5),
        ("NVIDIA A100-PCIE-40GB", "tf32", 156),
        ("Tesla V100-SXM2-32GB", "32", 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA GB200", "bf16", 2500),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("cpu", "32", None),
    ],
)
def test_peak_flops_are_found_by_device_name(name: str, precision: str, tera: float | None) -> None:
    assert peak_flops(name, precision) == (None if tera is None else pytest.approx(tera * 1e12))


def test_device_memory_is_found_by_device_name() -> None:
    assert memory_bytes("NVIDIA A100-SXM4-80GB") == 80e9
    assert memory_bytes("NVIDIA A100-SXM4-40GB") == 40e9
    assert memory_bytes("a GPU of next year") is None


def test_no_device_pattern_shadows_a_later_one() -> None:
    names = ["GB200", "B200", "GH200 144G HBM3e", "GH200 480GB", "H200 NVL", "H200", "H100 PCIe", "H100 NVL", "H100"]
    names += ["A100-SXM4-80GB", "A100-SXM4-40GB", "V100-SXM2-32GB", "V100-SXM2-16GB", "V100-PCIE-32GB"]
    names += ["V100-PCIE-16GB", "L40S", "L40", "L4", "A40", "A30", "A10G", "A10", "RTX 6000 Ada Generation"]
    names += ["RTX A6000", "RTX 5090", "RTX 4090", "RTX 3090", "T4"]
    assert [find_device(f"NVIDIA {name}") for name in names] == list(DEVICES)
