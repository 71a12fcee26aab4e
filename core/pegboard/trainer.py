"""The loop: take a step's micro-batches, sum their gradients, clip, step, log, save, resume.

One global mean: the whole step's counts, over all ranks and micro-batches, are summed before the first
forward, and every loss is divided by them there. So the result depends neither on the world size nor on how
samples are packed or accumulated, up to rounding.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from loguru import logger

from pegboard.assemble import (
    ModelOnRanks,
    build_model,
    build_optimizer,
    build_run_data,
    find_weights_folder,
)
from pegboard.built_parts import check_built
from pegboard.callback_calls import CallbackCalls
from pegboard.callbacks import CheckpointSaved, StepEnd, TrainEnd, TrainFailure, TrainStart
from pegboard.commit import gather_from_ranks
from pegboard.contracts import Batch, ModelOutput, Tokenizer
from pegboard.data_loading import Cursor, DataSource
from pegboard.data_report import describe_plan
from pegboard.data_state import cursor_of, data_state
from pegboard.device import local_device, peak_memory_gib, use_all_cores
from pegboard.errors import TrainingError
from pegboard.evaluation import Evaluator
from pegboard.parallel import (
    Ranks,
    check_sizes,
    clip_gradients,
    gradient_norm,
    join_ranks,
    leave_ranks,
    reduce_once_per_step,
    set_gradient_sync,
    sum_over_ranks,
    trainable_parameters,
)
from pegboard.plugin_identity import MadeBy, check_made_by, identify_plugins
from pegboard.preparation import cache_folder, prepare_sources
from pegboard.rank_agreement import check_same_data
from pegboard.reporting import (
    SourceSums,
    StepResult,
    progress_bar,
    step_line,
    step_metrics,
)
from pegboard.run_folder import (
    MetricsLog,
    check_work_dir,
    choose_run_dir,
    describe_environment,
    start_logging,
    write_json,
)
from pegboard.sampling import derive_seed
from pegboard.savers import Saver, SaveRequest
from pegboard.step_state import StepStates
from pegboard.train_state import load_train_state, newest_checkpoint, read_train_state

if TYPE_CHECKING:
    from pegboard.plugin_manager import LoadedPlugins
    from pegboard.run_config import LoadedConfig

__all__ = ["StepResult", "Trainer", "train"]


def train(
    loaded: LoadedConfig,
    plugins: LoadedPlugins,
    *,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Run a validated config to its end. Collective: every rank calls it.

    A process group that the caller has started is used, and left as it is.
    """
    run = loaded.run
    made_by = identify_plugins(run, plugins)  # as imported: files may change while this runs
    use_all_cores()
    check_work_dir(run.work_dir)
    device = local_device()
    parallel = run.parallel
    # Again when the ranks join; here before hours of tokenizing.
    ours = not dist.is_initialized()
    world_size = int(os.environ.get("WORLD_SIZE", "1")) if ours else dist.get_world_size()
    check_sizes(world_size, parallel.replicate_size, parallel.expert_parallel_size)
    weights = find_weights_folder(run.load_from)
    tokenizer = run.tokenizer.build(trust_remote_code=trust_remote_code)
    sources, eval_sources = (
        prepare_sources(
            entries,
            cache=cache_folder(run),
            tokenizer=tokenizer,
            model=run.model,
            num_workers=run.dataloader.num_workers,
        )
        for entries in (run.datasets, run.eval.datasets if run.eval else ())
    )

    ranks = join_ranks(device, parallel.replicate_size, parallel.expert_parallel_size)
    check_same_data([*sources, *eval_sources])
    # Dropout and the like must differ by rank, and from the ranks of the run with the next seed.
    torch.manual_seed(derive_seed("rank", run.seed, ranks.rank))
    run_dir = choose_run_dir(run.work_dir, run.run_name, resume=resume)
    start_logging(run_dir, ranks.rank)
    if ranks.rank == 0:
        write_json(run_dir / "config.json", loaded.resolved)
        write_json(run_dir / "plugins.json", plugins.describe())
        write_json(run_dir / "environment.json", describe_environment(device, ranks.world_size))
    trackers = [t.build(run_dir) for t in run.trackers] if ranks.rank == 0 else []
    metrics_log = MetricsLog(run_dir, trackers, active=ranks.rank == 0)
    callbacks = CallbackCalls(run.callbacks, plugins.registry, run_dir, ranks)
    try:
        Trainer(
            loaded,
            ranks,
            run_dir,
            tokenizer,
            weights,
            sources,
            eval_sources,
            metrics_log,
            callbacks,
            made_by,
        ).fit(resume=resume)
    finally:
        metrics_log.close()
    if ours:
        leave_ranks()


