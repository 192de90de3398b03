"""The fine-tuned model as a NeMo model: a pretrained encoder, a head on its states, and their optimizer step.

Parameter groups: layer 0 is the embeddings, layer k the k-th block. The rate of layer k is that of the top layer times
decay to the power of the blocks above it: discriminative fine-tuning (Howard & Ruder 2018, arXiv:1801.06146, section
3.1, which divides by 2.6 from layer to layer).

`write_fine_tuned` writes the archive: trained tensors over those of the pretrained archive. Shape suffixes: S proteins
of a batch, R residues of all of them, H hidden size, C outputs of the task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from bionemo_esm.data.hashing import derive_key
from bionemo_esm.finetuning.adapters import ADAPTER_NAMES, LORA_A, LORA_B, add_adapters, merged_weights
from bionemo_esm.finetuning.archive import MODEL_CLASS, archive_config, parts_of
from bionemo_esm.finetuning.batches import (
    EvaluationBatches,
    LabelledBatch,
    RankBatch,
    TrainingSteps,
    gather_predictions,
    loader,
)
from bionemo_esm.finetuning.config import FROZEN, FULL, LORA, Parts, TuningConfig
from bionemo_esm.finetuning.features import Moments
from bionemo_esm.finetuning.heads import Head, build_head
from bionemo_esm.finetuning.metrics import scores
from bionemo_esm.finetuning.predictor import in_own_unit
from bionemo_esm.finetuning.tasks import Prediction, Targets, Task
from bionemo_esm.model.archive import WEIGHTS, Archive, ArchiveFile, write_archive
from bionemo_esm.model.backends import default_torch_state
from bionemo_esm.model.config import EncoderConfig
from bionemo_esm.model.encoder import ESMEncoder
from bionemo_esm.model.feature_extraction import representations
from bionemo_esm.model.nemo_connector import load_weights, register_model
from bionemo_esm.model.optimizer import load_full_state
from bionemo_esm.model.optimizer_registry import FUSED_ADAM_FAMILY
from bionemo_esm.model.packed_model import PackedModel
from bionemo_esm.model.parallel import data_parallel_rank, data_parallel_size, data_parallel_sum
from bionemo_esm.model.tensor_io import LazyTensors
from bionemo_esm.model.validate import package_versions

_BLOCKS = "encoder.encoder.layers."
_EMBEDDINGS = ("encoder.embedding.", "encoder.embedding_layernorm.")
_ABOVE_ALL_BLOCKS = ("encoder.encoder.final_layernorm.", "encoder.lm_head.", "encoder.output_layer.")
_HEAD = "head."


def layer_of(name: str, num_layers: int) -> int:
    """Return the layer of a parameter of a model with parts `encoder` and `head`.

    0: embeddings; k: the k-th block, whose name has k - 1; `num_layers`: also the modules above all blocks;
    `num_layers` + 1: the head.
    """
    if name.startswith(_HEAD):
        return num_layers + 1
    if name.startswith(_EMBEDDINGS):
        return 0
    if name.startswith(_BLOCKS):
        layer = int(name.removeprefix(_BLOCKS).partition(".")[0]) + 1
        assert layer <= num_layers, f"{name} lies above layer {num_layers}"
        return layer
    assert name.startswith(_ABOVE_ALL_BLOCKS), f"no layer is known for {name}"
    return num_layers


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    num_layers: int,
    lr: float,
    head_lr: float,
    decay: float,
    weight_decay: float,
) -> list[dict[str, Any]]:
    """Return parameter groups for an optimizer, with keys params, lr and weight_decay, of trainable parameters.

    named: parameters by name, of a model with parts `encoder` and `head`. num_layers: the layer of the features, with
    rate `lr`; layer k below it has lr * decay**(num_layers - k), the head `head_lr`. Biases and norms have no weight
    decay. Parameters of equal rate and decay form one group; groups are in the order of their first parameter.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, num_layers)
        rate = head_lr if layer > num_layers else lr * decay ** (num_layers - layer)
        groups.setdefault((rate, 0.0 if parameter.ndim < 2 else weight_decay), []).append(parameter)
    return [{"params": members, "lr": rate, "weight_decay": shrink} for (rate, shrink), members in groups.items()]


def freeze(module: nn.Module) -> None:
    """Exclude all parameters of the module from training."""
    module.requires_grad_(False)


