"""The host's view of one sequence during its generation: canvas, blocks and progress."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from illada.config import ModelConfig
from illada.generation.config import GenerationConfig
from illada.generation.rules import dream_quota, dream_transfer, end_think_bias, quota_schedule, taken_back


class RuleCall(NamedTuple):
    """The settings that requests must share to be served by one call of the ops.

    They are the ops' arguments that are no tensors.
    """

    rule: str
    measure: str
    min_commit: int
    ordered: bool
    delayed: bool
    filtered: bool


class Request:
    """A prompt and its canvas, with the state of its generation.

    Attributes:
        index: of the prompt. config, seed: as given.
        canvas: int64 [prompt and all tokens it may get], masks where nothing is committed.
        blocks: the positions of each block, in the order of filling.
        block, step, forwards: blocks done, steps done in this one, forward passes in all.
        slots: of the cache, one for the sequence and one for its unconditional twin, if there are any.
        finish_reason: None while there is work left.
    """

    def __init__(
        self,
        index: int,
        prompt: NDArray,
        config: GenerationConfig,
        seed: int,
        model: ModelConfig,
        slots: tuple[int, ...] = (),
    ) -> None:
        self.index, self.config, self.seed, self.slots = index, config, seed, slots
        self.mask_id = model.mask_token_id
        self.prompt_length = len(prompt)
        size = config.block_length
        if config.mode == "infill":
            self.canvas = prompt.copy()
            holes = np.flatnonzero(prompt == self.mask_id)
            self.blocks = [holes[i : i + size] for i in range(0, len(holes), size)]
        else:
            count = min(config.num_blocks, (model.max_position_embeddings - len(prompt)) // size)
            self.canvas = np.concatenate([prompt, np.full(count * size, self.mask_id, dtype=np.int64)])
            self.blocks = [len(prompt) + np.arange(i * size, (i + 1) * size) for i in range(count)]
        self.given = np.ones(len(self.canvas), dtype=bool)  # for guidance: what the unconditional twin does not see
        if self.blocks:
            self.given[np.concatenate(self.blocks)] = False
        self.block = self.step = self.forwards = 0
        self.finish_reason: str | None = None
        self.taken = np.empty(0, dtype=np.int64)
        self._start_block()

    def _start_block(self) -> None:
        self.step = 0
        if self.block < len(self.blocks):
            self.quotas = quota_schedule(len(self.masked()), self.config.steps_per_block)

    # --------------------------------------------------------------------------------------------- what a forward sees

    @property
    def guided(self) -> bool:
        """Whether the request has an unconditional twin in the pack."""
        return self.config.cfg_scale > 0

    @property
    def end(self) -> int:
        """The length of the canvas that the model sees; in mode "var" it ends with the block."""
        return int(self.blocks[self.block][-1]) + 1 if self.config.mode == "var" else len(self.canvas)

    def first_query(self, shift: bool) -> int:
        """Return where this step's tokens begin, behind those in the cache.

        shift: of the model's logits.
        """
        if self.config.cache == "none":
            return 0
        block = self.block
        if self.step == 0:
            if self.config.cache == "prefix" or block == 0:
                return 0
            block -= 1
        return max(0, int(self.blocks[block][0]) - shift)

    def tokens(self, *, conditional: bool) -> NDArray:
        """Return the canvas up to `end`; the unconditional twin has masks for what was given.

        As published, in mode "var" the finished blocks count as given, in mode "fixed" the prompt alone.
        """
        visible = self.canvas[: self.end]
        if conditional:
            return visible
        given = self.given[: self.end].copy()
        if self.config.mode == "var":
            given[: self.blocks[self.block][0]] = True
        return np.where(given, self.mask_id, visible)

    def masked(self) -> NDArray:
        """Return the positions of the block that still hold the mask."""
        positions = self.blocks[self.block]
        return positions[self.canvas[positions] == self.mask_id]

    # ------------------------------------------------------------------------------------------------ what a step does

    @property
    def call(self) -> RuleCall:
        """The ops' arguments that this request must share with the others of its call."""
        config = self.config
        rule, measure, min_commit = config.rule, config.measure, 1
        if rule == "origin":  # each with probability p: a uniform confidence of at least 1 - p
            rule, measure, min_commit = "threshold", "random", 0
        return RuleCall(rule, measure, min_commit, config.alg_temp > 0, bool(config.delay_tokens), config.filtered)

    def limit(self) -> float:
        """Return the rule's number for this step.

        The tokens that are taken back are chosen here, too.
        """
        config, step, steps = self.config, self.step, self.config.steps_per_block
        last = step == steps - 1
        if config.rule == "quota":
            if config.schedule == "dream":
                return dream_quota(len(self.masked()), step, steps, config.eps)
            return self._quota_with_take_back() if config.take_back else self.quotas[step]
        if config.rule == "origin":
            return -np.inf if last else 1 - dream_transfer(step, steps, config.eps)
        if config.rule == "threshold":
            return -np.inf if last else config.threshold
        return np.inf if last else getattr(config, config.rule)

    def _quota_with_take_back(self) -> int:
        positions = self.blocks[self.block]
        masks, total = len(self.masked()), sum(self.quotas)
        after = total - sum(self.quotas[: self.step + 1])  # masks that the schedule leaves
        committed = positions[self.canvas[positions] != self.mask_id]
        if len(committed):
            cap = (after / total) / max(1 - masks / total, 1 / total)
            probability = min(self.config.take_back, cap)
            self.taken = taken_back(self.seed, committed, self.forwards, probability)
        return min(max(masks - after + len(self.taken), 0), masks)

    def end_think(self) -> tuple[int, int, float] | None:
        """Return (position, id, gain of its logit) of this step, if anything encourages the end of thinking."""
        config = self.config
        if not config.end_think_boost:
            return None
        at = int(self.masked()[0])
        found = end_think_bias(
            self.canvas[self.prompt_length : self.end], at - self.prompt_length, config.gen_length,
            config.end_think, config.end_think_boost, config.end_think_power,
        )  # fmt: skip
        return None if found is None else (at, *found)

    def advance(self, positions: NDArray, tokens: NDArray) -> NDArray:
        """Write the step's tokens at `positions`, and return the positions that it committed.

        Those are committed that were masks and are none now.
        """
        committed = positions[(self.canvas[positions] == self.mask_id) & (tokens != self.mask_id)]
        self.canvas[positions] = tokens
        if len(self.taken):
            self.canvas[self.taken] = self.mask_id
            self.taken = self.taken[:0]
        self.step += 1
        self.forwards += 1
        return committed

    @property
    def block_done(self) -> bool:
        """Return whether no mask is left in the block, or its steps are used up."""
        return self.step == self.config.steps_per_block or not len(self.masked())

    def next_block(self) -> None:
        """Start the next block, if there is one."""
        self.block += 1
        self._start_block()
