"""What in a plan does not fit together, or departs from the recipe's source: one line each, with what to do.

What cannot run at all is refused before there is a plan (`load_recipe`). These are choices that would run, and that
somebody may regret after a thousand GPU hours.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from bionemo_esm.alphabet import SPECIAL_TOKENS_PER_SEQUENCE
from bionemo_esm.data.dataloader import divisors
from bionemo_esm.errors import ConfigError
from bionemo_esm.model.config import COSINE
from bionemo_esm.model.schedule import learning_rate
from bionemo_esm.pretraining.plan import Plan, memory_of
from bionemo_esm.pretraining.run_context import validation_batch_size

USABLE = 0.9
"""Of a device's memory. The rest is for what `Memory` does not count: the CUDA context, work space, gaps."""

_SLACK = 0.02  # by which two numbers of steps or epochs may differ without a word
_EVEN_SHARE = 4.0  # longest sequences that a rank's share of a batch should hold, to come out about even


def findings(plan: Plan) -> list[str]:
    """Everything worth a look, in the order in which a run would meet it."""
    return [text for check in CHECKS if (text := check(plan)) is not None]


def _global_batch(plan: Plan) -> str | None:
    return plan.recipe.departure()


def _origin(plan: Plan) -> str | None:
    path = plan.recipe.continue_from_path
    if not plan.facts.start.missing:
        return None
    return f"continue_from_path: there is no {path} here; its number of steps is not known, {_assumed(plan)}"


def _assumed(plan: Plan) -> str:
    step = plan.facts.start.step
    return f"and taken as {step:,}, as published" if step else "and the plan begins at step 0"


def _length(plan: Plan) -> str | None:
    published = plan.recipe.published
    if published is None or published.steps is None or published.steps == plan.steps:
        return None
    last = published.steps + plan.facts.start.step
    return (
        f"trainer.max_steps: the run is {plan.steps:,} steps long, the published one {published.steps:,}; "
        f"trainer.max_steps={last} makes them alike"
    )


def _another_rate(plan: Plan) -> str | None:
    start = plan.facts.start
    if start.learning_rate is None:
        return None
    rate = learning_rate(plan.recipe.optim, start.step)
    if math.isclose(rate, start.learning_rate, rel_tol=0.01):
        return None
    return (
        f"the rate goes from {start.learning_rate:.2e}, where the run before left it, to {rate:.2e} at step "
        f"{start.step:,}: the schedule is another one; optim.lr, min_lr and max_steps of optim.sched decide it"
    )


def _published_epochs(plan: Plan) -> str | None:
    """Of the published steps and batch, over the data there are."""
    published, sequences = plan.recipe.published, plan.facts.data.train_sequences
    if published is None or not (published.steps and published.epochs and published.global_batch_size):
        return None
    epochs = published.steps * published.global_batch_size / sequences
    if abs(epochs / published.epochs - 1) <= _SLACK:
        return None
    steps = round(published.epochs * sequences / published.global_batch_size)
    return (
        f"the source's {published.steps:,} steps of {published.global_batch_size:,} make {epochs:,.0f} epochs of "
        f"{sequences:,} sequences; it says about {published.epochs:,.0f}. Steps are what counts here; "
        f"trainer.max_steps={steps + plan.facts.start.step} would make {published.epochs:,.0f}"
    )


def _less_than_an_epoch(plan: Plan) -> str | None:
    if plan.epochs >= 1:
        return None
    return (
        f"the run sees {plan.epochs:.1%} of the training sequences; trainer.max_steps="
        f"{plan.facts.start.step + -int(-plan.steps_per_epoch // 1)} would show it all of them once"
    )


def _more_than_the_data(plan: Plan) -> str | None:
    if plan.steps_per_epoch >= 1:
        return None
    return (
        f"a global batch of {plan.batch.sequences:,.0f} sequences is more than the "
        f"{plan.facts.data.train_sequences:,} there are: a step shows the same ones more than once; make it smaller"
    )


def _warm_up(plan: Plan) -> str | None:
    trainer, optim = plan.recipe.trainer, plan.recipe.optim
    if trainer.max_steps > optim.warmup_steps:
        return None
    return (
        f"optim.sched.warmup_steps ({optim.warmup_steps:,}) are not over when the run ends, at step "
        f"{trainer.max_steps:,}; give it fewer, or warmup_ratio in their place"
    )


def _horizon(plan: Plan) -> str | None:
    last, optim = plan.recipe.trainer.max_steps, plan.recipe.optim
    if optim.schedule != COSINE:
        return None
    if optim.max_steps < last:
        return (
            f"optim.sched.max_steps ({optim.max_steps:,}): the rate stays at its minimum for the "
            f"{last - optim.max_steps:,} steps after it; null ends the schedule with the run"
        )
    if optim.max_steps > (1 + _SLACK) * last and plan.facts.next_recipe is None:
        return (
            f"optim.sched.max_steps ({optim.max_steps:,}): the run ends at step {last:,}, at a rate of "
            f"{learning_rate(optim, last):.2g} still, and no recipe continues it; null ends the schedule with the run"
        )
    return None


def _positions(plan: Plan) -> str | None:
    longest, seq_length, key = plan.facts.data.longest_residues, plan.recipe.model.seq_length, "the store's longest"
    if longest is None or plan.recipe.data.max_residues < longest:
        longest, key = plan.recipe.data.max_residues, "data.max_residues"
    needed = longest + SPECIAL_TOKENS_PER_SEQUENCE
    if needed >= seq_length or not plan.recipe.model.position_rows:  # rotary ones have nothing to train
        return None
    return (
        f"model.seq_length ({seq_length:,}): no sequence is so long ({key}: {longest:,}), and its last "
        f"{seq_length - needed:,} positions are never trained; {needed} would do"
    )