def set_trainable(encoder: ESMEncoder, mode: str, layer: int) -> None:
    """Set which parameters of an encoder are trained, for features from the hidden states of `layer`.

    frozen: none; lora: the adapters, already added, of the blocks up to that layer; full: those blocks and the
    embeddings, and the final layer norm for the last layer. The language-model head is never trained.
    """
    blocks = len(encoder.encoder.layers)
    assert mode in (FROZEN, FULL, LORA) and 0 <= layer <= blocks
    freeze(encoder)
    if mode == FROZEN:
        return
    for name, parameter in encoder.named_parameters(prefix="encoder"):
        if name.startswith(_ABOVE_ALL_BLOCKS):
            reached = layer == blocks and name.startswith("encoder.encoder.final_layernorm.")
        else:
            reached = layer_of(name, blocks) <= layer
        parameter.requires_grad = reached and (mode == FULL or name.endswith(ADAPTER_NAMES))


_DROPOUT_STREAM, _HEAD_STREAM = 16, 17  # distinct from each other and from those of pretraining
_ENCODER, CONTACT_HEAD = "encoder.", "contact_head."


@register_model
class ESMFineTunedModel(PackedModel):
    """An encoder and a head that predicts for residues or proteins.

    `cfg`: `encoder`, `precision` and `seed` as in `ESM1nvModel`, `task` (`Task.to_dict`), and head, reading and
    adapters (`Parts.to_dict`). With a trainer it is built once the process groups exist; without one at once. For
    training set `tuning`, and for precomputed features `head_inputs`: there is no encoder then.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        values: Any = OmegaConf.to_container(cfg)
        self.task, self.parts = Task.from_mapping(values["task"]), parts_of(values)
        super().__init__(values, trainer)
        self.tuning = TuningConfig()
        self.head_inputs: int | None = None
        self.head: Head | None = None
        self.resumed: Mapping[str, Tensor] | None = None  # trained weights of an earlier session
        self.resumed_optimizer: Mapping[str, Any] | None = None
        self.class_weights: Tensor | None = None
        self.standard: Moments | None = None  # of the head's inputs
        self.last_loss = float("nan")
        self.last_scores: dict[str, float] = {}
        self.last_predictions: list[Prediction] = []
        self._local_predictions: list[tuple[int, Prediction]] = []
        if trainer is None:
            self.configure_model()

    # --- its parts --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build encoder and head, with weights that depend on the seed only, then load initial weights."""
        if self.head is not None:
            return
        dtype = self.choose_kernels()
        assert self.backends is not None
        with default_torch_state(), torch.random.fork_rng(devices=[]):  # Lightning's default device may be a GPU
            if self.head_inputs is None:
                torch.default_generator.manual_seed(self.seed)
                self.encoder = ESMEncoder(self.encoder_config, dtype, self.backends)
                if self.initial_weights is not None:
                    load_encoder(self.encoder, ArchiveFile.open(self.initial_weights))
                if self.parts.adapters is not None:
                    add_adapters(self.encoder, self.parts.adapters)
            torch.default_generator.manual_seed(_seed_of(self.seed, _HEAD_STREAM))
            self.head = build_head(self.parts.head, self.task, self.head_inputs or self.encoder_config.hidden_size)
            if self.standard is not None:
                self.head.standardise(*map(torch.from_numpy, self.standard))
        if self.encoder is not None:
            set_trainable(self.encoder, self.tuning.mode, self.parts.reading.layer)

    def trained(self) -> dict[str, Tensor]:
        """Return the trained float32 masters by name, and the head's buffers."""
        assert self.masters is not None and self.head is not None
        fixed = {f"head.{name}": buffer.detach() for name, buffer in self.head.named_buffers()}
        return {name: master.detach() for name, master in self.masters.masters.items()} | fixed

    @torch.no_grad()
    def load_trained(self, weights: Mapping[str, Tensor]) -> None:
        """Load what `trained` returned."""
        assert self.masters is not None and self.head is not None
        self.masters.load_state_dict({name: weights[name] for name in self.masters.masters})
        for name, buffer in self.head.named_buffers():
            buffer.copy_(weights[f"head.{name}"])

    # --- predictions -------------------------------------------------------------------------------------------------

    def forward(self, batch: LabelledBatch) -> Tensor:
        """Return the head's outputs: float32 [R, C] or [S, C]; logits, or standardised numbers."""
        assert self.head is not None
        features, bounds = batch.features, batch.bounds
        if features is None:
            assert self.encoder is not None and batch.row is not None
            row, layer = batch.row.row, self.parts.reading.layer
            states_TH = representations(self.encoder, row, {layer})[layer]
            features = batch.row.blended(states_TH, batch.rows)
        outputs: Tensor = self.head(features, bounds)
        return outputs

    @torch.no_grad()
    def predictions(self, batch: LabelledBatch) -> list[Prediction]:
        """Return each protein's prediction, on the CPU: probabilities, or numbers in the target's unit."""
        if not len(batch.numbers):
            return []
        outputs = in_own_unit(self.task, self(batch))
        rows = torch.diff(batch.bounds).tolist() if self.task.is_per_residue else [1] * len(batch.numbers)
        return [part.numpy() for part in outputs.cpu().split(rows)]

    def loss(self, batch: LabelledBatch) -> Tensor:
        """Return the sum over known targets of class-weighted cross-entropy in nats, or of squared errors."""
        outputs, known = self(batch), batch.targets.isfinite()
        outputs, targets = outputs[known], batch.targets[known]
        if not self.task.is_classification:
            squares: Tensor = (outputs.squeeze(-1) - targets).square().sum()
            return squares
        if self.class_weights is not None and self.class_weights.device != outputs.device:
            self.class_weights = self.class_weights.to(outputs.device)
        return cross_entropy(outputs, targets.long(), weight=self.class_weights, reduction="sum")

    # --- training ---------------------------------------------------------------------------------------------------

    def training_step(self, rank_batch: RankBatch, batch_idx: int) -> None:
        """Make one optimizer step on the loss of the global batch: its sum over known targets, over their weight.

        It does not depend on the assignment of proteins to ranks and micro batches.
        """
        assert self.masters is not None
        batches = [batch for batch in rank_batch.batches if len(batch.numbers)]

        def loss(batch: LabelledBatch) -> Tensor:
            return self.loss(batch) / max(rank_batch.weight, 1e-9)

        losses = self.accumulate_gradients(batches, loss, _DROPOUT_STREAM, self.steps)
        self.masters.clip_gradients(self.tuning.gradient_clip_val)
        self.finish_step()
        total = sum(losses.unbind(), torch.zeros((), device=self.device))
        self.last_loss = float(data_parallel_sum(total))

    def configure_optimizers(self) -> Any:
        """Return fused Adam over the trained parameters; rates rise over the first steps and then stay constant."""
        assert self.head is not None and self.backends is not None
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        self.make_masters(trained)
        assert self.masters is not None
        if self.resumed is not None:
            self.load_trained(self.resumed)
        config = self.tuning
        groups = parameter_groups(
            self.masters.masters.items(), self.parts.reading.layer, config.encoder_lr, config.lr, config.layer_decay,
            config.weight_decay,
        )  # fmt: skip
        build = FUSED_ADAM_FAMILY.build(self.backends)
        optimizer = build(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8)
        if self.resumed_optimizer is not None:
            load_full_state(optimizer, self.masters, self.resumed_optimizer, self.backends.adam_counts_by_group)
        warmup = max(round(config.warmup_epochs * self._steps.steps_per_epoch), 1)
        first = self.steps  # the schedule counts the steps of this session only
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((first + step + 1) / warmup, 1.0))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    # --- validation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self._local_predictions = []

    def validation_step(self, batch: LabelledBatch, batch_idx: int) -> None:
        self._local_predictions += zip(batch.numbers.tolist(), self.predictions(batch), strict=True)

    def on_validation_epoch_end(self) -> None:  # type: ignore[override]
        """Gather the predictions of all ranks, and score them on each."""
        labelled = self._validation.collator.labelled
        self.last_predictions = gather_predictions(self._local_predictions, len(labelled), self.device)
        self.last_scores = scores(self.task, labelled.targets, self.last_predictions)

    # --- data loaders of NeMo and Lightning -----------------------------------------------------------------------

    def setup_training_data(self, train_data_config: TrainingSteps) -> None:
        """Train on these steps; each rank reads its part."""
        self._steps = train_data_config

    def setup_validation_data(self, val_data_config: EvaluationBatches) -> None:
        """Validate on a set; each rank reads its part."""
        self._validation = val_data_config

    def train_dataloader(self) -> DataLoader[RankBatch]:
        return loader(self._steps.on_rank(data_parallel_rank(), data_parallel_size()))

    def val_dataloader(self) -> DataLoader[LabelledBatch]:
        return loader(self._validation.on_rank(data_parallel_rank(), data_parallel_size()))

    # --- saving ---------------------------------------------------------------------------------------------------

    def archive_provenance(self) -> dict[str, Any]:
        return dict(self.provenance)


