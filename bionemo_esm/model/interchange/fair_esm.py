"""Import of ESM-1b, ESM-1v and ESM-2 from fair-esm's `.pt` files, as released or as fairseq writes them.

Layout, by `esm/pretrained.py` of fair-esm 2.0.0: a dict with the weights under "model" and the sizes under "args"
(ESM-1b and ESM-1v) or "cfg" (ESM-2). A file `<name>-contact-regression.pt` in the same folder holds the weights of the
contact head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bionemo_esm.alphabet import MASK_ID
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import LEARNED, ROTARY, EncoderConfig
from bionemo_esm.model.interchange.state_dict_adapter import FAIR_ESM, InterchangeError, SourceModel, SourceTensors
from bionemo_esm.model.tar_format import Section, hash_section, quoted
from bionemo_esm.model.torch_pickle import PickledTensors, PickleError, read_pickle

_WEIGHTS, _NAMESPACE = "model", "argparse.Namespace"
_IN_FILES = replace(FAIR_ESM, renamed=((rf"^{_WEIGHTS}\.", ""), *FAIR_ESM.renamed))
_REGRESSION = "-contact-regression.pt"
_ESM2_SEQ_LENGTH = 1024  # tokens, in fair-esm's training and in Hugging Face's configurations
_FIXED = {"layernorm_epsilon": 1e-5, "init_method_std": 0.02}
"""Defaults of torch and fairseq, which neither library records."""
_OTHER_MODELS = {
    "protein_bert_base": "ESM-1 has sinusoidal positions, an extra key and value in each attention, an output that is "
    "not tied to the embedding, and an alphabet of 35 tokens; our encoder has none of these. Take ESM-1b or ESM-2",
    "msa_transformer": "the MSA Transformer attends along the columns of an alignment; our encoder reads single "
    "sequences. Take ESM-1b or ESM-2",
    "invariant_gvp": "ESM-IF reads structures; our encoder reads sequences. Take ESM-1b or ESM-2",
}
"""Reasons why an architecture is not supported, by a part of its name."""


@dataclass(frozen=True)
class _Arguments:
    """Arguments with which a model was built."""

    where: str  # file and key, for messages
    values: Mapping[str, Any]

    def get(self, name: str) -> Any:
        """Return an argument by its name, with or without the prefix `encoder_`, as fair-esm does; None if absent."""
        found = [self.values[key] for key in (f"encoder_{name}", name) if self.values.get(key) is not None]
        if len(found) == 2 and found[0] != found[1]:
            raise InterchangeError(
                f"{self.where}: encoder_{name} is {quoted(found[0])}, and {name} is {quoted(found[1])}; remove one"
            )
        return found[0] if found else None

    def require(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise InterchangeError(f"{self.where} has no {name!r}; it is no file of ESM-1b, ESM-1v or ESM-2")
        return value


def read_fair_esm(path: Path, *, advance: Callable[[int], None] = lambda count: None) -> SourceModel:
    """Read the model in a `.pt` of fair-esm, with the contact head's weights if their file is in the same folder.

    `advance` is called with the number of bytes of each hashed block. fair-esm zeroes the embedding of `<mask>` when it
    loads ESM-1b and ESM-1v, and so does this function. Dropout is that of the arguments, or 0 if they have none.

    Raises `InterchangeError`, naming file and key, for another model, an incomplete file, or impossible sizes;
    `PickleError` for a file that is not a pickle of tensors and arguments. No code in the file is run.
    """
    tree, table = _opened(path, (_NAMESPACE,))
    arguments, is_esm2 = _arguments(path, tree)
    tables, notes = [table], _left_out(path, tree)
    regression = path.with_name(path.stem + _REGRESSION)
    if regression.exists():
        tables.append(_opened(regression)[1])
    else:
        notes.append(f"weights for contacts would be in {regression.name}; it is not there")
    tensors = SourceTensors.of(str(path), tables, _IN_FILES)
    if is_esm2:
        config = _esm2(arguments, tensors)
        notes.append(
            f"seq_length is {_ESM2_SEQ_LENGTH}, as ESM-2 was trained; rotary positions set no longest sequence"
        )
    else:
        config = _esm1b(arguments, tensors)
        # fair-esm zeroes the row before it ties the output to the table, so both lose it
        erased = {name: MASK_ID for name in ("embed_tokens.weight", "lm_head.weight") if name in tensors.places}
        tensors = replace(tensors, erased_rows=erased)
    if config.num_layers != (there := tensors.layers(FAIR_ESM)):
        raise InterchangeError(
            f"{arguments.where}: layers is {config.num_layers:,}, but the weights are of {there:,} layers; they do not "
            "belong together"
        )
    if arguments.get("activation_dropout"):
        notes.append("left out: activation_dropout, dropout within the feed-forward layers, which our encoder has not")
    files = [path, regression] if len(tables) == 2 else [path]
    origin = {"format": "fair-esm", "source": path.name, "revision": None}
    sha256 = {file.name: hash_section(file, Section(0, file.stat().st_size), advance)["sha256"] for file in files}
    return SourceModel(FAIR_ESM, config, tensors, {"imported_from": origin | {"sha256": sha256}}, tuple(notes))


def _opened(path: Path, allowed: tuple[str, ...] = ()) -> tuple[dict[str, Any], PickledTensors]:
    """Return the plain values of a file, and the table of its tensors under "model"."""
    if not path.is_file():
        raise InterchangeError(f"{path}: no such file; give the path of a .pt file of fair-esm")
    try:
        table, tree = read_pickle(path, allowed=allowed, below=_WEIGHTS)
    except PickleError as error:
        if "omegaconf." in error.why:
            raise InterchangeError(
                f"{path}: {error.why}. ESMFold's files have such; only ESM-1b, ESM-1v and ESM-2 can be taken in"
            ) from error
        raise
    weights = tree.get(_WEIGHTS)
    if not isinstance(weights, dict):
        raise InterchangeError(f"{path}: {_without_model(tree)}")
    if weights:
        raise InterchangeError(f"{path}: {quoted(next(iter(weights)))} under {_WEIGHTS!r} is no tensor; it is no model")
    return tree, table


def _without_model(tree: Mapping[str, Any]) -> str:
    """Identify a file without "model" by its keys."""
    if any(name.startswith(("esm.", "lm_head.decoder")) for name in tree):
        return "is a pytorch_model.bin of Hugging Face; give the folder that it is in, with its config.json"
    if any(value == "<Tensor>" for value in tree.values()):
        return (
            "is a bare state dict, without the sizes of the model; save {'args': sizes, 'model': weights} for ESM-1b, "
            "or {'cfg': {'model': sizes}, 'model': weights} for ESM-2, with the sizes as an argparse.Namespace"
        )
    return f"has no {_WEIGHTS!r} with weights in it; it is no file of fair-esm"


def _arguments(path: Path, tree: Mapping[str, Any]) -> tuple[_Arguments, bool]:
    """Return the arguments, and whether the model is an ESM-2. Raises `InterchangeError` for unsupported models."""
    cfg, args = tree.get("cfg"), tree.get("args")
    if isinstance(cfg, dict) and isinstance(cfg.get("model"), dict):
        arguments = _Arguments(f"{path}: cfg['model']", cfg["model"])
        _refuse_other_models(arguments, str(arguments.values.get("arch")))
        return arguments, True
    if isinstance(args, dict):
        arguments = _Arguments(f"{path}: args", args)
        arch = str(arguments.require("arch"))
        _refuse_other_models(arguments, arch)
        if arch != "roberta_large":
            raise InterchangeError(
                f"{arguments.where}: arch is {quoted(arch)}; known is 'roberta_large', of ESM-1b and ESM-1v"
            )
        return arguments, False
    if path.name.endswith(_REGRESSION):
        raise InterchangeError(f"{path}: has the weights for contacts only; give the model's own file, beside it")
    raise InterchangeError(
        f"{path}: has weights, but neither 'args' (ESM-1b, ESM-1v) nor 'cfg' with a 'model' (ESM-2); without them the "
        "sizes of the model are unknown"
    )


def _refuse_other_models(arguments: _Arguments, arch: str) -> None:
    for name, why in _OTHER_MODELS.items():
        if name in arch:
            raise InterchangeError(f"{arguments.where}: arch is {quoted(arch)}: {why}")


def _left_out(path: Path, tree: Mapping[str, Any]) -> list[str]:
    """Return notes on other contents of the file, such as fairseq's optimizer state."""
    if others := sorted(quoted(name) for name in tree.keys() - {"args", "cfg", _WEIGHTS}):
        return [f"left out of {path.name}: {', '.join(others)}"]
    return []