def _evenness(plan: Plan) -> str | None:
    share, longest, ranks = (
        plan.batch.tokens_of_a_rank,
        plan.recipe.model.seq_length,
        plan.recipe.trainer.data_parallel_size,
    )
    if ranks == 1 or share >= _EVEN_SHARE * longest:
        return None
    fewer = max(int(plan.batch.tokens // (_EVEN_SHARE * longest)), 1)
    even = f"{fewer:,} ranks or fewer" if fewer > 1 else "one rank"
    return (
        f"a rank's share of a batch is {share:,.0f} tokens, about {share / plan.facts.data.mean_tokens:,.1f} sequences "
        f"of up to {longest:,}: ranks with short ones wait for others. Even shares want {even}"
    )


def _tensor_parallel(plan: Plan) -> str | None:
    trainer = plan.recipe.trainer
    if trainer.devices % trainer.tensor_model_parallel_size == 0:
        return None
    return (
        f"trainer.tensor_model_parallel_size ({trainer.tensor_model_parallel_size}) does not divide trainer.devices "
        f"({trainer.devices}): some copies of the model lie on two nodes, and every layer waits for the network between"
    )


def _memory(plan: Plan) -> str | None:
    capacity = plan.facts.device.memory_bytes
    if capacity is None or plan.most_memory.total <= USABLE * capacity:
        return None
    name = "micro_batch_tokens" if plan.recipe.data.micro_batch_tokens else "micro_batch_size"
    of = f"GB of the {capacity / 1e9:,.1f} that {plan.facts.device.name} has"
    if plan.memory.total > USABLE * capacity:
        said = f"data.{name} takes {plan.memory.total / 1e9:,.1f} {of}, and CUDA a few"
    else:
        said = (
            f"data.{name} takes {plan.memory.total / 1e9:,.1f}, but would take {plan.most_memory.total / 1e9:,.1f} "
            f"{of} if all its sequences were {plan.recipe.model.seq_length:,} tokens long; lengths are dealt evenly, "
            "so that is unlikely"
        )
    return f"{said}; {_smaller(plan, USABLE * capacity)}"


def _smaller(plan: Plan, room: float) -> str:
    """The largest micro batch whose worst fits, with the same optimisation."""
    recipe = plan.recipe
    fixed = memory_of(recipe, plan.precision, 0).total
    tokens = int((room - fixed) / ((plan.most_memory.total - fixed) / plan.batch.most_micro_tokens))
    if recipe.data.micro_batch_tokens is not None and tokens >= recipe.model.seq_length:
        return (
            f"micro_batch_tokens={max(tokens // 512 * 512, recipe.model.seq_length)} fits, with the same optimisation"
        )
    if recipe.data.micro_batch_size is not None and recipe.global_batch_size is not None:
        share = recipe.global_batch_size // recipe.trainer.data_parallel_size
        sizes = [size for size in divisors(share) if size * recipe.model.seq_length <= tokens]
        kept = "" if recipe.data.global_batch_size else f" and global_batch_size={recipe.global_batch_size}"
        if sizes:
            return f"micro_batch_size={sizes[-1]}{kept} always fits, with the same optimisation"
    return "trainer.tensor_model_parallel_size or trainer.shard_optimizer take some of it off each device"


def _precision(plan: Plan) -> str | None:
    device = plan.facts.device
    if plan.recipe.trainer.accelerator == "cpu" or plan.precision != "bf16" or device.multiplies_bf16:
        return None
    return f"trainer.precision=bf16: {device.name} has no units for it; auto trains in float32 there"


def _validation(plan: Plan) -> str | None:
    if plan.facts.data.validation_sequences is None:
        return None
    try:
        validation_batch_size(plan.recipe, plan.facts.data.validation_sequences)
    except ConfigError as error:
        return str(error)
    return None


def _validation_interval(plan: Plan) -> str | None:
    every = plan.recipe.trainer.val_check_interval
    if every <= plan.steps:
        return None
    return (
        f"trainer.val_check_interval ({every:,}) is more than the run's {plan.steps:,} steps: only its end is validated"
    )


def _checkpoints(plan: Plan) -> str | None:
    every = plan.recipe.exp_manager.checkpoints.every_n_train_steps
    if plan.storage.checkpoints > 1 or every <= plan.steps:
        return None
    return (
        f"exp_manager.checkpoints.every_n_train_steps ({every:,}) is more than the run's {plan.steps:,} steps: there "
        "is nothing to go on from before its end"
    )


def _average(plan: Plan) -> str | None:
    saving, written = plan.recipe.exp_manager.checkpoints, plan.storage.checkpoints
    if not saving.average_last or saving.average_last <= written:
        return None
    return (
        f"exp_manager.checkpoints.average_last ({saving.average_last}) x every_n_train_steps "
        f"({saving.every_n_train_steps:,}) reach back beyond the run's {plan.steps:,} steps: "
        + (f"{written} checkpoints are averaged" if written > 1 else "there is one checkpoint and no average")
    )


def _disk(plan: Plan) -> str | None:
    free, needed = plan.facts.free_bytes, plan.storage.peak_bytes
    if free is None or free >= needed:
        return None
    return (
        f"exp_manager.exp_dir: the run takes {needed / 1e9:,.1f} GB, {free / 1e9:,.1f} are free; choose another place, "
        "or lower exp_manager.checkpoints.keep_last or average_last"
    )


CHECKS: tuple[Callable[[Plan], str | None], ...] = (
    *(_origin, _another_rate, _global_batch, _length, _published_epochs, _less_than_an_epoch, _more_than_the_data),
    *(_warm_up, _horizon),
    *(_positions, _evenness, _tensor_parallel, _memory, _precision),
    *(_validation, _validation_interval, _checkpoints, _average, _disk),
)
