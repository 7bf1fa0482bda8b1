"""A checkpoint as a model of lm-evaluation-harness, registered there as "illada".

    python -m illada.integrations.lm_eval --model illada --model_args pretrained=runs/demo,llh=confidence --tasks ...

is lm_eval's own command with that model in it. "illada_dist" is the same model with the defaults of the authors'
evaluation, so that their command lines give their settings; the arguments' published names are understood by both.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
import torch.distributed as dist
from annotated_types import Le
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

import illada
from illada.checkpoints.folders import load
from illada.devices import find_device
from illada.evaluation.asked import asked_of, stop_strings_of
from illada.evaluation.journal import Journal, fingerprint, request_key
from illada.evaluation.settings import ALIASES, MC_NUM, PUBLISHED_DEFAULTS, EvaluationSettings
from illada.generation import GenerationConfig, generate
from illada.generation.stopping import stop_position
from illada.model import MaskedDiffusionModel
from illada.schema import LARGEST, checked
from illada.score import confidence_score, encode_pair, is_greedy, monte_carlo_likelihood
from illada.score.items import keep_end
from illada.terminal import shows
from illada.text.tokenizer import Tokenizer, bos_prefix

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_Score = tuple[Annotated[float, Le(LARGEST)], bool]  # -inf is one, nan is not
_LOGGER = logging.getLogger(__name__)


class _Job(NamedTuple):
    """A generation to run.

    length: how many tokens of the result are wanted.
    """

    prompt: list[int]
    config: GenerationConfig
    seed: int
    length: int


@register_model("illada")
class IlladaLM(LM):
    """A masked diffusion language model that lm_eval can ask for scores and texts.

    Args:
        pretrained: a checkpoint, a training run, or a `MaskedDiffusionModel` (then `tokenizer` is a `Tokenizer`).
        tokenizer: a tokenizer.json or a folder with one; default the checkpoint's.
        device: where the model runs; default the CPU.
        dtype: in what the model runs; default the checkpoint's dtype. "cuda" takes a 16-bit one.
        journal: a JSONL file that keeps finished requests; what it holds of this model with these settings is reused.
        trust_remote_code: run the tokenizer's own Python code, where it comes as that.
        settings: the fields of `EvaluationSettings` and the generator's options, or their published names.

    Raises:
        ValueError, TypeError: naming the argument. FileNotFoundError: no checkpoint or tokenizer there.
    """

    def __init__(
        self,
        pretrained: str | Path | MaskedDiffusionModel | None = None,
        *,
        tokenizer: str | Path | Tokenizer | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        journal: str | Path | Journal | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        pretrained = settings.pop("model_path", pretrained)
        if not isinstance(trust_remote_code, bool):
            raise ValueError(f"trust_remote_code must be True or False, got {trust_remote_code!r}")
        settings.pop("max_batch_size", None)  # lm_eval always passes it on; there is no search for a batch size here
        self.settings = EvaluationSettings.from_arguments(settings)
        self._device, self._rank, self._world_size = _processes(device)
        self.model, self.tokenizer, self._name = _load(pretrained, tokenizer, self._device, dtype, trust_remote_code)
        config, mask_id = self.model.config, self.settings.mask_id
        if mask_id is not None and mask_id != config.mask_token_id:
            raise ValueError(f"mask_id must be the checkpoint's own, {config.mask_token_id}, got {mask_id}")
        self.tokenizer.protect(
            [config.mask_token_id, config.eos_token_id, config.bos_token_id, config.pad_token_id, config.eot_token_id]
        )
        self._prefix = bos_prefix(self.settings.add_bos, config.bos_token_id)
        self._begin = self.tokenizer.begin_prompt([], self._prefix)
        longest = config.max_position_embeddings
        self.max_length = min(self.settings.max_length or longest, longest)
        self._end_think = tuple(self.tokenizer.encode(self.settings.end_think_text))
        #: What happened to how many requests of this process: texts that were shortened or cannot be scored.
        self.notes: dict[str, int] = {}
        self.journal = journal if isinstance(journal, Journal) else Journal(journal, self._rank)
        self._identity = [illada.__version__, fingerprint(self.model)]

    # How lm_eval makes a model: --model_args first, then what its other flags say.
    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> IlladaLM:
        """Make the model from the text of --model_args; lm_eval calls this."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> IlladaLM:
        """Make the model from parsed --model_args and lm_eval's own options.

        ValueError: they contradict each other.
        """
        flags = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name, value in flags.items():
            if name in arg_dict and str(arg_dict[name]) != str(value):
                raise ValueError(
                    f"{name} is {arg_dict[name]!r} in --model_args, but {value!r} by --{name} or its default; "
                    f"leave it out of --model_args and give --{name}"
                )
        return cls(**{**arg_dict, **flags})

    # ----------------------------------------------------------------------------------------------------- scoring

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return a score and a greedy check for each (context, continuation)."""
        pairs, kept = [], []
        shortened = dropped = too_long = 0
        for i, request in enumerate(requests):
            context, continuation = self._encode_pair(*request.args)
            fitted = self._fit(context, len(continuation) + self.settings.append_eos)
            if not continuation:
                dropped += 1
            elif fitted is None:
                too_long += 1
            else:
                shortened += len(fitted) < len(context)
                pairs.append((fitted, continuation))
                kept.append(i)
        self._note(
            f"contexts were longer than the model's {self.max_length} tokens together with their continuation, and "
            f"lost their beginning",
            shortened,
            len(requests),
        )
        self._note("candidates have no text that the tokenizer keeps, and score -inf", dropped, len(requests))
        self._note(
            f"candidates are longer than the model's {self.max_length} tokens without their context, and score -inf",
            too_long,
            len(requests),
        )
        llh, check = self.settings.llh, self.settings.check_greedy
        results = self._run(
            "loglikelihood",
            pairs,
            {**self.settings.scoring(), "check_greedy": check},
            lambda chunk: self._score(chunk, llh, check),
            [requests[i].args for i in kept],
        )
        # acc_mutual_info also scores each candidate without its context, and takes the difference. 0 for such a request
        # keeps it -inf; the difference of two -inf is NaN, which numpy takes for the largest.
        given = {(r.task_name, r.doc_id, r.args[1]) for r in requests if r.args[0]}
        scores: list[tuple[float, bool]] = [
            (0.0 if not r.args[0] and (r.task_name, r.doc_id, r.args[1]) in given else -math.inf, False)
            for r in requests
        ]
        for i, (score, greedy) in zip(kept, results, strict=True):
            scores[i] = score, greedy
        return scores

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return a lower bound on the log-likelihood of each text: Monte Carlo, half a model's length at a time.

        Each piece is given the half before it. Eq. 2 is no likelihood, so `llh` is not used here.
        """
        pairs, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tokenizer.encode(text, parse_special_tokens=False)
            piece = (self.max_length - len(self._begin) - self.settings.append_eos) // 2
            for begin in range(0, len(ids), piece):
                pairs.append((self._begin + ids[max(0, begin - piece) : begin], ids[begin : begin + piece]))
                owners.append(number)
        settings = self.settings.scoring("mc")
        bounds = self._run("rolling", pairs, settings, lambda chunk: self._score(chunk, "mc", False))
        totals = [0.0] * len(requests)
        for owner, (bound, _) in zip(owners, bounds, strict=True):
            totals[owner] += bound
        return totals

    def _score(self, pairs: list[tuple[list[int], list[int]]], llh: str | None, check_greedy: bool) -> list[list]:
        settings = self.settings
        contexts, continuations = [p[0] for p in pairs], [p[1] for p in pairs]
        shared: dict[str, Any] = {
            "append_eos": settings.append_eos,
            "cfg_scale": settings.generation.cfg_scale,
            "max_tokens": settings.max_tokens,
        }
        if llh == "confidence":
            scores = [s.score for s in confidence_score(self.model, contexts, continuations, **shared)]
        else:
            scores = monte_carlo_likelihood(
                self.model,
                contexts,
                continuations,
                num_samples=settings.mc_num or MC_NUM,
                stratum=settings.mc_stratum,
                seed=settings.seed,
                **shared,
            )
        greedy = is_greedy(self.model, contexts, continuations, **shared) if check_greedy else [False] * len(pairs)
        return [[float(score), bool(g)] for score, g in zip(scores, greedy, strict=True)]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of context and continuation, with the context's special tokens and its bos."""
        return encode_pair(self.tokenizer, context, continuation, parse_special_tokens=True, prefix=self._prefix)

    def _encode(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, with the special tokens in its text and its bos."""
        return self.tokenizer.encode_prompt(prompt, prefix=self._prefix)

    def _fit(self, context: list[int], more: int) -> list[int] | None:
        """Return as much of the context, its bos and its end, as the model has room for beside `more` tokens.

        None: it has no room for those alone.
        """
        room = self.max_length - more
        return None if room < 0 else keep_end(context, room, len(self._begin))

    def _note(self, what: str, count: int, total: int) -> None:
        """Count requests that were changed, and log once a call what was done to them."""
        if count:
            self.notes[what] = self.notes.get(what, 0) + count
            _LOGGER.warning("%d of %d %s", count, total, what)

    # -------------------------------------------------------------------------------------------------- generation

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text of each prompt's continuation, up to the first of the task's stop strings or the eos."""
        jobs, occurrences, shortened = [], Counter[str](), 0
        for request in requests:
            prompt, options = request.args
            length, sampling = asked_of(options, self.settings)
            stops = self._stops(options)
            encoded = self._encode(prompt)
            ids, config = self._plan(encoded, length, sampling, stops)
            shortened += len(ids) < len(encoded)
            # A request that is repeated is a new sample; the count is part of what its seed is made from.
            key = request_key(ids, stops, vars(config), length)
            occurrences[key] += 1
            seed = int(request_key(self.settings.seed, ids, occurrences[key])[:15], 16)
            jobs.append(_Job(ids, config, seed, length))
        self._note(
            f"prompts left the model's {self.max_length} tokens no room for an answer, and lost their beginning",
            shortened,
            len(requests),
        )
        texts = self._run("generate_until", jobs, {}, self._generate, [r.args for r in requests])
        return list(texts)

    def _stops(self, options: dict[str, Any]) -> list[str]:
        """Return the task's stop strings, then the eos."""
        stops = stop_strings_of(options)
        eos = self._text([self.model.config.eos_token_id])
        return stops if not eos or eos in stops else [*stops, eos]

    def _plan(
        self, prompt: list[int], length: int, sampling: dict[str, float], stops: list[str]
    ) -> tuple[list[int], GenerationConfig]:
        """Return how to make `length` tokens, and what of the prompt is kept for it.

        Whole blocks are generated, as many as the prompt leaves room for. One that has no room for any loses its
        beginning, so that `length` tokens fit, but no more than half of the model's length.
        """
        block = min(self.settings.generation.block_length, length)
        whole = -(-length // block) * block
        room = (self.max_length - len(prompt)) // block * block
        if room < block:
            room = max(block, min(whole, self.max_length // 2 // block * block))
            fitted = self._fit(prompt, room)
            if fitted is None:
                raise ValueError(f"a block_length of {block} is over the model's length of {self.max_length}")
            prompt = fitted
        eos_id = self.model.config.eos_token_id
        stop_tokens = {eos_id, *self.model.stop_token_ids}
        for stop in stops:  # one that is a special token is not seen in the text where the generator looks for it
            token = self.tokenizer.token_to_id(stop)
            if token is not None and self._text([token]) == stop != self.tokenizer.decode([token]):
                stop_tokens.add(token)
        config = self.settings.for_length(
            min(whole, room),
            end_think=self._end_think,
            block_length=block,
            stop_strings=tuple(stops),
            stop_tokens=tuple(sorted(stop_tokens)),
            **sampling,
        )
        return prompt, config

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _generate(self, jobs: list[_Job]) -> list[str]:
        size = self.settings.batch_size
        longest = max(len(job.prompt) + job.config.gen_length for job in jobs)
        results = generate(
            self.model,
            [job.prompt for job in jobs],
            [job.config for job in jobs],
            seed=[job.seed for job in jobs],
            tokenizer=self.tokenizer,
            batch_size=max(1, self.settings.max_tokens // longest) if size == "auto" else int(size),
        )
        texts = []
        for job, result in zip(jobs, results, strict=True):
            text = self._text(result.tokens[: job.length])
            end_think = self._text(job.config.end_think).strip()
            texts.append(text[: stop_position(text, job.config.stop_strings, end_think)])
        return texts

    # -------------------------------------------------------------------------------------------------------- chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as a prompt, by the checkpoint's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the checkpoint's template, or nothing.

        Of several templates it is the default.
        """
        template = self.tokenizer.chat_template if chat_template else ""
        return template if isinstance(template, str) else str((template or {}).get("default", ""))

    @property
    def tokenizer_name(self) -> str:
        """The name that tells prompts of different checkpoints apart in lm_eval's caches."""
        return self._name.replace("/", "__")

    # ------------------------------------------------------------------------------------------ running, in chunks

    def _run(
        self, kind: str, jobs: Sequence[Any], settings: dict[str, Any], compute: Any, arguments: Sequence[Any] = ()
    ) -> list[Any]:
        """Return the result of each job, from the journal or computed.

        Jobs are computed in chunks of like length, each job once.
        """
        keys = [request_key(kind, self._identity, settings, _plain(job)) for job in jobs]
        places: dict[str, int] = {}
        for i, key in enumerate(keys):
            places.setdefault(key, i)
        todo = [i for key, i in places.items() if key not in self.journal or not _is_result(kind, self.journal[key])]
        todo.sort(key=lambda i: (-_size(jobs[i]), keys[i]))  # longest first: if memory runs out, it does so at once
        silent = self._rank > 0 or not shows()
        with tqdm(total=len(places), initial=len(places) - len(todo), desc=kind, disable=silent) as bar:
            for begin in range(0, len(todo), self.settings.chunk_size):
                chunk = todo[begin : begin + self.settings.chunk_size]
                results = compute([jobs[i] for i in chunk])
                self.journal.add((keys[i], result) for i, result in zip(chunk, results, strict=True))
                for i, result in zip(chunk, results, strict=True):
                    if arguments:  # lm_eval's own --use_cache: without this it keeps nothing of an unfinished call
                        self.cache_hook.add_partial(kind, arguments[i], result)
                bar.update(len(chunk))
        return [self.journal[key] for key in keys]

    # ---------------------------------------------------------------------------------------------------- processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return [world_size, ...]: the tensor of each process."""
        if self._world_size == 1:
            return tensor
        gathered = [torch.zeros_like(tensor, device="cpu") for _ in range(self._world_size)]
        dist.all_gather(gathered, tensor.cpu())
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all processes, on process `dst`."""
        if self._world_size == 1:
            return [obj]
        gathered: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        dist.gather_object(obj, gathered, dst=dst)
        return gathered

    def gather_notes(self) -> dict[str, int]:
        """Return the `notes` of all processes together, on process 0."""
        total = Counter[str]()
        for notes in self.gather_object(self.notes) or ():
            total.update(notes)
        return dict(total)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self._world_size > 1:
            dist.barrier()


@register_model("illada_dist")
class PublishedIlladaLM(IlladaLM):
    """`IlladaLM` with the defaults of the authors' evaluation: llh "mc", greedy check, one canvas of 1,024 tokens."""

    def __init__(self, pretrained: str | Path | MaskedDiffusionModel | None = None, **arguments: Any) -> None:
        given = {ALIASES.get(name, name) for name in arguments}
        arguments |= {name: value for name, value in PUBLISHED_DEFAULTS.items() if name not in given}
        batch_size = str(arguments.get("batch_size"))
        if batch_size.isdigit() and "mc_stratum" not in given:
            arguments["mc_stratum"] = int(batch_size)  # as published
        super().__init__(pretrained, **arguments)


def _processes(device: str | torch.device | None) -> tuple[torch.device, int, int]:
    """Return (device, rank, world size), as torchrun or accelerate launched this process."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    chosen = find_device(device or "cpu")
    if world_size > 1 and chosen.type == "cuda" and chosen.index is None:
        chosen = find_device(torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))))
    if world_size == 1:
        return chosen, 0, 1
    if not dist.is_initialized():
        # Only counts and results are exchanged, so gloo will do; processes wait for each other as long as it takes.
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    return chosen, dist.get_rank(), world_size


def _load(
    pretrained: str | Path | MaskedDiffusionModel | None,
    tokenizer: str | Path | Tokenizer | None,
    device: torch.device,
    dtype: str | torch.dtype | None,
    trust_remote_code: bool,
) -> tuple[MaskedDiffusionModel, Tokenizer, str]:
    """Return the model on its device, its tokenizer, and a name for both."""
    if isinstance(dtype, str):
        named = None if dtype == "auto" else getattr(torch, dtype, None)
        if dtype != "auto" and not isinstance(named, torch.dtype):
            raise ValueError(f"dtype must be auto or one of torch's, as in float32 or bfloat16, got {dtype!r}")
        dtype = named
    if isinstance(pretrained, MaskedDiffusionModel):
        if not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a Tokenizer where pretrained is a model, got {tokenizer!r}")
        return pretrained.to(device=device, dtype=dtype), tokenizer, type(pretrained).__name__
    if pretrained is None or isinstance(tokenizer, Tokenizer):
        raise TypeError("pretrained must be a checkpoint folder or a training run, as in pretrained=runs/demo")
    model, loaded = load(pretrained, tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval(), loaded, str(pretrained)


def _plain(job: Any) -> Any:
    """Return a job as JSON values."""
    return [vars(part) if isinstance(part, GenerationConfig) else part for part in job]


def _size(job: Any) -> int:
    """Return the number of tokens of a pair, or of a prompt."""
    return sum(len(part) for part in job[:2] if isinstance(part, list))


def _is_result(kind: str, value: Any) -> bool:
    """Return whether what a journal holds can be the result of such a request.

    Anything else is computed again.
    """
    try:
        checked(str if kind == "generate_until" else _Score, tuple(value) if isinstance(value, list) else value, kind)
    except ValueError:
        return False
    return True
