"""The checks of `bionemo-esm doctor --gpu`: kernels against float64, steps against the CPU's, archives, and speed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy, layer_norm

from bionemo_esm.alphabet import FIRST_RESIDUE_ID
from bionemo_esm.data.collate import PackedBatch, pack
from bionemo_esm.model.attention import ATTENTION, PackedRow
from bionemo_esm.model.backends import (
    ADAMS,
    NORMS,
    WITHOUT,
    Kernel,
    choose_backends,
    excluded_kernels,
    parameter_dtype,
)
from bionemo_esm.model.config import EncoderConfig, OptimConfig
from bionemo_esm.model.costs import memory_per_device, training_flops
from bionemo_esm.model.encoder import ESMEncoder, megatron_config
from bionemo_esm.model.esm1nv import ESM1nvModel
from bionemo_esm.model.optimizer import MasterWeights, build_optimizer
from bionemo_esm.pretraining.hardware import peak_flops
from bionemo_esm.pretraining.selftest import LENGTHS, TINY, SelfTestError, random_row, self_test, wait_for
from bionemo_esm.registry import Registry

KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Largest error of a kernel or of a step's gradients, relative to the largest value or to the norm."""
ESM1NV = EncoderConfig(num_layers=6, hidden_size=768, num_attention_heads=12, ffn_hidden_size=3072, seq_length=512)
_PROTEINS, _MASKED, _WARMUP, _STEPS = 370, 0.15, 3, 10


@dataclass(frozen=True)
class Check:
    """A check that returns its result in one line, or raises; and what keeps a user going if it fails."""

    name: str
    run: Callable[[], str]
    fallback: str


@dataclass(frozen=True)
class Outcome:
    """Result of a check."""

    name: str
    passed: bool
    text: str
    fallback: str


def run_checks(device: torch.device, speed: bool = True) -> list[Outcome]:
    """Run all checks on the device. One that fails does not stop the others. `speed`: also train ESM-1nv, on a GPU."""
    outcomes = []
    for check in _checks(device, speed):
        try:
            outcomes.append(Outcome(check.name, True, check.run(), ""))
        except Exception as error:  # of any driver or kernel
            line = " ".join(f"{type(error).__name__}: {error}".split())
            outcomes.append(Outcome(check.name, False, line, check.fallback))
    return outcomes