def load_encoder(encoder: ESMEncoder, file: ArchiveFile) -> None:
    """Load the verified encoder weights of a pretrained archive. Raises `ArchiveError`."""
    weights = {
        name.removeprefix(_ENCODER): tensor for name, tensor in file.load_weights().items() if name.startswith(_ENCODER)
    }
    if encoder.contact_head is None:  # it was fitted to the pretrained weights
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(CONTACT_HEAD)}
    load_weights(encoder, weights, str(file.path))


def class_weights(task: Task, targets: Sequence[Targets]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return weights by which all classes count alike: float32 [C], 1 on average over the known targets."""
    known = np.concatenate([target[np.isfinite(target)] for target in targets]).astype(np.int64)
    counts = np.bincount(known, minlength=len(task.classes)).astype(np.float64)
    present = counts > 0
    weights = np.where(present, counts.sum() / (present.sum() * np.maximum(counts, 1)), 0.0)
    return weights.astype(np.float32)


def _seed_of(*parts: int) -> int:
    return int(derive_key(*parts)[0] >> 1)


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_ENCODER_SAVING = "encoder."


def write_fine_tuned(
    path: Path,
    base: ArchiveFile,
    trained: Mapping[str, Tensor],
    task: Task,
    parts: Parts,
    mode: str,
    seed: int,
    provenance: Mapping[str, Any],
) -> Path:
    """Write the model, whole or not at all. Raises `ArchiveError`, also if the pretrained archive is damaged.

    trained: float32, by name, with adapters only if `parts` have them (see `merged`). A trained encoder is written in
    float32; a frozen one, and one beside its adapters, is unchanged, bit for bit.
    """
    base.verify(WEIGHTS)
    encoder = EncoderConfig.from_config(base.config["encoder"])
    names = [name for name in base.weights.infos if name.startswith(_ENCODER_SAVING)]
    if mode != FROZEN and encoder.contact_head:  # it was fitted to other weights
        encoder = EncoderConfig.from_config({**encoder.to_dict(), "contact_head": False})
        names = [name for name in names if not name.startswith(_ENCODER_SAVING + CONTACT_HEAD)]
    unchanged = mode == FROZEN or parts.adapters is not None
    outline = {name: _outline(base, name, unchanged) for name in names}
    outline |= {name: torch.empty(tensor.shape, device="meta") for name, tensor in trained.items()}

    def make(name: str) -> Tensor:
        if name in trained:
            return trained[name]
        tensor = base.load_finite(name)
        return tensor if unchanged else tensor.float()

    precision = "bf16" if outline[names[0]].dtype == torch.bfloat16 else "32"
    config = archive_config(encoder, precision, seed, task, parts)
    recorded = {**provenance, "package_versions": package_versions()}
    return write_archive(path, Archive(MODEL_CLASS, config, LazyTensors(outline, make), recorded))


def merged(base: ArchiveFile, trained: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Return the trained tensors, float32, with the encoder's merged weights in place of adapters."""
    assert parts.adapters is not None
    found = {name: tensor for name, tensor in trained.items() if not name.endswith(ADAPTER_NAMES)}
    for name in trained:
        if name.endswith(LORA_A):
            layer = name.removesuffix(LORA_A)
            adapted = {layer + "weight": base.load_finite(layer + "weight").float()}
            adapted |= {layer + kind: trained[layer + kind] for kind in (LORA_A, LORA_B)}
            found |= merged_weights(adapted, parts.adapters)
    return found


def _outline(base: ArchiveFile, name: str, unchanged: bool) -> Tensor:
    info = base.weights.infos[name]
    return torch.empty(info.shape, dtype=_DTYPES[info.dtype] if unchanged else torch.float32, device="meta")
