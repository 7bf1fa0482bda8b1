"""The training loop: read `train` from top to bottom.

    L = (1 / tokens of the batch) sum_i (1 / p_i) CE_i over masked i       Eq. 1, see illada.diffusion

A step is windows_per_step windows, in micro-batches whose gradients add up to that of the whole batch. Step k trains
on the global samples k * windows_per_step and following, whatever happened before, so stopping and resuming changes
nothing: micro-batches since the last optimizer step are dropped and done again.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from illada.batch import Batch
from illada.config import ModelConfig
from illada.data.dataset import TokenDataset
from illada.diffusion import make_batch, make_validation_batch, window_of_weighted_sample
from illada.files import locked, remove_stale, write_text
from illada.model import MaskedDiffusionModel
from illada.ops import why_not
from illada.schema import some_of
from illada.train import state as train_state
from illada.train.config import RunConfig, TrainConfig
from illada.train.log import Log
from illada.train.loss_by_t import LossByT
from illada.train.pace import Pace
from illada.train.prefetch import Prefetch
from illada.train.requests import decay_is_requested, forget_decay_request
from illada.train.schedule import Schedule


@dataclass(frozen=True)
class TrainResult:
    """The state of a run at its end.

    finished: all steps are done; False: it was asked to stop, `checkpoint` continues it.
    validation_bound, unigram_entropy: nats per token; the bound is None for a run that was stopped.
    """

    finished: bool
    step: int
    tokens_seen: int
    seconds: float
    checkpoint: Path
    plot: Path | None
    validation_bound: float | None
    unigram_entropy: float


def train(
    config: TrainConfig,
    *,
    resume: str = "auto",
    should_stop: Callable[[], bool] = lambda: False,
    on_validation: Callable[[int, MaskedDiffusionModel], None] = lambda step, model: None,
    progress: bool = True,
) -> TrainResult:
    """Train one model, or continue its training.

    Args:
        config: of the run; its files go to train.out_dir.
        resume: "auto" goes on from the newest checkpoint in out_dir if there is one, "never" refuses to if there is
            one, a path goes on from that checkpoint.
        should_stop: asked after every micro-batch; True ends the run at the last optimizer step, saved.
        on_validation: called with step and model after each validation, for samples or measures; its time counts as
            validation's.
        progress: a progress bar, on a terminal.

    Raises:
        ValueError, FileNotFoundError: bad configuration, corpus or checkpoint. OSError: the disk is full.
        RuntimeError: what was saved last cannot be loaded.
        ArithmeticError: the gradient is not finite. FileExistsError: resume="never" and there are checkpoints.
        BlockingIOError: another process trains in out_dir. BrokenPipeError: what read stdout is gone; the run is saved.
        Complete checkpoints are untouched by all of them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("this trainer runs in one process; start it without torchrun")
    corpus, held_out = TokenDataset(config.data.path), TokenDataset(config.data.path, "validation")
    # Their errors come first.
    corpus.num_windows(config.data.window), held_out.num_windows(config.data.window), _weights(corpus, config)
    out_dir = Path(config.train.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    with locked(out_dir / ".lock", f"{out_dir} is in use"):
        return _train(config, corpus, held_out, resume, should_stop, on_validation, progress)


def _train(
    config: TrainConfig,
    corpus: TokenDataset,
    held_out: TokenDataset,
    resume: str,
    should_stop: Callable[[], bool],
    on_validation: Callable[[int, MaskedDiffusionModel], object],
    progress: bool,
) -> TrainResult:
    num_windows, window = corpus.num_windows(config.data.window), config.data.window
    model_config = config.model_config(corpus.header)
    device = _device(config.train, model_config)
    model = MaskedDiffusionModel(model_config, seed=config.train.seed, device=device)
    model.activation_checkpointing = config.train.activation_checkpointing
    optimizer = _optimizer(model, config)

    out_dir = Path(config.train.out_dir)
    checkpoints = out_dir / "checkpoints"
    schedule = Schedule(config.train.steps, config.optimizer, config.schedule)
    step, tokens_seen, same_corpus = 0, 0, True
    losses: list[float] = []  # of the steps since the last line of the log
    source = _resume_from(resume, checkpoints)
    if source is not None:
        state = train_state.read_state(source)
        train_state.check_same_run(source, state, config, corpus.header["tokenizer_sha256"])
        train_state.restore(source, model, optimizer)
        step, tokens_seen, losses = state["step"], state["tokens_seen"], state["unlogged_losses"]
        same_corpus = state.get("corpus") in (None, corpus.fingerprint())
        schedule.decided = state.get("decay_step")
        schedule.bounds = {int(at): found for at, found in state.get("validation_bounds", [])}
    checkpoints.mkdir(parents=True, exist_ok=True)
    remove_stale(checkpoints)
    write_text(out_dir / "config.toml", config.to_toml())
    if config.train.compile:
        for layer in model.layers:
            layer.compile()

    log = Log(
        out_dir,
        step=step,
        steps=schedule.end,
        progress=progress,
        validated=step in schedule.bounds,
        decayed=schedule.decided == step,
    )
    log.say(_headline(model, config, num_windows, device))
    if source is None:
        forget_decay_request(out_dir)  # of another run in this folder
    else:
        log.say(f"resuming from {source} at step {step}")
        if not same_corpus:
            log.say(f"the text of {corpus.path} is not that of the checkpoint: its windows are drawn from here on")
    bound: float | None = None
    saved: Path | None = source
    began, logged_at, logged_tokens = time.monotonic(), time.monotonic(), tokens_seen
    stopped, pace, by_t = False, Pace(), LossByT(device)
    micro_batches_per_step = config.train.windows_per_step // config.train.windows_per_micro_batch

    def asked() -> bool:
        return should_stop() or log.lost is not None

    def save() -> Path:
        return train_state.save(
            checkpoints,
            model,
            optimizer,
            config,
            step=step,
            tokens_seen=tokens_seen,
            unlogged_losses=losses,
            decay_step=schedule.decided,
            validation_bounds=sorted(schedule.bounds.items()),
            corpus=corpus.fingerprint(),
            tokenizer=corpus.path / "tokenizer.json",
        )

    def validate() -> float | None:
        found = evaluate(model, held_out, config, device, asked)
        if found is not None:
            entropy = held_out.unigram_entropy()
            log.validation(
                step=step,
                seconds=time.monotonic() - began,
                bound=found,
                unigram_entropy=entropy,
                tokens_seen=tokens_seen,
            )
            if schedule.observe(step, found):
                log.decay(step=step, end=schedule.end, reason="plateau")
            log.plot()
            on_validation(step, model)
        return found

    batches = Prefetch(
        batch
        for later in itertools.count(step)
        for batch in micro_batches(corpus, later, config, model.config.mask_token_id)
    )
    try:
        if _validates(step, schedule.end, config) and not log.has_validation(step):  # it was stopped there
            bound = validate()
            stopped = bound is None
        while step < schedule.end and not stopped:
            step_began = time.monotonic()
            rate = schedule.rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
            loss_sum = 0.0
            for batch in itertools.islice(batches, micro_batches_per_step):
                with _autocast(config, device):
                    batch = batch.to(device)
                    loss, nll = model.loss_and_nll(batch, normalizer=float(config.train.windows_per_step * window))
                loss.backward()
                by_t.add(nll, batch.token_weights)
                loss_sum += float(loss.detach())
                stopped = asked()
                if stopped:
                    break
            if stopped:
                break  # the step is incomplete: its gradients are dropped
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm or float("inf"))
            if not math.isfinite(norm):
                raise ArithmeticError(
                    f"the gradient norm is {float(norm)} at step {step} (loss {loss_sum}); nothing was updated"
                    + (f", the last checkpoint is {saved}" if saved else "")
                )
            optimizer.step()
            step += 1
            tokens_seen += config.train.windows_per_step * window
            losses.append(loss_sum)
            log.advance()

            now = time.monotonic()
            pace.add(now - step_began)
            if step % config.train.log_every == 0 or step == schedule.end:
                log.train(
                    step=step,
                    seconds=now - began,
                    loss=sum(losses) / len(losses),
                    learning_rate=rate,
                    grad_norm=float(norm),
                    tokens_per_second=(tokens_seen - logged_tokens) / max(now - logged_at, 1e-9),
                    tokens_seen=tokens_seen,
                    data_wait=batches.waited,
                    loss_by_t=by_t.take(),
                )
                losses.clear()
                batches.waited = 0.0
                if device.type == "cpu" and (hint := pace.hint(torch.get_num_threads())):
                    log.say(hint)
            if _validates(step, schedule.end, config):
                bound = validate()
                stopped = bound is None
            # A request during the warm-up waits for its end, as the plateau rule does.
            asked_to_decay = not stopped and step >= config.schedule.warmup_steps and decay_is_requested(out_dir)
            if asked_to_decay:
                if schedule.begin_decay(step):
                    log.decay(step=step, end=schedule.end, reason="command")
                else:
                    log.say(f"step {step:>6}/{schedule.end}  asked to decay, which changes nothing: {_why_not(config)}")
            if (step % config.train.save_every == 0 and step < schedule.end or asked_to_decay) and not stopped:
                saved = save()
            if asked_to_decay:
                forget_decay_request(out_dir)  # only now: what was decided is in the checkpoint
            if step % config.train.log_every == 0:  # saving and validating is not training
                logged_at, logged_tokens = time.monotonic(), tokens_seen
        if not (checkpoints / f"step-{step:06}").exists():
            saved = save()
        assert saved is not None
        if not stopped:
            train_state.verify(saved, model)
        if bound is None and not stopped:
            bound = evaluate(model, held_out, config, device, asked)  # resumed after its last step
            stopped = bound is None
        if not stopped:
            forget_decay_request(out_dir)
        plot = log.plot()
        if plot is None:
            log.say("there is no loss.png; `pip install matplotlib` for one")
        log.say(f"stopped at step {step}; run the same command again to go on" if stopped else "done")
        log.say(f"checkpoint {saved}" + (f", plot {plot}" if plot else ""))
    finally:
        batches.close()
        log.close()
    if log.lost is not None and not should_stop():
        raise log.lost
    return TrainResult(
        finished=not stopped,
        step=step,
        tokens_seen=tokens_seen,
        seconds=time.monotonic() - began,
        checkpoint=saved,
        plot=plot,
        validation_bound=None if stopped else bound,
        unigram_entropy=held_out.unigram_entropy(),
    )