def _esm1b(arguments: _Arguments, tensors: SourceTensors) -> EncoderConfig:
    """Return the configuration of an ESM-1b, or of an ESM-1v if the embeddings have no layer norm."""
    return _config(
        arguments,
        ffn_hidden_size=arguments.require("ffn_embed_dim"),
        seq_length=arguments.require("max_positions"),
        token_dropout=arguments.get("token_dropout") or False,
        embedding_layernorm=any(name.startswith("emb_layer_norm_before.") for name in tensors.places),
        position_embedding=LEARNED,
    )


def _esm2(arguments: _Arguments, tensors: SourceTensors) -> EncoderConfig:
    if (table := f"{FAIR_ESM.position_embeddings}.weight") in tensors.places:
        raise InterchangeError(
            f"{tensors.place(table)} is a table of learned positions; a file with 'cfg' is ESM-2, which has rotary ones"
        )
    hidden = arguments.require("embed_dim")
    return _config(
        arguments,
        ffn_hidden_size=4 * hidden if isinstance(hidden, int) else hidden,  # esm/model/esm2.py
        seq_length=_ESM2_SEQ_LENGTH,
        token_dropout=arguments.require("token_dropout"),
        position_embedding=ROTARY,
    )


def _config(arguments: _Arguments, **others: Any) -> EncoderConfig:
    """Return the configuration from the keys that both kinds of file share, and from `others`."""
    sizes = {
        "num_layers": arguments.require("layers"),
        "hidden_size": arguments.require("embed_dim"),
        "num_attention_heads": arguments.require("attention_heads"),
        "hidden_dropout": arguments.get("dropout") or 0.0,
        "attention_dropout": arguments.get("attention_dropout") or 0.0,
    }
    try:
        return EncoderConfig.from_config(sizes | others | _FIXED)
    except ConfigError as error:
        raise InterchangeError(f"{arguments.where}: in our terms, {error}") from error
