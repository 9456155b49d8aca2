"""The training loop, from data in memory to a trained model. Device and backward: Accelerate's."""

import copy
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from qvgpt.checkpoint import (
    TrainState,
    fault,
    load_checkpoint,
    load_model,
    newest_checkpoint,
    optimizer_state,
    parameter_names,
    save_best,
    save_checkpoint,
    step_directory,
)
from qvgpt.data.batches import Rows
from qvgpt.errors import QvgptError
from qvgpt.fit_options import FitOptions, learning_rate_factor, parameter_groups, step_seed
from qvgpt.model_card import adapter_card, write_card
from qvgpt.models.artefact import ValueInfo
from qvgpt.models.attention import leave_packed_uncompiled
from qvgpt.models.disk import writing
from qvgpt.models.lora import ADAPTER
from qvgpt.models.sharded import whole
from qvgpt.models.value_model import ValueModel
from qvgpt.objectives import Objectives, Values, counted
from qvgpt.processes import accelerator, gathered_rows, others_there, sums
from qvgpt.refusals import refuse
from qvgpt.run import Interruption, RunProgress
from qvgpt.trajectory import (
    Trajectory,
    TrajectoryBatch,
    collate,
    fingerprint,
    mean_return,
    nothing_counts,
)
from qvgpt.watch import Watch

_SECONDS_BETWEEN_SAVES = 60.0  # unless save_every says otherwise