def micro_batches(corpus: TokenDataset, step: int, config: TrainConfig, mask_id: int) -> Iterator[Batch]:
    """Yield the data of one optimizer step, a pure function of (seed, step)."""
    per_step, per_micro = config.train.windows_per_step, config.train.windows_per_micro_batch
    sources, weights = corpus.windows_of_sources(config.data.window), _weights(corpus, config)
    for first in range(step * per_step, (step + 1) * per_step, per_micro):
        samples = np.arange(first, first + per_micro)
        windows = window_of_weighted_sample(samples, sources, weights, config.train.seed, config.diffusion)
        yield make_batch(
            corpus.windows(windows, config.data.window),
            samples,
            seed=config.train.seed,
            mask_id=mask_id,
            config=config.diffusion,
            eos_id=corpus.header["eos_token_id"],
            global_batch=per_step,
        )


def _weights(corpus: TokenDataset, config: TrainConfig) -> list[float]:
    """Return the weight of each source.

    ValueError: a weight of no source, or nothing to train on.
    """
    weights = config.data.weights
    if unknown := [name for name in weights if name not in corpus.sources]:
        raise ValueError(
            f"data.weights has {unknown[0]!r:.80}; the sources of {corpus.path} are {some_of(corpus.sources)}"
        )
    found = [weights.get(name, 1.0) for name in corpus.sources]
    windows = corpus.windows_of_sources(config.data.window)
    for name, count in zip(corpus.sources, windows, strict=True):
        if weights.get(name) and not count:
            raise ValueError(
                f"data.weights has {name!r:.80}, a source of {corpus.path} with less than one window of "
                f"{config.data.window} tokens; train on shorter windows (data.window), or leave its weight out"
            )
    if not any(weight and count for weight, count in zip(found, windows, strict=True)):
        raise ValueError(f"data.weights leaves nothing of {corpus.path}: no source has a weight above 0 and a window")
    return found


