"""Program of `test_pretend_cuda.py`: run the GPU paths on a pretend device, and print what they did as JSON.

python tests/pretend_cuda_runs.py one FOLDER            one rank: steps, archives, inference, fine-tuning
python tests/pretend_cuda_runs.py data|tensor FOLDER    rank 0 of two: data or tensor parallel
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretend_cuda import fake_tensors, on_cuda, pretend, recorder

WHAT, FOLDER = sys.argv[1], Path(sys.argv[2])
torch = pretend(world_size=1 if WHAT == "one" else 2)

import numpy as np  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from bionemo_esm.data.collate import PackedBatch, pack  # noqa: E402
from bionemo_esm.data.dataloader import RankBatch  # noqa: E402
from bionemo_esm.finetuning.batches import EncoderRow, LabelledBatch  # noqa: E402
from bionemo_esm.finetuning.config import AdapterConfig, HeadConfig, Parts, ReadingConfig, TuningConfig  # noqa: E402
from bionemo_esm.finetuning.model import ESMFineTunedModel, set_trainable  # noqa: E402
from bionemo_esm.finetuning.tasks import Task  # noqa: E402
from bionemo_esm.model import feature_extraction  # noqa: E402
from bionemo_esm.model.esm1nv import ESM1nvModel  # noqa: E402
from bionemo_esm.model.parallel import ensure_groups  # noqa: E402

SIZES = {"num_layers": 2, "hidden_size": 128, "num_attention_heads": 2, "ffn_hidden_size": 256, "seq_length": 256}
FORMS: dict[str, dict[str, Any]] = {
    "bf16": {"precision": "bf16"},
    "bf16, no dropout": {"precision": "bf16", "hidden_dropout": 0.0, "attention_dropout": 0.0},
    "float32": {"precision": "32"},
    "ESM-1b": {"precision": "bf16", "embedding_layernorm": True, "token_dropout": True},
    "ESM-2": {
        "precision": "bf16", "position_embedding": "rotary", "token_dropout": True, "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
}  # fmt: skip


class WithoutLightning(ESM1nvModel):
    """Our model with the parts of Lightning that `training_step` calls."""

    epoch = 0.0

    def prepare(self) -> None:
        (self._optimizer,), (schedule,) = self.configure_optimizers()
        self._schedule = schedule["scheduler"]

    def optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self._optimizer

    def lr_schedulers(self) -> Any:
        return self._schedule

    def manual_backward(self, loss: Any, *_: Any, **__: Any) -> None:
        loss.backward()

    def log_dict(self, *_: Any, **__: Any) -> None: ...


def packed(seed: int) -> PackedBatch:
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 100, 4)
    row = pack(random.integers(4, 24, lengths.sum()).astype(np.uint8), lengths)
    asked = torch.arange(1, len(row.tokens), 7)
    return replace(row, target_index=asked, targets=row.tokens[asked])


def fake(batch: PackedBatch, mode: Any) -> PackedBatch:
    return batch._map(mode.from_tensor)


def built(form: dict[str, Any], of: type[ESM1nvModel] = WithoutLightning) -> Any:
    settings = {"hidden_dropout": 0.1, "attention_dropout": 0.1, **form}
    precision = settings.pop("precision")
    return of(OmegaConf.create({"encoder": {**SIZES, **settings}, "precision": precision, "seed": 1}))


def devices(*groups: Any) -> list[str]:
    return sorted({tensor.device.type for group in groups for tensor in group})


def told(record: Any, **more: Any) -> dict[str, Any]:
    return {"waits": dict(record.waits), "copies": dict(record.copies), **more}


# --- what is run ------------------------------------------------------------------------------------------------------


def step(form: dict[str, Any]) -> dict[str, Any]:
    """Return what two micro batches and an optimizer step do after one step, and where everything is."""
    model = built(form)
    with fake_tensors() as mode:
        on_cuda(model)
        model.train()
        model.prepare()
        batches = RankBatch([fake(packed(seed), mode) for seed in (1, 2)], 8).to("cuda")
        with recorder():
            model.training_step(batches, 0)
        with recorder() as record:
            model.training_step(batches, 1)
        state = [tensor for values in model.optimizers().state.values() for tensor in values.values() if tensor.ndim]
        places = devices(model.parameters(), model.masters.masters.values(), state)
        return told(record, devices=places, backends=model.backends.describe())


def validation() -> dict[str, Any]:
    model = built(FORMS["bf16"])
    with fake_tensors() as mode:
        on_cuda(model).eval()
        batch = fake(packed(1), mode).to("cuda")
        with recorder() as record:
            sums = model.score(batch)
        return told(record, devices=devices([sums]))


def inference() -> dict[str, Any]:
    model = built({**FORMS["ESM-2"], "contact_head": True})
    with fake_tensors() as mode:
        on_cuda(model).eval()
        batch = fake(packed(1), mode).to("cuda")
        with recorder() as record, torch.no_grad():
            states = feature_extraction.representations(model.encoder, batch, {0, 1, 2})
            logits = model(batch)
        return told(record, devices=devices(states.values(), [logits]), layers=sorted(states))


def fine_tuning(mode_name: str) -> dict[str, Any]:
    task = Task(name="structure", level="residue", kind="classification", metric="accuracy", classes=("H", "E", "C"))
    adapters = AdapterConfig(rank=2, targets=("linear_qkv",)) if mode_name == "lora" else None
    parts = Parts(HeadConfig(), ReadingConfig(layer=2, window=100, overlap=40), adapters)
    config = {"encoder": SIZES, "precision": "bf16", "seed": 1, "task": task.to_dict(), **parts.to_dict()}
    model: Any = ESMFineTunedModel(OmegaConf.create(config))
    model.tuning = TuningConfig(mode=mode_name)
    set_trainable(model.encoder, mode_name, 2)
    model.class_weights = torch.ones(3)
    row = packed(1)
    residues = torch.tensor([place for place, token in enumerate(row.tokens.tolist()) if token >= 4])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), (row.cu_seqlens.diff() - 2).cumsum(0)])
    targets = torch.ones(len(residues))
    with fake_tensors() as mode:
        on_cuda(model).train()
        residues, bounds, targets = map(mode.from_tensor, (residues, bounds, targets))
        whole = EncoderRow(fake(row, mode), residues, torch.arange(len(residues)), None)
        batch = LabelledBatch(np.arange(4), bounds, targets, None, whole)
        record = recorder()
        with record:
            loss = model.loss(batch.to(torch.device("cuda"), non_blocking=True))
            loss.backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return told(record, devices=devices([loss], trained), trained=len(trained))


def beginnings() -> dict[str, Any]:
    """Return how a model built under Lightning's default device differs from one built under none."""

    class Strategy:
        root_device = torch.device("cuda", 0)

    class Trainer:
        strategy = Strategy()
        num_devices = num_nodes = 1

    plain = built(FORMS["float32"], ESM1nvModel)
    plain.save_to(str(FOLDER / "first.nemo"))
    found = {}
    for name, weights in (("random", None), ("archive", FOLDER / "first.nemo")):
        other = built(FORMS["float32"], ESM1nvModel)
        other.encoder, other.initial_weights, other._trainer = None, weights, Trainer()
        with torch.device("cuda", 0):  # as Lightning calls it
            other.configure_model()
        same = [torch.equal(a, b) for a, b in zip(plain.parameters(), other.parameters(), strict=True)]
        found[name] = {"equal": all(same), "devices": devices(other.parameters())}
    return found


