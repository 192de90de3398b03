"""The plan of a run as text: aligned lines, and a list of what does not fit together."""

from __future__ import annotations

import sys
import textwrap

from bionemo_esm.console import Console, duration
from bionemo_esm.model.config import COSINE, SHARDED_OPTIMIZER, WARMUP_STABLE_DECAY
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.pretraining.plan import PFLOP_DAY, Orthogonalization, Plan, findings, gather_facts, plan_of, scientific
from bionemo_esm.pretraining.recipe import Recipe
from bionemo_esm.pretraining.run_context import describe_model

_LINE, _LABEL = 118, 11
_PRECISIONS = {"bf16": "bfloat16 with float32 masters", "32": "float32"}


def show_plan(recipe: Recipe) -> None:
    """Print the plan of a recipe. Nothing is written. Raises `ConfigError` if there is no data to plan with."""
    plan = plan_of(recipe, gather_facts(recipe))
    Console(sys.stdout).print_line(f"{describe_plan(plan)}\n\n{describe_findings(plan)}")


def describe_plan(plan: Plan) -> str:
    """Return the plan as aligned lines, without its findings."""
    rows = {
        "model": _model(plan),
        "data": _data(plan),
        "devices": _devices(plan),
        "batch": _batch(plan),
        "steps": _steps(plan),
        "memory": _memory(plan),
        "work": _work(plan),
        "optimizer": _optimizer(plan),
        "time": _time(plan),
        "disk": _disk(plan),
        "rate": _rate(plan),
    }
    lines = [line for label, text in rows.items() if text for line in _row(label, text)]
    return "\n".join([f"\n{plan.recipe.name}: a plan; nothing is started", *lines])


def describe_findings(plan: Plan) -> str:
    """Return the findings, a paragraph each."""
    found = findings(plan)
    if not found:
        return "Nothing in it contradicts itself or the recipe's source."
    return "\n".join(["look at", *(_item(text) for text in found)])