class Training:
    """The state of one `fit`: everything the loop touches, in one place."""

    def __init__(
        self,
        model: ValueModel,
        data: Sequence[Trajectory],
        objectives: Objectives,
        options: FitOptions,
        eval_data: Sequence[Trajectory] = (),
        output: Path | None = None,
    ):
        self.data, self.objectives, self.options = data, objectives, options
        self.rows = Rows(data, options.packed, options.share_prompts)
        self.steps_per_epoch = math.ceil(len(data) / options.batch_size)
        # less a rounding: 1.1 · 50 is 55 and a little more
        total = math.ceil(options.passes * self.steps_per_epoch * (1 - 1e-12))
        self.total_steps = min(total, options.max_steps or total)
        self.pad_id, self.end_ids = 0, ()
        if model.tokenizer is not None:
            template = model.tokenizer.template
            self.pad_id, self.end_ids = template.pad, tuple(template.end_ids)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, options), betas=(0.9, 0.95), fused=True
        )
        if options.dropout is not None:
            model.trunk.set_dropout(options.dropout)
        model.trunk.set_gradient_checkpointing(options.gradient_checkpointing)
        model.candidates = objectives.candidates
        if options.slow_trunk:
            model.keep_slow_trunk()
        if options.compiled:
            leave_packed_uncompiled()
            for block in model.trunk.blocks:
                block.compile()
        self.accelerator = accelerator(model, objectives)
        self.names = parameter_names(model, optimizer)
        self.bare = model
        self.plain: ValueModel | None = model  # what is saved, on the main process: never sharded
        self.is_sharded = self.accelerator.is_fsdp2
        if self.is_sharded and options.slow_trunk:
            raise QvgptError("fit.slow_trunk: not where weights are sharded (FSDP2): leave it off")
        if self.is_sharded:
            self.plain = copy.deepcopy(model) if self.accelerator.is_main_process else None
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        size = 2 * (options.micro_batch_size or options.batch_size)
        order = sorted(range(len(eval_data)), key=lambda i: len(eval_data[i].tokens))
        self.eval_batches = self.my_batches(eval_data, order, size) if eval_data else []
        watched = eval_data and model.heads is not None and objectives.teaches_values
        watched = watched and objectives.level == "token"  # else tokens are not judged
        parts = self.my_parts(order, size)
        self.watch = Watch(model, objectives, eval_data, parts, data) if watched else None
        self.state = TrainState(data_sha256=fingerprint(data), eval_sha256=fingerprint(eval_data))
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.checkpoints = output / "checkpoints" if output else None
        self.best_models = output / "best" if output else None

    def resume(self, console: Console, accept_changes: bool) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        assert self.checkpoints is not None
        newest = newest_checkpoint(self.checkpoints, lambda s: console.print(s, soft_wrap=True))
        if newest is None:
            return
        state = load_checkpoint(newest, self.bare, self.names, self.optimizer)
        now = {"data_sha256": self.state.data_sha256, "eval_sha256": self.state.eval_sha256}
        if any(getattr(state, name) != value for name, value in now.items()):
            if not accept_changes:
                raise QvgptError(
                    f"{newest}: was trained on other data than there are now; restore them, train "
                    "anew elsewhere, or accept them with --accept_changes true"
                )
            console.print("goes on with other data than the run began with")
        if state.eval_sha256 != self.state.eval_sha256:  # the best so far has no like there
            state.best, state.best_step, state.bad_evals = None, 0, 0
        self.state = replace(state, **now)

    def run(self, progress: RunProgress) -> None:
        """All steps still to come, with evaluations and checkpoints between them."""
        state, options = self.state, self.options
        eval_every = options.eval_every or self.steps_per_epoch
        started = time.perf_counter() - state.seconds
        saved_at, saved_step = time.monotonic(), state.step
        with Interruption() as interruption:
            for micro_batches in self.optimizer_steps():
                parts = self.learn(micro_batches)
                state.seconds = time.perf_counter() - started
                progress.step(state.step, parts, state.tokens / state.seconds)
                at_eval = state.step % eval_every == 0 or state.step == self.total_steps
                if at_eval and self.eval_batches:
                    self.evaluate(progress)
                if options.patience and state.bad_evals >= options.patience:
                    return
                overdue = time.monotonic() - saved_at > _SECONDS_BETWEEN_SAVES
                # the clocks of processes differ, and a signal may reach one of them only
                overdue = overdue and self.accelerator.is_main_process
                asked, overdue = sums(self.accelerator, [interruption.asked is not None, overdue])
                if options.save_every:
                    due = state.step % options.save_every == 0
                else:
                    due = at_eval and overdue
                if self.checkpoints is not None and (due or asked):
                    self.save_checkpoint()
                    saved_at, saved_step = time.monotonic(), state.step
                if asked:
                    where = f"; step {saved_step} is in {self.checkpoints}: go on with --resume"
                    kind = (
                        interruption.asked or KeyboardInterrupt
                    )  # None: another process was asked
                    raise kind(where if self.checkpoints else "")

    def collate(self, texts: Sequence[Trajectory]) -> TrajectoryBatch:
        """A batch as the options want it."""
        options = self.options
        return collate(texts, self.pad_id, self.end_ids, options.packed, options.share_prompts)

    def optimizer_steps(self) -> Iterator[list[TrajectoryBatch]]:
        """The micro-batches of each step still to come."""
        options = self.options
        while self.state.step < self.total_steps:
            epoch, position = divmod(self.state.step, self.steps_per_epoch)
            order = self.rows.batches(options.batch_size, options.seed, epoch)
            for indices in order[position:]:
                yield self.my_batches(self.data, indices, options.micro_batch_size)
                if self.state.step >= self.total_steps:
                    return

    def my_batches(
        self, texts: Sequence[Trajectory], indices: Sequence[int], size: int | None
    ) -> list[TrajectoryBatch]:
        """This process's share of some texts, in micro-batches; all processes get equally many.

        Where there are too few texts, a batch in which nothing counts makes up for them.
        """
        return [
            self.collate([texts[i] for i in part])
            if part
            else nothing_counts(self.collate([texts[indices[0]]]))
            for part in self.my_parts(indices, size)
        ]

    def my_parts(self, indices: Sequence[int], size: int | None) -> list[Sequence[int]]:
        """The indices of each of this process's micro-batches; the last ones may be empty."""
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        most = math.ceil(len(indices) / processes)
        share, size = indices[mine::processes], size or most
        if self.options.share_prompts:  # of one prompt together
            share = indices[mine * most : (mine + 1) * most]
        return [share[start : start + size] for start in range(0, most, size)]

    def measure(
        self, micro_batches: Sequence[TrajectoryBatch], learn: bool, watch: Watch | None = None
    ) -> dict[str, float]:
        """The loss and its parts, over all micro-batches as if they were one; with gradients.

        Every decision weighs the same, however a batch is split; so does every token where an
        objective counts those. `watch` is shown the values.
        """
        objectives = [o for _, o in self.objectives.terms]
        counts = [[int(counted(o, b).sum()) for o in objectives] for b in micro_batches]
        sizes = [sum(int(b.mask.sum()) for b in micro_batches)]
        sizes.append(sum(int(b.attention_mask.sum()) for b in micro_batches))
        *totals, decisions, tokens = sums(
            self.accelerator, [*map(sum, zip(*counts, strict=True)), *sizes]
        )
        self.state.tokens += int(tokens) * learn
        if not any(totals) and not decisions:
            raise QvgptError(f"step {self.state.step + 1}: no decision in the whole batch counts")
        parts: dict[str, float] = {}
        for n, (batch, units) in enumerate(zip(micro_batches, counts, strict=True), start=1):
            shares = [unit / max(total, 1) for unit, total in zip(units, totals, strict=True)]
            whole = not learn or n == len(micro_batches)  # gradients go around once a step
            with nullcontext() if whole else self.accelerator.no_sync(self.model):
                batch = batch.to(self.accelerator.device)
                values = self.values(batch, watch.needs(n - 1) if watch else frozenset())
                loss, found = self.loss(values, batch, shares)
                for name, value in found.items():
                    parts[name] = parts.get(name, 0.0) + value
                if learn:
                    # processes average their gradients, where the loss is a sum over all of them
                    self.accelerator.backward(loss * self.accelerator.num_processes)
                if watch:
                    watch.see(n - 1, values, batch)
        parts = dict(zip(parts, sums(self.accelerator, list(parts.values())), strict=True))
        if not learn:  # a mean over nothing is no loss of 0
            names = self.objectives.names
            silent = {name for name, n in zip(names, totals, strict=True) if not n}
            parts = {k: v for k, v in parts.items() if k.split("/")[0] not in silent}
        self.stop_if_not_finite(parts)
        return parts

    def values(self, batch: TrajectoryBatch, more: frozenset[str]) -> Values:
        """What the objectives read, and more."""
        needs = self.objectives.needs | more
        # not Accelerator(mixed_precision=...): that is global to the process and set once
        kind = self.accelerator.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.options.bf16):
            return self.model(batch, needs, even=not self.objectives.weighs)

    def loss(
        self, values: Values, batch: TrajectoryBatch, shares: list[float]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Σ weight · share · loss, and its parts times their share."""
        total = torch.zeros((), device=batch.tokens.device)
        parts: dict[str, torch.Tensor] = {}
        terms = zip(self.objectives.names, self.objectives.terms, shares, strict=True)
        for name, (weight, objective), share in terms:
            loss = objective(values, batch)
            total = total + weight * share * loss.total
            parts |= {f"{name}/{part}": share * value for part, value in loss.parts.items()}
        numbers = torch.stack([total.detach(), *parts.values()]).tolist()  # one wait for the device
        return total, dict(zip(["total", *parts], numbers, strict=True))

    def learn(self, micro_batches: Sequence[TrajectoryBatch]) -> dict[str, float]:
        """One optimizer step; returns the loss parts."""
        process = self.accelerator.process_index
        torch.manual_seed(step_seed(self.options.seed, self.state.step, process))
        self.model.train()
        parts = self.measure(micro_batches, learn=True)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip)
        parts["grad_norm"] = float(norm) if norm is not None else math.nan
        self.stop_if_not_finite(parts)
        factor = learning_rate_factor(self.state.step, self.total_steps, self.options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.bare.heads is not None and self.objectives.learns_values:
            self.bare.heads.update_targets(self.options.tau)
        if self.bare.slow is not None:
            self.bare.slow.update(self.bare.trunk, self.options.tau)
        self.state.step += 1
        return parts

    def stop_if_not_finite(self, parts: dict[str, float]) -> None:
        """Raise `QvgptError` that names what is not a number any more."""
        bad = [name for name, value in parts.items() if not math.isfinite(value)]
        if bad:
            raise QvgptError(
                f"step {self.state.step + 1}: {', '.join(bad)} became NaN or infinite; "
                "lower the learning rate or look at the rewards with `qvgpt check`"
            )

    @torch.no_grad()
    def evaluate(self, progress: RunProgress) -> None:
        """Loss parts over the evaluation data, and what follows from them."""
        self.model.eval()
        found = self.state.eval = self.measure(self.eval_batches, learn=False, watch=self.watch)
        progress.log(self.state.step, {f"eval/{k}": v for k, v in found.items()}, show=True)
        if self.watch is not None:
            rows = gathered_rows(self.accelerator, self.watch.seen())
            self.watch.report(rows, self.state, progress)
        name = self.options.keep_best
        if name is None:
            return
        if self.state.best is not None and found[name] >= self.state.best:
            self.state.bad_evals += 1
            return
        self.state.best, self.state.best_step = found[name], self.state.step
        self.state.bad_evals = 0
        if self.best_models is not None and self.checkpoints is not None:
            plain = self.gathered()
            if plain is not None:
                save_best(self.best_models, plain, self.state.step, self.checkpoints)
        else:
            self.best_weights = {k: v.clone() for k, v in self.bare.state_dict().items()}

    def save_checkpoint(self) -> None:
        """All processes gather what is sharded; the main one writes."""
        assert self.checkpoints is not None
        plain, optimizer = self.gathered(), optimizer_state(self.names, self.optimizer)
        if plain is not None:
            save_checkpoint(
                self.checkpoints, plain, optimizer, self.state, self.options.keep, self.bare.slow
            )

    @torch.no_grad()
    def gathered(self) -> ValueModel | None:
        """The model as it would be in one process, on the main one; elsewhere None."""
        if self.is_sharded:
            own = {} if self.plain is None else self.plain.state_dict()
            for name, value in self.bare.state_dict().items():
                full = whole(value)
                if own:
                    own[name].copy_(full)
        if self.plain is not None:
            self.plain.info = self.bare.info
        return self.plain if self.accelerator.is_main_process else None

    def restore_best(self) -> None:
        """Put the model of the best evaluation back, after the last step."""
        if self.state.best is None:
            return
        self.optimizer.state.clear()  # makes room, so that this needs no more memory than a step
        if self.best_weights is not None:
            self.bare.load_state_dict(self.best_weights)
        elif self.best_models is not None:
            load_model(self._best_model(), self.bare)

    def _best_model(self) -> Path:
        """Where that of `best_step` lies: a later one may be of a run that went on elsewhere."""
        assert self.best_models is not None
        path = step_directory(self.best_models, self.state.best_step)
        if (found := fault(path)) is not None:
            raise QvgptError(f"{path}: the best model is no longer there as it was: {found}")
        return path


def fit(
    model: ValueModel,
    data: Sequence[Trajectory],
    objectives: Objectives,
    options: FitOptions,
    *,
    eval_data: Sequence[Trajectory] = (),
    output: Path | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train `model` in place and return a summary (steps, tokens/s, last and best losses).

    With `output`, writes log.jsonl, checkpoints and, at the end, the model itself there; where
    `keep_best` is set the model of the best evaluation is what is left in `model` and on disk.
    `resume` goes on from the newest checkpoint in `output`, exactly as if nothing had happened;
    with other data only if `accept_changes`.
    Fresh value heads start at the mean return of `data`, so that no constant has to be learned.
    Where the objectives change the trunk and teach no values, those learned before no longer fit
    it: `model` is left, and saved, without them. Where they teach values further, the guidance
    recommended before is forgotten.
    The first Ctrl-C or SIGTERM saves a checkpoint after the current step and raises
    KeyboardInterrupt, or its kind `Terminated`.
    """
    objectives = objectives.fitted_to(data)
    if objectives.needs_reference and model.reference is None:
        model.keep_reference()
    refuse(model, data, objectives, options, eval_data)
    stale = model.heads is not None and not model.heads.are_fresh and not objectives.teaches_values
    if objectives.learns_values and model.heads is not None and model.heads.are_fresh:
        model.heads.start_at(mean_return(data))
    if objectives.teaches_values:
        model.info.objectives, model.info.recommended_guidance = objectives.as_list(), None
        model.info.gamma, model.info.per_turn_discount = objectives.discount
        model.info.level = objectives.level
    training = Training(model, data, objectives, options, eval_data, output)
    is_main = training.accelerator.is_main_process
    console = console or Console(stderr=True, quiet=not is_main)
    if stale:
        console.print(
            "the objectives change the language model and teach no values: the model is saved "
            "without its value heads and recommended guidance, which would no longer fit it",
            soft_wrap=True,
        )
    if output is not None and resume:
        training.resume(console, accept_changes)
    elif output is not None and is_main:
        for spent in ("checkpoints", "best"):
            shutil.rmtree(output / spent, ignore_errors=True)
    state, log = training.state, output if is_main else None
    with (
        RunProgress(training.total_steps, state.step, log, options.tensorboard, console) as shown,
        others_there(training.accelerator),
    ):
        training.run(shown)
        training.restore_best()
        plain = training.gathered()
    for one in {model, plain or model}:
        one.eval()
        one.slow = None
        if stale:
            kept = ValueInfo(dialogues=one.info.dialogues, judged_by=one.info.judged_by)
            one.heads, one.info = None, kept
    if output is not None and plain is not None:
        with writing(output, "go on with --resume"):
            plain.save(output)
        if plain.trunk.lora is not None:
            write_card(output / ADAPTER, adapter_card(plain), console.print)
    return {
        "objectives": objectives.as_list(),
        "steps": state.step,
        "seconds": round(state.seconds, 2),
        "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1),
        "eval": state.eval,
        "values": state.values,
        "best": state.best,
        "best_step": state.best_step if state.best is not None else None,
    }
