"""Generation by un-masking: append masks, predict them all, commit the surest, repeat.

Two modes, both as published by the authors (`illada.ops` does the sampling and the committing):

    var     iLLaDA's `var_generate`: one block of masks is appended to the prompt at a time, `steps` forwards a block;
            nothing is known of later blocks, so the length is open.
    fixed   LLaDA's `generate`: the whole canvas of gen_length masks is there from the start, and is filled block by
            block, steps / (gen_length / block_length) forwards each.

Prompts of any lengths are packed, without padding. A sequence's noise is keyed by (its seed, position, step), so it
gives the same tokens alone or in company (float32); a finished sequence leaves the pack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from illada.model import MaskedDiffusionModel
from illada.ops import linear_sample_tokens, remask
from illada.ops.types import MEASURES


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate.

    mode: "var" or "fixed", see above.
    gen_length: most tokens to generate; a multiple of block_length.
    block_length: tokens that are filled together before the next ones.
    steps: forward passes; of each block in mode "var", of all blocks together in mode "fixed" (as published). With
        rule "threshold" an upper bound.
    temperature: of the Gumbel noise, 0 is greedy.
    rule: "top_k" commits a fixed number of tokens a step (the block's masks shared out evenly over its steps, the
        first steps taking one more); "threshold" commits all whose confidence reaches `threshold`, at least one.
    measure: of confidence, see `illada.sample_tokens`.
    stop_tokens: ids that end a sequence; default the model's eos. Checked at the end of each block.
    stop_strings: texts that end a sequence, checked at the end of each block; they need the tokenizer.
    """

    mode: str = "var"
    gen_length: int = 128
    block_length: int = 32
    steps: int = 32
    temperature: float = 0.0
    rule: str = "top_k"
    threshold: float = 0.9
    measure: str = "probability"
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in (("mode", ("var", "fixed")), ("rule", ("top_k", "threshold")), ("measure", MEASURES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("gen_length", "block_length", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.gen_length % self.block_length:
            raise ValueError(f"gen_length ({self.gen_length}) must be a multiple of block_length ({self.block_length})")
        if self.mode == "fixed" and self.steps % self.num_blocks:
            raise ValueError(
                f"in mode fixed steps ({self.steps}) must be a multiple of the {self.num_blocks} blocks "
                f"(gen_length / block_length)"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if not 0 <= self.threshold <= 1 and self.measure != "entropy":
            raise ValueError(f"threshold must be in [0, 1], got {self.threshold}")

    @property
    def num_blocks(self) -> int:
        """Blocks of a full-length generation."""
        return self.gen_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Most forward passes of one block."""
        return self.steps if self.mode == "var" else self.steps // self.num_blocks


@dataclass
class GenerationResult:
    """One generated sequence.

    tokens: the new ids, without the prompt, up to and without the first stop token.
    text: their text, cut before the first stop string, where a tokenizer was given.
    finish_reason: "stop_token", "stop_string" or "length".
    forwards: forward passes this sequence took part in.
    """

    tokens: list[int]
    finish_reason: str
    forwards: int
    text: str | None = None


@dataclass
class _Sequence:
    """A sequence being generated: its canvas of prompt, finished tokens and masks."""

    index: int
    canvas: list[int]
    prompt_length: int
    seed: int
    block: int = 0
    step_in_block: int = 0
    forwards: int = 0
    schedule: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@torch.inference_mode()
def generate(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    seed: int | Sequence[int] = 0,
    tokenizer: Tokenizer | None = None,
    progress: bool = False,
    on_block: Callable[[int, list[int]], None] | None = None,
) -> list[GenerationResult]:
    """Generate a continuation of each prompt, all in one pack.

    Args:
        model: in evaluation or training mode, it has no dropout; its device is used.
        prompts: token ids, of any lengths, also none. Masks among them are left alone: only new tokens are generated.
        config: default `GenerationConfig()`.
        seed: one for all, or one for each prompt. Sequences with one seed and one prompt come out alike.
        tokenizer: makes `text`, and is needed by stop_strings.
        progress: a bar on a terminal: tokens, tokens per second, tokens per forward.
        on_block: called as on_block(prompt index, new tokens) whenever a sequence has finished a block.

    Returns:
        One result for each prompt, in order.

    Raises:
        ValueError: token ids out of range, prompts without room for a block, bad seeds, no tokenizer for stop_strings.
    """
    config = config or GenerationConfig()
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    _check(model, prompts, seeds, config, tokenizer)
    limit = model.config.max_position_embeddings
    stop_tokens = set((model.config.eos_token_id,) if config.stop_tokens is None else config.stop_tokens)

    sequences = [
        _Sequence(i, list(prompt), len(prompt), s) for i, (prompt, s) in enumerate(zip(prompts, seeds, strict=True))
    ]
    blocks_of = [min(config.num_blocks, (limit - s.prompt_length) // config.block_length) for s in sequences]
    for sequence in sequences:
        masks = config.block_length * (1 if config.mode == "var" else config.num_blocks)
        sequence.canvas += [model.config.mask_token_id] * masks
        sequence.schedule = quota_schedule(config.block_length, config.steps_per_block)
    active = list(sequences)
    bar = tqdm(total=len(prompts) * config.gen_length, unit=" tokens", disable=not (progress and sys.stderr.isatty()))
    forwards = committed_total = 0
    with bar:
        while active:
            committed = _step(model, active, config)
            forwards += 1
            committed_total += sum(committed)
            bar.update(sum(committed))
            bar.set_postfix_str(f"{committed_total / forwards:.1f} tokens/forward", refresh=False)
            for sequence in active:
                if not _block_is_done(sequence, config, model.config.mask_token_id):
                    continue
                start = sequence.prompt_length + sequence.block * config.block_length
                block = sequence.canvas[start : start + config.block_length]
                if on_block is not None:
                    on_block(sequence.index, block)
                sequence.block += 1
                sequence.step_in_block = 0
                generated = sequence.canvas[sequence.prompt_length : start + config.block_length]
                if stop_tokens.intersection(block):
                    sequence.finish_reason = "stop_token"
                elif config.stop_strings and _find_stop(tokenizer, generated, config.stop_strings) is not None:
                    sequence.finish_reason = "stop_string"
                elif sequence.block == blocks_of[sequence.index]:
                    sequence.finish_reason = "length"
                elif config.mode == "var":
                    sequence.canvas += [model.config.mask_token_id] * config.block_length
            active = [s for s in active if s.finish_reason is None]
    return [_result(s, config, stop_tokens, tokenizer) for s in sequences]


def quota_schedule(masks: int, steps: int) -> list[int]:
    """How many tokens each step commits: masks // steps, the first masks % steps of them one more (as published)."""
    base, remainder = divmod(masks, steps)
    return [base + (step < remainder) for step in range(steps)]


def _step(model: MaskedDiffusionModel, active: list[_Sequence], config: GenerationConfig) -> list[int]:
    """One forward pass of all active sequences, and the commits of each; how many it committed."""
    device = model.embed_tokens.weight.device
    mask_id = model.config.mask_token_id
    canvas: list[int] = []
    starts, rows, cu_rows = [0], [], [0]
    row_ids, row_seeds, row_steps = [], [], []
    for sequence in active:
        begin = sequence.prompt_length + sequence.block * config.block_length
        masked = [i for i in range(begin, begin + config.block_length) if sequence.canvas[i] == mask_id]
        rows += [starts[-1] + i for i in masked]
        row_ids += masked
        row_seeds += [sequence.seed] * len(masked)
        row_steps += [sequence.forwards] * len(masked)
        cu_rows.append(len(rows))
        canvas += sequence.canvas
        starts.append(len(canvas))

    def integers(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    tokens = integers(canvas, torch.int64)
    packed_rows = integers(rows)
    hidden = model(tokens, integers(starts))
    sample = linear_sample_tokens(
        hidden,
        model.head_weight,
        rows=packed_rows,
        temperature=config.temperature,
        seed=integers(row_seeds, torch.int64),
        step=integers(row_steps),
        row_ids=integers(row_ids, torch.int64),
        measure=config.measure,
    )
    last = [s.step_in_block == config.steps_per_block - 1 for s in active]
    if config.rule == "top_k":
        quotas = [s.schedule[s.step_in_block] for s in active]
        committed = remask(tokens, packed_rows, integers(cu_rows), sample, quota=integers(quotas), mask_id=mask_id)
    else:
        # On a block's last step everything left is committed: no confidence is below -infinity.
        thresholds = torch.tensor([-torch.inf if end else config.threshold for end in last], device=device)
        committed = remask(tokens, packed_rows, integers(cu_rows), sample, threshold=thresholds, mask_id=mask_id)
    filled = tokens.tolist()
    for sequence, start, end in zip(active, starts[:-1], starts[1:], strict=True):
        sequence.canvas = filled[start:end]
        sequence.step_in_block += 1
        sequence.forwards += 1
    return committed.tolist()


def _block_is_done(sequence: _Sequence, config: GenerationConfig, mask_id: int) -> bool:
    """No mask is left in the block, or its steps are used up."""
    begin = sequence.prompt_length + sequence.block * config.block_length
    if mask_id not in sequence.canvas[begin : begin + config.block_length]:
        return True
    return sequence.step_in_block == config.steps_per_block


def _result(
    sequence: _Sequence, config: GenerationConfig, stop_tokens: set[int], tokenizer: Tokenizer | None
) -> GenerationResult:
    end = sequence.prompt_length + sequence.block * config.block_length
    tokens = sequence.canvas[sequence.prompt_length : end]
    cut = next((i for i, token in enumerate(tokens) if token in stop_tokens), len(tokens))
    tokens = tokens[:cut]
    assert sequence.finish_reason is not None
    result = GenerationResult(tokens, sequence.finish_reason, sequence.forwards)
    if tokenizer is not None:
        text = tokenizer.decode(tokens)
        at = _find_stop(tokenizer, tokens, config.stop_strings)
        result.text = text if at is None else text[:at]
    return result


def _find_stop(tokenizer: Tokenizer | None, tokens: list[int], stop_strings: tuple[str, ...]) -> int | None:
    """Where the first stop string begins in the text of `tokens`."""
    if tokenizer is None or not stop_strings:
        return None
    text = tokenizer.decode(tokens)
    found = [text.find(stop) for stop in stop_strings]
    return min((at for at in found if at >= 0), default=None)


def _check(
    model: MaskedDiffusionModel,
    prompts: Sequence[Sequence[int]],
    seeds: list[int],
    config: GenerationConfig,
    tokenizer: Tokenizer | None,
) -> None:
    if len(seeds) != len(prompts):
        raise ValueError(f"seed must be one integer or one for each of the {len(prompts)} prompts, got {len(seeds)}")
    if config.stop_strings and tokenizer is None:
        raise ValueError("stop_strings need a tokenizer")
    size = model.config.embedding_rows
    room = config.block_length if config.mode == "var" else config.gen_length
    for i, prompt in enumerate(prompts):
        if wrong := [token for token in prompt if not 0 <= token < size]:
            raise ValueError(f"prompts[{i}] holds token id {wrong[0]}, outside of [0, {size})")
        beyond = len(prompt) + room - model.config.max_position_embeddings
        if beyond > 0:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens; with {room} more it is {beyond} over the model's "
                f"max_position_embeddings of {model.config.max_position_embeddings}"
            )
    for token in config.stop_tokens or ():
        if not 0 <= token < size:
            raise ValueError(f"stop token {token} is outside of [0, {size})")