def _item(text: str) -> str:
    return textwrap.fill(text, _LINE, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _row(label: str, text: str) -> list[str]:
    wrapped = textwrap.wrap(text, _LINE - _LABEL, break_on_hyphens=False, break_long_words=False)
    return [f"  {label if not number else '':<{_LABEL - 2}}{line}" for number, line in enumerate(wrapped)]


def _model(plan: Plan) -> str:
    model = plan.recipe.model
    return (
        f"{describe_model(plan.recipe)}, {model.parameters:,} parameters, up to {model.seq_length} tokens; "
        f"{_PRECISIONS[plan.precision]}"
    )


def _data(plan: Plan) -> str:
    data = plan.facts.data
    held_out = "" if data.validation_sequences is None else f"; {data.validation_sequences:,} to validate on"
    return (
        f"{data.train_sequences:,} sequences an epoch, {data.mean_tokens:,.1f} tokens each on average, cropped "
        f"({data.source}){held_out}"
    )


def _devices(plan: Plan) -> str:
    trainer, device, published = plan.recipe.trainer, plan.facts.device, plan.recipe.published
    nodes = f": {trainer.num_nodes} nodes x {trainer.devices}" if trainer.num_nodes > 1 else ""
    text = f"{trainer.world_size} x {device.name} ({device.source}){nodes}"
    if (split := trainer.tensor_model_parallel_size) > 1:
        text += f"; {split} hold a copy of the model together, {trainer.data_parallel_size} copies"
    if published is not None and trainer.world_size != published.gpus:
        same = "" if plan.recipe.batch_departure() else ", which does not matter while the global batch is the same"
        text += f"; the source had {published.gpus}{same}"
    return text


def _batch(plan: Plan) -> str:
    recipe, batch = plan.recipe, plan.batch
    by_tokens = recipe.data.global_batch_tokens
    whole = (
        f"{batch.sequences:,.0f} sequences, about {batch.tokens:,.0f} tokens"
        if by_tokens is None
        else f"up to {by_tokens:,} tokens, about {batch.sequences:,.0f} sequences"
    )
    most = recipe.data.micro_batch_tokens
    micro = f"{recipe.data.micro_batch_size:,} sequences" if most is None else f"at most {most:,} tokens"
    accumulated = "1 micro batch" if batch.accumulation == 1 else f"{batch.accumulation:,.0f} micro batches"
    ranks = f"{recipe.trainer.data_parallel_size:,} ranks x " if recipe.trainer.data_parallel_size > 1 else ""
    same = "" if recipe.published is None or recipe.batch_departure() else "; the published batch"
    if (warmup := recipe.batch_warmup) is not None:
        same += f"; from {warmup.start:,} on, {warmup.increment:,} more at a time, for {warmup.samples:,} sequences"
    return f"{whole} = {ranks}{accumulated} of {micro} (about {batch.micro_tokens:,.0f} tokens){same}"


def _steps(plan: Plan) -> str:
    start, text = plan.facts.start, f"{plan.steps:,}"
    if start.step:
        text += f", after the first {start.step:,} ({start.source}), {plan.recipe.trainer.max_steps:,} in all"
    text += (
        f": {plan.epochs:,.1f} epochs of {_number(plan.steps_per_epoch)} steps; {_count(plan.samples)} sequences, "
        f"{_count(plan.tokens)} tokens"
    )
    if start.step and start.samples is not None:
        whole = (start.samples + plan.samples) / plan.facts.data.train_sequences
        text += f"; {whole:,.1f} epochs with those before"
    return text


def _memory(plan: Plan) -> str:
    memory, most, capacity = plan.memory, plan.most_memory.total, plan.facts.device.memory_bytes
    owner = "process" if plan.recipe.trainer.accelerator == "cpu" else "GPU"
    names = ("parameters", "masters", "gradients", "moments", "activations", "recomputed")
    parts = [(name, getattr(memory, name)) for name in names]
    text = _size(memory.total) + (f" of {_size(capacity)}" if capacity is not None else "") + f" a {owner}"
    text += ": " + ", ".join(f"{name} {_size(value)}" for name, value in parts if value)
    if most > 1.05 * memory.total:
        text += f"; {_size(most)} with a micro batch as large as can be"
    return text + ("" if owner == "process" else "; and 1 or 2 GB for CUDA itself")


def _work(plan: Plan) -> str:
    days = plan.flops / PFLOP_DAY
    again = f"; {plan.recomputed_flops / plan.flops:.0%} more are computed again" if plan.recomputed_flops else ""
    return f"{scientific(plan.flops)} FLOPs" + (f", {_number(days)} PFLOP-days" if days >= 0.01 else "") + again


def _optimizer(plan: Plan) -> str:
    """Return what an optimizer that orthogonalizes matrices costs; nothing for others."""
    cost, trainer = Orthogonalization.of(plan.recipe), plan.recipe.trainer
    if not cost.flops:
        return ""
    sharded = trainer.sharding == SHARDED_OPTIMIZER and trainer.data_parallel_size > 1
    sharing = trainer.data_parallel_size if sharded else 1
    share = cost.flops * plan.steps * trainer.world_size / sharing / plan.flops
    text = f"{plan.recipe.optim.name} orthogonalizes matrices: {scientific(cost.flops)} FLOPs a step, "
    text += f"sharded over {sharing} data-parallel ranks" if sharded else "on every rank"
    text += f", {share:.1%} as much as a rank's forward and backward passes"
    if cost.gathered_bytes:
        text += f"; gathers {_size(cost.gathered_bytes)} a step on a rank"
    return text


def _time(plan: Plan) -> str:
    device, seconds = plan.facts.device, plan.device_seconds
    if device.name == "CPU":
        return "not known for a CPU before it runs: the first lines of a run say how long it will take"
    peak = device.peak(plan.precision)
    if peak is None:
        return f"not known: no peak is on record for {device.name} in {_PRECISIONS[plan.precision].split()[0]}"
    tera = f"{peak / 1e12:,.4g} TFLOP/s"
    if seconds is None or plan.wall_seconds is None or plan.recipe.published is None:
        least = (plan.flops + plan.recomputed_flops) / peak
        return f"at least {_number(least / 3600)} GPU hours, at the peak of {tera}; a third of that is common"
    return (
        f"{_number(seconds / 3600)} GPU hours, {duration(plan.wall_seconds)} in all, if "
        f"{plan.recipe.published.mfu:.0%} of {tera} is reached (assumed): {plan.tokens_per_second_and_device:,.0f} "
        "tokens/s a GPU"
    )


def _disk(plan: Plan) -> str:
    saving, storage = plan.recipe.exp_manager.checkpoints, plan.storage
    plural, best = "s" * (storage.checkpoints > 1), ", and the best" if saving.keep_best else ""
    text = (
        f"{storage.checkpoints:,} checkpoint{plural} of {_size(storage.checkpoint_bytes)}, one every "
        f"{saving.every_n_train_steps:,} steps; {saving.keep_last} stay{best}"
    )
    if (averaged := storage.kept_snapshots - 1) > 1:
        text += f"; the weights of the last {averaged}, {_size(storage.weights_bytes)} each, for the average"
    return f"{text}. {_size(storage.written_bytes)} written in all, {_size(storage.peak_bytes)} at most at a time"


def _rate(plan: Plan) -> str:
    return "; ".join(f"{scientific(rate)} {words}" for _, rate, words in key_rates(plan))


def key_rates(plan: Plan) -> list[tuple[int, float, str]]:
    """Return (step, learning rate, words) for the key points of the schedule from this run's first step on."""
    optim, first, last = plan.recipe.optim, plan.facts.start.step, plan.recipe.trainer.max_steps
    points = {first: "at first", optim.warmup_steps: f"at its peak (step {optim.warmup_steps:,})"}
    if optim.schedule == WARMUP_STABLE_DECAY:
        points[optim.max_steps - optim.decay_steps] = f"until step {optim.max_steps - optim.decay_steps:,}"
        points[optim.max_steps] = f"from step {optim.max_steps:,} on"
    elif optim.schedule == COSINE:
        lowest = optim.max_steps - optim.constant_steps
        points[lowest] = f"from step {lowest:,} on"
    points |= {step: f"{words}, after this run" for step, words in points.items() if step > last}
    points[last] = f"at the end (step {last:,})"
    return [(step, learning_rate(optim, step), points[step]) for step in sorted(points) if step >= first]


def _count(number: float) -> str:
    return f"{number:,.0f}" if number < 1e6 else scientific(number)


def _number(value: float) -> str:
    """Return three significant digits, with commas."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(value: float) -> str:
    """Return bytes with a unit from kB to TB."""
    unit, size = next(
        ((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)) if value >= size), ("kB", 1e3)
    )
    return f"{_number(value / size)} {unit}"