def kernels() -> dict[str, Any]:
    """Return the backends of a model on the CPU, and moved to the GPU; those of its encoder follow alike."""
    model = built(FORMS["bf16"])
    seen = [model.backends.describe(), model.encoder.backends.describe()]
    with fake_tensors():
        on_cuda(model)
    return {"cpu": seen, "cuda": [model.backends.describe(), model.encoder.backends.describe()]}


def ranks() -> dict[str, Any]:
    """Return the collectives of a step on rank 0 of two, its waits, and where everything is."""
    ensure_groups(2 if WHAT == "tensor" else 1)
    model = built(FORMS["bf16"])
    model.sharding = "optimizer" if WHAT == "data" else "none"
    with fake_tensors() as mode:
        on_cuda(model).train()
        model.prepare()
        batches = RankBatch([fake(packed(seed), mode) for seed in (1, 2)], 8).to("cuda")
        with recorder() as record:
            model.training_step(batches, 0)
        collectives = sorted({name for name in record.operators if name.startswith("c10d")})
        return told(record, devices=devices(model.parameters()), collectives=collectives)


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result, or the error: one that fails must not hide the others."""
    try:
        return run()
    except Exception as error:
        return {"error": [*traceback.format_exc().splitlines()[-8:], str(error)]}


RUNS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"step, {name}": (lambda form=form: step(form)) for name, form in FORMS.items()},  # type: ignore[misc]
    "validation": validation,
    "inference": inference,
    **{f"fine-tuning, {mode}": (lambda mode=mode: fine_tuning(mode)) for mode in ("frozen", "full", "lora")},  # type: ignore[misc]
    "beginnings": beginnings,
    "kernels": kernels,
}
chosen = RUNS if WHAT == "one" else {WHAT: ranks}
print(json.dumps({name: attempt(run) for name, run in chosen.items()}))