@torch.no_grad()
def evaluate(
    model: MaskedDiffusionModel,
    held_out: TokenDataset,
    config: TrainConfig,
    device: torch.device | str = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Estimate the bound of Eq. 1 on held-out windows, in nats per token, by the midpoint rule over fixed t strata.

    Windows, strata and masks are the same in every run, so numbers of different runs are comparable.

    Args:
        model: The model, on `device`.
        held_out: The validation split of the corpus.
        config: Gives data.window, train.windows_per_micro_batch, train.dtype and the section [validation].
        device: Device of the model.
        should_stop: Called after every micro-batch; True ends the evaluation.

    Returns:
        The bound in nats per token, or None if `should_stop` ended the evaluation.

    Raises:
        ValueError: The split has no whole window, or a token id outside of the vocabulary.
    """
    length, strata = config.data.window, config.validation.strata
    available = held_out.num_windows(length)
    indices = np.unique(np.linspace(0, available - 1, min(config.validation.windows, available)).astype(np.int64))
    total = 0.0
    for stratum in range(strata):
        for first in range(0, len(indices), config.train.windows_per_micro_batch):
            chosen = indices[first : first + config.train.windows_per_micro_batch]
            batch = make_validation_batch(
                held_out.windows(chosen, length),
                chosen,
                stratum=stratum,
                strata=strata,
                mask_id=model.config.mask_token_id,
            )
            with _autocast(config, device):
                loss = model.loss(batch.to(device), normalizer=1.0)
            total += float(loss)
            if should_stop():
                return None
    return total / (strata * len(indices) * length)


def _why_not(config: TrainConfig) -> str:
    """Return why a request to decay has no effect."""
    return "schedule.decay is none" if config.schedule.decay == "none" else "the decay has begun, or the run ends here"


def _validates(step: int, end: int, config: TrainConfig) -> bool:
    return step > 0 and (step % config.validation.every == 0 or step == end)


def _resume_from(resume: str, checkpoints: Path) -> Path | None:
    newest = train_state.newest(checkpoints)
    if resume == "auto":
        return newest
    if resume == "never":
        if newest is not None:
            raise FileExistsError(f"{newest} exists; resume it, or choose another train.out_dir")
        return None
    source = Path(resume)
    step = train_state.read_state(source)["step"]
    if newest is not None and train_state.read_state(newest)["step"] > step:
        raise FileExistsError(f"{newest} is newer than {source}; move it away, or choose another train.out_dir")
    return source


def _optimizer(model: MaskedDiffusionModel, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only, one state for each parameter from the start."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=options.learning_rate,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        fused=True,
    )
    for parameter in model.parameters():  # so that a run stopped before its first step has a state to save
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _device(run: RunConfig, model: ModelConfig) -> torch.device:
    """Return the device of a run.

    "auto" is a GPU where there is one whose kernels can compute the run, else the CPU.
    """
    missing = why_not(
        "varlen_attention", "cuda", getattr(torch, run.dtype), head_dim=model.head_size,
        num_heads=model.num_attention_heads, num_kv_heads=model.num_key_value_heads,
    )  # fmt: skip
    if run.device == "cuda" and missing:
        raise ValueError(f"train.device is cuda, but {missing}")
    return torch.device("cpu" if run.device == "cpu" or missing else "cuda")


def _autocast(config: TrainConfig, device: torch.device | str) -> contextlib.AbstractContextManager:
    if config.train.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, torch.bfloat16)


def _headline(model: MaskedDiffusionModel, config: TrainConfig, num_windows: int, device: torch.device) -> str:
    run = config.train
    return (
        f"{model.config.num_parameters:,} parameters on {device}, {run.dtype}; {num_windows:,} windows of "
        f"{config.data.window} tokens; a step is {run.windows_per_step} windows "
        f"({run.windows_per_step * config.data.window:,} tokens) in "
        f"{run.windows_per_step // run.windows_per_micro_batch} micro-batches"
    )