class Trainer:
    """One run on this rank, from loaded weights to the last save."""

    def __init__(
        self,
        loaded: LoadedConfig,
        ranks: Ranks,
        run_dir: Path,
        tokenizer: Tokenizer,
        weights: Path | None,
        sources: Sequence[DataSource],
        eval_sources: Sequence[DataSource],
        metrics_log: MetricsLog,
        callbacks: CallbackCalls,
        made_by: MadeBy,
    ) -> None:
        run = loaded.run
        self.run, self.ranks, self.run_dir = run, ranks, run_dir
        self.resolved, self.callbacks, self.made_by = loaded.resolved, callbacks, made_by
        self.tokenizer, self.weights, self.metrics_log = tokenizer, weights, metrics_log
        self.source_names = [source.name for source in sources]
        self.data = build_run_data(
            run,
            ranks,
            sources,
            tokenizer,
            global_batch_size=run.global_batch_size,
            last_epoch=run.epoch_num - 1 if run.epoch_num else None,
            num_workers=run.dataloader.num_workers,
        )
        self.data.start_workers()  # they come up while the model loads
        self.model: ModelOnRanks = build_model(run, ranks, tokenizer, weights)
        self.step_states = StepStates(self.model.module, ranks)
        self.evaluator: Evaluator | None = None
        if eval_sources:
            data = build_run_data(
                run,
                ranks,
                eval_sources,
                tokenizer,
                global_batch_size=ranks.world_size,
                last_epoch=0,
            )
            names = [source.name for source in eval_sources]
            self.evaluator = Evaluator(self.model, ranks, data, names)
        self.optimizer = build_optimizer(run, self.model.module)
        self.savers: list[Saver] = [check_built(saver, saver.build()) for saver in run.savers]
        self.parameters = [p for _, p in trainable_parameters(self.model.module)]
        self.once_per_step = reduce_once_per_step(
            run.parallel.gradient_reduction, self.model.module, ranks
        )
        self.step, self.cursor = 0, Cursor()
        self.resumed_from: Path | None = None
        self._set_length()
        self.bad_steps_in_a_row, self.bad_steps = 0, 0
        self._stop_asked = False

    def _set_length(self) -> None:
        """From where the run stands: its steps in all, and the schedule over them."""
        run = self.run
        rest = self.data.steps_from(self.cursor, run.epoch_num or 1) if run.epoch_num else 0
        self.total_steps = run.total_steps or self.step + rest
        self.schedule = run.lr_schedule.build(max(self.total_steps, 1))

    def fit(self, *, resume: bool = False) -> None:
        """Train to the last step, or to the end of the step that follows a SIGTERM or a callback's stop."""
        if resume:
            self._resume()
        logger.info(
            f"{sum(p.numel() for p in self.parameters):,} trainable parameters on {self.ranks.world_size} "
            f"rank(s), {self.total_steps} steps, gradients reduced "
            f"{'once per step' if self.once_per_step else 'with each micro-batch'}; run folder {self.run_dir}"
        )
        if self.step < self.total_steps:
            for line in describe_plan(
                self.data.sources,
                self.data.plan_epoch(self.cursor.epoch),
                global_batch_size=self.run.global_batch_size,
            ):
                logger.info(line)
        try:
            self._tell_start()
            if self.resumed_from is not None and self.step >= self.total_steps:
                self._save(is_last=True)  # the run may have failed after its last checkpoint
            stopped = self._run_steps()
            self.callbacks.train_end(
                TrainEnd(step=self.step, total_steps=self.total_steps, stopped=stopped)
            )
            self.callbacks.agree()
        except BaseException as error:
            self.callbacks.train_error(TrainFailure(step=self.step, error=error))
            raise

    def _tell_start(self) -> None:
        self.callbacks.train_start(
            TrainStart(
                run_dir=self.run_dir,
                config=self.resolved,
                step=self.step,
                total_steps=self.total_steps,
                resumed_from=self.resumed_from,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
            )
        )
        self.callbacks.agree()

    def _run_steps(self) -> str | None:
        """The loop; why it ended before the last step, None if it didn't."""
        previous = signal.signal(signal.SIGTERM, self._on_sigterm)
        bar = progress_bar(self.total_steps, self.step, shown=self.ranks.rank == 0)
        started, started_at = time.perf_counter(), self.step
        try:
            while self.step < self.total_steps:
                begin = time.perf_counter()
                batches = self.data.batches_at(self.cursor, steps_left=self.total_steps - self.step)
                waited = time.perf_counter() - begin
                result = self.train_step(batches)
                epoch = self.cursor.epoch
                self.step, self.cursor = self.step + 1, self.data.next_cursor(self.cursor)
                self._guard_finite(result)
                elapsed = time.perf_counter() - begin
                pace = (time.perf_counter() - started) / (self.step - started_at)
                metrics = self._metrics(result, elapsed, waited, epoch)
                if self.step % self.run.log_every_steps == 0 or self.step == self.total_steps:
                    self._log(metrics, pace)
                bar.update(1)
                is_last = self.step == self.total_steps or result.counts["stop_asked"] > 0
                every = self.run.eval.every_steps if self.run.eval else 1
                if self.evaluator and (self.step % every == 0 or is_last):
                    metrics |= self._log_eval(self.evaluator)
                self.callbacks.step_end(
                    StepEnd(
                        step=self.step,
                        total_steps=self.total_steps,
                        metrics=metrics,
                        applied=result.applied,
                    )
                )
                self._save(is_last)
                if result.counts["stop_asked"] > 0 and self.step < self.total_steps:
                    # Who asked late, in this very step, is part of what is agreed on.
                    reason = self.callbacks.agree() or "SIGTERM"
                    logger.warning(
                        f"stopped after step {self.step}: {reason}; continue with --resume"
                    )
                    return reason
            self.callbacks.agree()
            return None
        finally:
            bar.close()
            self.data.close()
            if self.evaluator:
                self.evaluator.data.close()
            signal.signal(signal.SIGTERM, previous)

    def train_step(self, batches: Sequence[Batch]) -> StepResult:
        """One optimizer step over this rank's micro-batches. Collective."""
        counts = self._step_counts(batches)
        scales = {n: 1.0 / c if c > 0 else 0.0 for n, c in counts.items()}
        module, loss = self.model.module, self.model.loss
        module.train()
        sums = SourceSums(len(self.source_names), self.ranks.device)

        def prepared(batch: Batch) -> Batch:
            return batch.to(self.ranks.device).with_scales(scales)

        self.step_states.begin_step(batches, lambda batch: module(prepared(batch), loss))
        for index, batch in enumerate(batches):
            on_device = prepared(batch)
            set_gradient_sync(module, not self.once_per_step or index == len(batches) - 1)
            output: ModelOutput = module(on_device, loss)
            if (
                output.loss.requires_grad
            ):  # else, on every rank: no part that trains had anything to see
                output.loss.backward()
            sums.add(on_device, output)
        norm = gradient_norm(self.parameters, self.ranks)
        loss_value, source_losses, metrics = sums.reduce(self.source_names, self.ranks)
        norm_value = float(norm)
        # The norm is global, so every rank takes the same branch.
        applied = math.isfinite(norm_value) and math.isfinite(loss_value)
        # Also when the step is skipped: the log shows this step's.
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step + 1, group["base_lr"])
        if applied:
            if self.run.max_grad_norm is not None:
                clip_gradients(self.parameters, norm, self.run.max_grad_norm)
            self.optimizer.step()
            self.step_states.end_step()  # a skipped step moves nothing
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss_value, norm_value, applied, counts, source_losses, metrics)

    def _step_counts(self, batches: Sequence[Batch]) -> dict[str, float]:
        counts = {
            "tokens": 0.0,
            "samples": 0.0,
            "skipped_samples": 0.0,
            "supervised": 0.0,
            "stop_asked": float(self._stop_asked or self.callbacks.wants_end),
        }
        for batch in batches:
            own = dict(self.model.loss.step_counts(batch))
            if self.model.built.step_counts:
                own.update(self.model.built.step_counts(batch))
            own["tokens"] = float(batch.num_tokens)
            own["samples"] = float(len(batch.keys))
            own["skipped_samples"] = float(batch.num_skipped)
            own["supervised"] = float(len(batch.targets.labels_K))
            for name, value in own.items():
                counts[name] = counts.get(name, 0.0) + value
        return sum_over_ranks(counts, self.ranks)

    def _guard_finite(self, result: StepResult) -> None:
        if result.applied:
            self.bad_steps_in_a_row = 0
            return
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1
        logger.warning(
            f"step {self.step}: loss {result.loss} and gradient norm {result.grad_norm} are not both finite; "
            f"the step was skipped ({self.bad_steps} so far)"
        )
        if self.bad_steps_in_a_row >= self.run.max_bad_steps:
            raise TrainingError(
                f"step {self.step}: {self.bad_steps_in_a_row} steps in a row were not finite "
                f"(max_bad_steps); lower optimizer.lr or look at the data of these steps"
            )

    def _metrics(
        self, result: StepResult, elapsed: float, waited: float, epoch: int
    ) -> dict[str, float]:
        return step_metrics(
            result,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            epoch=epoch,
            step_s=elapsed,
            data_wait_s=waited,
            peak_memory_gib=peak_memory_gib(self.ranks.device),
            bad_steps=self.bad_steps,
        )

    def _log(self, metrics: dict[str, float], pace: float) -> None:
        """Log a step; adds to its metrics what the model reports itself."""
        logger.info(step_line(self.step, self.total_steps, metrics, pace))
        report = self.step_states.report()
        metrics |= report.numbers
        self.metrics_log.log(self.step, metrics, report.tables)

    def _log_eval(self, evaluator: Evaluator) -> dict[str, float]:
        metrics = evaluator.evaluate()
        logger.info(
            f"step {self.step}  "
            + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )
        self.metrics_log.log(self.step, metrics)
        return metrics

    def _save(self, is_last: bool) -> None:
        for component, saver in zip(self.run.savers, self.savers, strict=True):
            if not saver.due(self.step, is_last=is_last):
                continue
            written = saver.save(
                SaveRequest(
                    step=self.step,
                    is_last=is_last,
                    run_dir=self.run_dir,
                    model=self.model.built,
                    module=self.model.module,
                    optimizer=self.optimizer,
                    tokenizer=self.tokenizer,
                    loaded_dtype=self.model.loaded_dtype,
                    source_folder=self.weights,
                    train_state={
                        "step": self.step,
                        "bad_steps": self.bad_steps,
                        "plugins": self.made_by,
                        **data_state(self.data, self.cursor),
                    },
                )
            )
            if written is not None:
                logger.info(f"step {self.step}: wrote {written}")
                self.callbacks.checkpoint_saved(
                    CheckpointSaved(step=self.step, path=written, saver=type(component).__name__)
                )

    def _resume(self) -> None:
        # Rank 0's word: a network folder may look older to other nodes.
        folder = gather_from_ranks(newest_checkpoint(self.run_dir))[0]
        if folder is None:
            logger.warning(f"--resume: no checkpoint under {self.run_dir}; starting at step 0")
            return
        # Before tensors are compared: another plugin may have made others.
        saved = read_train_state(folder).get("plugins")
        go_on = self.run.on_changed_plugins == "continue"
        check_made_by(saved, self.made_by, folder, go_on=go_on)
        state = load_train_state(folder, self.model.module, self.optimizer)
        self.step, self.bad_steps = int(state["step"]), int(state["bad_steps"])
        self.cursor = cursor_of(
            state, self.data, folder, go_on=self.run.on_changed_data == "continue"
        )
        self._set_length()
        self.resumed_from = folder
        logger.info(f"resumed from {folder} at step {self.step}")
        if self.step >= self.total_steps:
            logger.warning(
                f"nothing left to train: the checkpoint is of step {self.step} and the run ends at step "
                f"{self.total_steps}; what the savers write at the end is written; raise total_steps or "
                "epoch_num to train on"
            )

    def _on_sigterm(self, signum: int, frame: Any) -> None:
        del signum, frame
        self._stop_asked = True  # told to the others with the next step's counts
