"""One rank's program: load, measure, train, keep, measure again. Start reading here.

    prepare (once a host) -> config.json + prepared.json -> this, in every rank

The loop is TRL's SFTTrainer; rows, loss, optimizer and checkpoints are handed to it through its public hooks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from falcon_dist import affinity, checkpoint, contract, masking, stacks
from falcon_dist.agreement import check_agreement
from falcon_dist.chat_template import set_template
from falcon_dist.config import TrainConfig
from falcon_dist.contract import RankResult
from falcon_dist.emergency import Emergency, Updates
from falcon_dist.engine import peak
from falcon_dist.engine.form import TrainingForm, choose
from falcon_dist.engine.named import NamedOptimizer
from falcon_dist.engine.native import load_config, load_model, load_tokenizer, stay_in_place
from falcon_dist.host_memory import total_bytes
from falcon_dist.identity import adapters_identity, digest_of, identity_of, unshared
from falcon_dist.keeping import check_keeping, committed_steps
from falcon_dist.learning_rate import make_scheduler
from falcon_dist.loop import PackedTrainer, RowCollator, StepCallback
from falcon_dist.measure import catch_up, make_monitor, measure, measure_base, tell_early_stop
from falcon_dist.metrics import Reporter
from falcon_dist.monitor import (
    Monitor,
    Verdict,
    check_evaluate,
    evaluates,
    prompts_of,
)
from falcon_dist.order import plan_schedule
from falcon_dist.pace import Pace
from falcon_dist.prepare import Prepared
from falcon_dist.process_group import check_place, open_group, same_everywhere
from falcon_dist.profiling import ProfileCallback, check_profile
from falcon_dist.resume import restore, resume_point
from falcon_dist.rows import PackedStore, check_whole
from falcon_dist.run import Run, closing_lines, opening_lines
from falcon_dist.saving import Saver
from falcon_dist.soundness import Soundness
from falcon_dist.step_clock import StepClock
from falcon_dist.stopping import Stopper
from falcon_dist.strategy.choice import make_strategy
from falcon_dist.strategy.memory import check_fits
from falcon_dist.team import Team, gather
from falcon_dist.tracking import check_tracking, evaluation_logs, trackers
from falcon_dist.trainer_settings import row_stream, trainer_settings
from falcon_dist.world import World


class Trained(NamedTuple):
    """What is left when training is over."""

    result: RankResult
    model: PreTrainedModel


def train(config: TrainConfig, folder: Path, *, resume: bool, env: Mapping[str, str] = os.environ) -> Trained:
    """Runs this rank from start to end.

    Args:
        config: what to train.
        folder: the run folder, prepared; checkpoints go below it.
        resume: go on from the newest checkpoint that verifies.
        env: the rank's coordinates and channels, see contract.py.

    Raises:
        UserError: something given cannot be used; nothing was damaged.
    """
    affinity.take_threads(env)
    check_agreement(config)
    world = World.from_env(env)
    rank_dir = Path(env[contract.RANK_DIR]) if contract.RANK_DIR in env else None
    reporter = Reporter(world, env, rank_dir)
    if rank_dir is not None:
        stacks.write_when_asked(rank_dir)
        reporter.takes("stacks")
    seen = affinity.observe()
    reporter.bound(seen.cpus, seen.threads)
    fault = affinity.mismatch(seen, env)
    if fault:
        raise RuntimeError(fault)
    prepared = Prepared.read(folder)
    store = PackedStore.open(Path(prepared.rows))
    schedule = plan_schedule(config.loop, num_rows=len(store.train), world_size=world.world_size, seed=config.seed)
    run = Run(
        config=config,
        folder=folder,
        world=world,
        prepared=prepared,
        store=store,
        schedule=schedule,
        reporter=reporter,
        strategy=make_strategy(config, world),
        identity=identity_of(prepared.model, config.model) | adapters_identity(prepared.model, config),
    )
    run.strategy.check(schedule)
    check_evaluate(config.evaluate, len(store.evaluation))
    if world.is_main:
        prompts_of(config.evaluate)  # a file of prompts that cannot be read is told now, not after training
    check_tracking(config.report)
    check_keeping(config.checkpoint, evaluates=bool(config.evaluate.every and len(store.evaluation)))
    memory = check_fits(
        config,
        load_config(prepared.model, config.model),
        world_size=world.world_size,
        ranks=world.local_world_size,
        host=total_bytes(),
    )
    for line in opening_lines(run, memory):
        reporter.line(line)
    with open_group(world, env) as board:
        same_everywhere(store.digest, "packed rows")
        same_everywhere(digest_of({**run.identity, **unshared(prepared.model, config)}), "model and tokenizer")
        team = gather(board, world, run.checkpoints)
        run.strategy.get_on = team.get_on
        return _train_in_group(run, team, seen, resume=resume)


def _train_in_group(run: Run, team: Team, seen: affinity.Observed, *, resume: bool) -> Trained:
    with run.reporter.phase("load"):
        tokenizer = load_tokenizer(run.prepared.model, run.config.model)
        set_template(tokenizer, run.config.data.template)
        model = load_model(run.prepared.model, run.config.model, run.config.precision)
        masking.check_packing(model.config, run.config.data.packing_kind != "off")
        stay_in_place(model)
        run.strategy.ready(model)
        changes = _optimized(run, model)
        if run.world.node_rank and not run.world.local_rank:  # node 0 has read them all before any rank started
            check_whole(Path(run.prepared.rows))
        team.meet(run.world.world_size)  # one host may read its files sooner than another
        chosen = resume_point(run, team) if resume else None
    before = measure_base(run, team, model, tokenizer)
    optimizer = run.strategy.make_optimizer(model)
    if chosen:
        with run.reporter.phase("load"):
            chosen = restore(run, team, chosen, model=model, tokenizer=tokenizer, optimizer=optimizer)
    monitor = make_monitor(run, team, model, tokenizer, chosen)
    last_step = _fit(run, model, tokenizer, optimizer, team=team, start=chosen.step if chosen else 0, monitor=monitor)
    saved = run.checkpoints / checkpoint.folder_name(last_step)
    result = RankResult(
        status="ok",
        observed_cpus=seen.cpus,
        observed_threads=seen.threads,
        last_step=last_step,
        checkpoint=str(saved),
        peak_rss_bytes=affinity.peak_rss_bytes(),
    )
    if last_step < run.schedule.total_steps and not monitor.stopped:
        run.reporter.summary([f"made way after step {last_step}: go on with --resume {run.folder.name}"])
        return Trained(dataclasses.replace(result, status="stopped"), model)
    known = monitor.last is not None and monitor.last[0] == last_step
    with run.strategy.whole() if evaluates(run.config) and not known else nullcontext():
        after = monitor.last[1] if known and monitor.last else measure(run, team, model, tokenizer, "evaluate tuned")
    lines = closing_lines(before, after, saved)
    run.reporter.summary(lines)
    figures = {"phases_s": run.reporter.phases, "base": before, "tuned": after, "engine": changes}
    result = dataclasses.replace(result, peak_rss_bytes=affinity.peak_rss_bytes(), summary=figures)
    return Trained(result, model)


def _optimized(run: Run, model: PreTrainedModel) -> dict[str, Any]:
    """Hands the model to the engine asked for; what that changed."""
    kind = run.config.engine.kind
    if kind == "native":
        return {"kind": kind}
    from falcon_dist.engine import ipex

    changes = ipex.optimize(model)
    run.reporter.line(changes.line())
    return {"kind": kind, **changes.as_dict()}


def _fit(
    run: Run,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: NamedOptimizer,
    *,
    team: Team,
    start: int,
    monitor: Monitor,
) -> int:
    """Trains from step ``start`` to the last step, whose number it returns."""
    saver = Saver(
        run=run,
        team=team,
        model=model,
        tokenizer=tokenizer,
        optimizer=optimizer,
        monitor=monitor,
        updates=Updates(start, optimizer),
        refused=frozenset(step for step in committed_steps(run.checkpoints) if step > start),
    )
    catch_up(run, monitor, start)
    if start:
        saver.keep(start)
    if start >= run.schedule.total_steps or monitor.stopped:
        tell_early_stop(run, monitor, start)
        run.reporter.line(f"all {start} steps are done already")
        return start
    check_profile(run.config.report.profile, run.schedule.total_steps - start)
    config = run.config
    form = TrainingForm(model, choose(model.config, config.model, config.engine, config.strategy))
    run.reporter.line(form.line(run.config.engine.kind))
    with run.reporter.phase("train"), form.training():
        return _run_trainer(run, saver, form, start=start)


def _run_trainer(run: Run, saver: Saver, form: TrainingForm, *, start: int) -> int:
    model, optimizer, monitor = saver.model, saver.optimizer, saver.monitor
    clock, soundness = StepClock(), Soundness(run.schedule, run.world, start)
    gauge, lines = peak.gauge(model, run.config.precision)
    for line in lines:
        run.reporter.line(line)
    collator = RowCollator(run.store.train, masking.Masking.of(model), clock)
    stopper = Stopper(run.reporter)
    pace = Pace(model if run.strategy.steady else None)
    emergency = Emergency(saver.save_last_finished if saver.can_save_alone else None, run.reporter)

    def begin() -> None:
        run.strategy.begin(trainer.model_wrapped)
        saver.meet()  # one host may read its part of the state sooner than another

    def finished(step: int) -> None:
        emergency.offer()
        saver.check_replicas(step)

    callback = StepCallback(
        config=run.config,
        schedule=run.schedule,
        world=run.world,
        start=start,
        collator=collator,
        clock=clock,
        gauge=gauge,
        soundness=soundness,
        reporter=run.reporter,
        pace=pace,
        begin=begin,
        finished=finished,
        save=saver.save,
        evaluate=lambda step: _evaluate(run, monitor, trainer, step),
        asked_to_stop=stopper.after_step,
    )
    trainer = PackedTrainer(
        form=form,
        clock=clock,
        soundness=soundness,
        model=model,
        args=trainer_settings(run.config, run.schedule, start, str(run.folder), **run.strategy.settings()),
        train_dataset=row_stream(run.schedule, start),
        data_collator=collator,
        processing_class=saver.tokenizer,
        optimizers=(optimizer, make_scheduler(optimizer, run.config.optim, run.schedule, start)),
        callbacks=[pace, callback, *(trackers(run.config.report, run.folder, start) if run.world.is_main else ())],
    )
    if run.config.report.profile and run.world.is_main:
        where = run.reporter.rank_dir or run.folder
        trainer.add_callback(ProfileCallback(run.config.report.profile, where, run.reporter.line))
    if not run.strategy.wraps:
        trainer.leave_unwrapped()
    trainer.remove_callback(PrinterCallback)  # steps are told by our own callback
    check_place(trainer.args.process_index, trainer.args.world_size, run.world)
    try:
        trainer.train()
        saver.finish()
    except Exception as error:
        if not emergency.wait_after(error):
            saver.finish_if_possible()
        raise
    if callback.last_step != run.schedule.total_steps and not (monitor.stopped or stopper.agreed):
        raise RuntimeError(f"trained to step {callback.last_step} of {run.schedule.total_steps}")
    tell_early_stop(run, monitor, callback.last_step)
    return callback.last_step


def _evaluate(run: Run, monitor: Monitor, trainer: PackedTrainer, step: int) -> Verdict:
    if not monitor.is_due(step):
        return Verdict()
    with trainer.form.plain(), run.strategy.whole():
        verdict = monitor.after_step(step)
    if monitor.last and monitor.last[0] == step:
        trainer.log(evaluation_logs(monitor.last[1]))
    return verdict