def markdown(outcomes: Sequence[Outcome], device: str, versions: dict[str, str | None]) -> str:
    """Return a report that can be pasted into an issue."""
    failed = [outcome for outcome in outcomes if not outcome.passed]
    installed = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    verdict = f"{len(failed)} of {len(outcomes)} checks failed" if failed else f"All {len(outcomes)} checks passed"
    rows = [f"| {each.name} | {'ok' if each.passed else '**failed**'} | {_cell(each.text)} |" for each in outcomes]
    lines = [f"# bionemo_esm on {device}", "", f"{verdict}.", "", f"Versions: {installed}.", ""]
    lines += ["| Check | Result | Detail |", "|---|---|---|", *rows]
    if failed:
        lines += ["", "## To go on", "", *(f"- {each.name}: {each.fallback}" for each in failed)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- the plan ---------------------------------------------------------------------------------------------------------


def _checks(device: torch.device, speed: bool) -> Iterator[Check]:
    head_size = TINY.head_size
    for dtype in (torch.bfloat16, torch.float32):
        for name in sorted(set(ATTENTION) - excluded_kernels()):
            if ATTENTION.get(name).supports(device.type, dtype, 0.0, head_size):
                what = f"attention {name}, {str(dtype)[6:]}"
                yield Check(what, partial(_attention, name, dtype, device), _leave_out(name))
        for name in _installed(NORMS, device):
            what = f"layer norm {name}, {str(dtype)[6:]}"
            yield Check(what, partial(_norm, name, dtype, device), _leave_out(name))
    for name in _installed(ADAMS, device):
        yield Check(f"Adam {name}", partial(_adam, name, device), _leave_out(name))
    for precision in ("bf16", "32"):
        other = "32" if precision == "bf16" else "bf16"
        for dropout in (0.0, 0.1):
            what = f"training step, {precision}, dropout {dropout}"
            yield Check(what, partial(_step, device, precision, dropout), f"set trainer.precision={other}")
        yield Check(
            f"gradients against a CPU's, {precision}",
            partial(_gradients, precision, device),
            f"set trainer.precision={other}",
        )
    yield Check("archive to a CPU", partial(_archive, device), "send this report: a file must not depend on the device")
    if speed and device.type == "cuda":
        yield Check("ESM-1nv, bf16", partial(_speed, device), "set a lower data.micro_batch_tokens, if memory is short")


def _installed(kernels: Registry[Kernel], device: torch.device) -> list[str]:
    """Return the names of the kernels that are installed for this device and not left out."""
    names = sorted(set(kernels) - excluded_kernels())
    return [name for name in names if device.type in kernels.get(name).device_types and kernels.get(name).load()]


def _leave_out(name: str) -> str:
    return f"leave it out: export {WITHOUT}='{name}' (names are separated by commas)"


# --- the checks -------------------------------------------------------------------------------------------------------


def _compare(pairs: Sequence[tuple[Tensor, Tensor]], tolerance: float) -> str:
    """Return the largest difference of (found, expected), relative to the largest expected value of each pair.

    Raises `SelfTestError` for one above the tolerance, and for NaN.
    """
    differences = [
        float((found.detach().double().cpu() - expected).abs().max() / expected.abs().max())
        for found, expected in pairs
    ]
    if not all(difference <= tolerance for difference in differences):
        raise SelfTestError(f"off by {max(differences):.2g}, relative to the largest value; allowed {tolerance:.0e}")
    return f"off by {max(differences):.1e}"


def _attention(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Compare context and gradients of a packed row with a softmax in float64."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([0, *np.cumsum(LENGTHS)], dtype=torch.int32)
    shape = (int(bounds[-1]), TINY.num_attention_heads, TINY.head_size)
    draws = [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]
    exact = [draw.double().requires_grad_() for draw in draws[:3]]
    ours = [draw.to(device, copy=True).requires_grad_() for draw in draws[:3]]
    parts = []
    for start, end in pairwise(bounds.tolist()):
        query, key, value = (part[start:end].transpose(0, 1) for part in exact)
        weights = (query @ key.transpose(1, 2) / TINY.head_size**0.5).softmax(-1)
        parts.append((weights @ value).transpose(0, 1))
    expected, places = torch.cat(parts), bounds.to(device)
    row = PackedRow(
        qkv_format="thd", cu_seqlens_q=places, cu_seqlens_kv=places, max_seqlen_q=max(LENGTHS),
        max_seqlen_kv=max(LENGTHS),
    )  # fmt: skip
    found = ATTENTION.get(name).attend(ours[0], ours[1], ours[2], row, 0.0)
    expected.backward(draws[3].double())  # type: ignore[no-untyped-call]
    found.backward(draws[3].to(device))  # type: ignore[no-untyped-call]
    pairs = [(found, expected.detach()), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]
    return _compare([(a, b) for a, b in pairs if a is not None and b is not None], KERNEL_TOLERANCE[dtype])


def _norm(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Compare a layer norm and the gradient of its input with float64."""
    width, eps = TINY.hidden_size, TINY.layernorm_epsilon
    build: Any = NORMS.get(name).load()
    norm = build(config=megatron_config(TINY, dtype, False), hidden_size=width, eps=eps).to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    rows, sent = (torch.randn(64, 1, width, generator=generator).to(dtype) for _ in range(2))
    ours, exact = rows.to(device, copy=True).requires_grad_(), rows.double().requires_grad_()
    found, expected = norm(ours), layer_norm(exact, (width,), eps=eps)
    found.backward(sent.to(device))
    expected.backward(sent.double())  # type: ignore[no-untyped-call]
    assert ours.grad is not None and exact.grad is not None
    return _compare([(found, expected.detach()), (ours.grad, exact.grad)], KERNEL_TOLERANCE[dtype])


def _adam(name: str, device: torch.device) -> str:
    """Compare three updates with PyTorch's plain AdamW in float64."""
    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(4, 1000, generator=generator).unbind()
    ours, exact = Parameter(start.to(device, copy=True)), Parameter(start.double())
    settings: Any = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8}
    build: Any = ADAMS.get(name).load()
    adam = build([{"params": [ours], "weight_decay": 0.01}], **settings)
    reference = torch.optim.AdamW([exact], weight_decay=0.01, foreach=False, **settings)
    for gradient in gradients:
        ours.grad, exact.grad = gradient.to(device), gradient.double()
        adam.step()
        reference.step()
    moved, expected = (now.detach().double().cpu() - start.double() for now in (ours, exact))
    return _compare([(moved, expected)], KERNEL_TOLERANCE[torch.float32])


def _step(device: torch.device, precision: str, dropout: float) -> str:
    result = self_test(device, precision, dropout)
    return f"{result.backends}; loss {result.loss:.3f}"


def _encoder(config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> ESMEncoder:
    """Return an encoder with weights drawn on the CPU, so that they are equal on all devices."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        kernels = choose_backends("cpu", dtype, config.attention_dropout, config.head_size)
        encoder: ESMEncoder = ESMEncoder(config, dtype, kernels).to(device)
    return encoder


def _forward_backward(encoder: ESMEncoder, batch: PackedBatch) -> Tensor:
    logits = encoder(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen, batch.target_index)
    loss = cross_entropy(logits, batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _gradients(precision: str, device: torch.device) -> str:
    """Compare loss and gradient of the same weights and batch with those of a CPU in float32."""
    dtype, losses, gradients = parameter_dtype(precision, device.type), [], []
    for each, place in ((dtype, device), (torch.float32, torch.device("cpu"))):
        encoder = _encoder(TINY, each, place)
        losses.append(float(_forward_backward(encoder, random_row().to(place))))
        parts = [tensor.grad.double().cpu().flatten() for tensor in encoder.parameters() if tensor.grad is not None]
        gradients.append(torch.cat(parts))
    off = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    tolerance = KERNEL_TOLERANCE[dtype]
    if not (off <= tolerance and abs(losses[0] - losses[1]) <= tolerance * losses[1]):
        raise SelfTestError(
            f"loss {losses[0]:.4f} against {losses[1]:.4f}, gradient off by {off:.2g} of its norm; allowed "
            f"{tolerance:.0e}"
        )
    return f"loss {losses[0]:.4f} against {losses[1]:.4f}, gradient off by {off:.1e} of its norm"


def _archive(device: torch.device) -> str:
    """Save a model from the device, and compare what a CPU restores."""
    config = OmegaConf.create({"encoder": TINY.to_dict(), "precision": "32", "seed": 0})
    model = ESM1nvModel(config).to(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.nemo"
        model.save_to(str(path))
        restored = ESM1nvModel.restore_from(str(path), map_location="cpu")
    expected = dict(model.named_parameters())
    wrong = [name for name, tensor in restored.named_parameters() if not torch.equal(tensor, expected[name].cpu())]
    if wrong:
        raise SelfTestError(f"{len(wrong)} tensors differ after saving and restoring, {wrong[0]} first")
    return f"{len(expected)} tensors, equal in every bit"


def _speed(device: torch.device) -> str:
    """Train ESM-1nv on one row of proteins, and return tokens/s, MFU, and the peak of memory beside the plan's."""
    lengths = np.clip(np.random.default_rng(0).gamma(2.2, 117, _PROTEINS).astype(int) + 20, 20, 510)
    generator = np.random.default_rng(1)
    row = pack(generator.integers(4, 24, lengths.sum()).astype(np.uint8), lengths)
    chosen = generator.random(len(row.tokens)) < _MASKED
    asked = torch.from_numpy(np.flatnonzero(chosen & (row.tokens.numpy() >= FIRST_RESIDUE_ID)))
    batch = replace(row, target_index=asked, targets=row.tokens[asked]).to(device)
    encoder = _encoder(ESM1NV, torch.bfloat16, device).train()
    masters = MasterWeights(encoder.named_parameters())
    optimizer = build_optimizer(masters, OptimConfig(), encoder.backends)
    torch.cuda.reset_peak_memory_stats(device)
    started = 0.0
    for step in range(_WARMUP + _STEPS):
        if step == _WARMUP:
            wait_for(device)
            started = time.perf_counter()
        masters.zero_gradients()
        _forward_backward(encoder, batch)
        masters.clip_gradients(1.0)
        optimizer.step()
        masters.write_back()
    wait_for(device)
    seconds = (time.perf_counter() - started) / _STEPS
    flops = training_flops(ESM1NV, len(row.tokens), float((row.cu_seqlens.diff().double() ** 2).sum()), len(asked))
    peak = peak_flops(torch.cuda.get_device_name(device), "bf16")
    mfu = f", MFU {flops / seconds / peak:.0%}" if peak else ""
    planned = memory_per_device(ESM1NV, len(row.tokens), precision="bf16").total / 1e9
    memory = f"peak {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB, planned {planned:.1f} GB"
    rate = len(row.tokens) / seconds
    return f"{len(row.tokens):,} tokens in {seconds * 1e3:.1f} ms: {rate:,.0f} tokens/s{mfu}; {memory}"
