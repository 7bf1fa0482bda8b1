"""`illada eval`: measure a checkpoint on tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from illada.cli import sampling
from illada.cli.signals import importing
from illada.files import is_stream, write_text

#: Model arguments that --model-args may not give, with the option to use instead.
_NO_MODEL_ARGS = {
    "pretrained": "the positional checkpoint", "model_path": "the positional checkpoint", "tokenizer": "--tokenizer",
    "device": "--device", "dtype": "--dtype", "journal": "--output, beside which the journal is kept",
}  # fmt: skip


def add_parser(commands: Any) -> None:
    """Add the command to the `illada` parser."""
    parser = commands.add_parser(
        "eval",
        help="measure a checkpoint on tasks",
        description="Measure a checkpoint on tasks of lm-evaluation-harness (pip install 'illada[eval]'): those made\n"
        "by `illada prepare --tasks`, which need no network, or any that the harness has.",
        epilog="example:\n  illada eval runs/demo --tasks definitions,cloze --include-path data/stdlib/tasks\n"
        "  illada eval iLLaDA-8B-Base --preset illada-base --tasks arc_challenge --output arc.json --resume",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="checkpoint folder, or a training run (its newest checkpoint)")
    parser.add_argument("--tasks", required=True, metavar="NAME,...", help="task names")
    parser.add_argument(
        "--include-path", action="append", metavar="DIR", help="task folder; may be given several times"
    )
    parser.add_argument("--preset", help="settings of the published scores, task by task: illada-base, illada-instruct")
    parser.add_argument(
        "--model-args", default="", metavar="K=V,...", help="llh, mc_num, steps, ...; over the preset's"
    )
    parser.add_argument("--limit", type=float, help="questions of each task; below 1 the share of them")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt; default the preset's or the task's")
    parser.add_argument("--apply-chat-template", action="store_true", help="prompts as the checkpoint's chats")
    parser.add_argument("--fewshot-as-multiturn", action="store_true", help="examples as turns of the chat")
    parser.add_argument("--tokenizer", metavar="PATH", help="default: the checkpoint's own")
    parser.add_argument("--device", help="cpu (default), or cuda for a 16-bit model")
    parser.add_argument("--dtype", help="of the model, as in bfloat16; default: as stored")
    parser.add_argument("--batch-size", default="auto", help="prompts generated together (%(default)s: by max_tokens)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and of Monte Carlo's masks (%(default)s)")
    parser.add_argument("--output", metavar="FILE", help="results as JSON; finished requests are kept beside it")
    parser.add_argument(
        "--log-samples", action="store_true", help="each question and answer beside --output, NAME.TASK.jsonl"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted evaluation into --output")
    parser.add_argument(
        "--confirm-run-unsafe-code", action="store_true", help="allow tasks that run what the model writes"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("--tasks names no task")
    if options.limit is not None and not options.limit > 0:
        raise ValueError(f"--limit must be above 0, got {options.limit:g}")
    if options.log_samples and options.output is None:
        raise ValueError("--log-samples needs --output, the file beside which the samples are written")
    journal = _journal(options)
    sampling.check_paths(options)
    for folder in options.include_path or ():
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--include-path: {folder} is not a folder; make one with illada prepare --tasks")
    with importing():
        from illada.cli.devices import parse_device
        from illada.evaluation.presets import settings_of

    parse_device(options.device)  # with several processes each uses another GPU
    groups: dict[str, tuple[Any, list[str]]] = {}  # tasks with the same settings run together
    for name in dict.fromkeys(names):
        settings = settings_of(options.preset, name)
        groups.setdefault(repr(settings), (settings, []))[1].append(name)
    try:
        with importing():
            import lm_eval  # noqa: F401
    except ImportError as error:
        raise ImportError(f"illada eval needs lm-evaluation-harness: pip install 'illada[eval]' ({error})") from None
    with importing():
        from illada.evaluation.chance import chance_of, describe_chance
        from illada.evaluation.command import quiet_logs
        from illada.evaluation.lm_eval import IlladaLM

    with quiet_logs():
        with importing():
            from lm_eval import simple_evaluate
            from lm_eval.utils import make_table, simple_parse_args_string

        limit = options.limit if options.limit is None or options.limit < 1 else int(options.limit)
        manager = _task_manager(names, options.include_path)
        model_args = simple_parse_args_string(options.model_args)
        for name, instead in _NO_MODEL_ARGS.items():
            if name in model_args:
                raise ValueError(f"--model-args cannot give {name}, got {model_args[name]!r}; use {instead}")
        given = {"batch_size": options.batch_size, "seed": options.seed, **model_args}
        model: Any = None
        merged: dict[str, Any] = {}
        samples: dict[str, Any] = {}
        for settings, group in groups.values():
            loaded = (
                {"pretrained": options.checkpoint, "tokenizer": options.tokenizer}
                if model is None
                else {"pretrained": model.model, "tokenizer": model.tokenizer}
            )
            model = IlladaLM(
                **loaded,
                device=options.device,
                dtype=options.dtype,
                journal=journal if model is None else model.journal,
                **{**settings.model_args, **given},
            )
            manager.settings = model.settings
            results = simple_evaluate(
                model=model,
                tasks=group,
                task_manager=manager,
                num_fewshot=settings.num_fewshot if options.num_fewshot is None else options.num_fewshot,
                limit=limit,
                apply_chat_template=settings.apply_chat_template or options.apply_chat_template,
                fewshot_as_multiturn=settings.fewshot_as_multiturn or options.fewshot_as_multiturn,
                confirm_run_unsafe_code=options.confirm_run_unsafe_code,
                bootstrap_iters=1000,
            )
            notes = model.gather_notes()
            if results is None:  # another rank has them
                continue
            chances = {}
            for name, rows in results["samples"].items():
                accuracy = results["results"][name].get("acc,none")
                if (chance := chance_of(manager.loaded[name], accuracy, rows)) is not None:
                    chances[name] = chance
            samples.update(results["samples"])
            print(make_table(results))
            if results.get("groups"):
                print(make_table(results, "groups"))
            for name, chance in chances.items():
                print(describe_chance(name, chance))
            for note, count in notes.items():
                print(f"note: {count:,} {note}")
            _merge(merged, results, chances, notes, {**settings.model_args, **given})
    if merged and options.output is not None:
        _write(options, merged, samples, journal)
    return 0


def _journal(options: argparse.Namespace) -> Path | None:
    """Return the file for finished requests, which stands beside the output.

    None: there is no output file.
    """
    from illada.evaluation.journal import journal_files

    if options.output is None:
        if options.resume:
            raise ValueError("--resume needs --output, the file whose evaluation was interrupted")
        return None
    sampling.check_output(options.output)
    if is_stream(options.output):
        if options.resume or options.log_samples:
            raise ValueError(
                f"--resume and --log-samples need a file as --output, {options.output} is a device or a pipe"
            )
        return None
    path = Path(f"{options.output}.journal")
    if not options.resume and (found := journal_files(path)):
        raise FileExistsError(
            f"{found[0]} holds an evaluation that was interrupted; go on with it (--resume), or remove the file"
        )
    return path


def _task_manager(names: list[str], include_path: list[str] | None) -> Any:
    """Build the index from --include-path only, when it has every requested task.

    The harness's own index takes seconds to read. ValueError: an unknown task.
    """
    from illada.evaluation.manager import RememberingTaskManager as TaskManager

    if include_path:
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    own = manager.all_tasks if include_path else []
    manager = TaskManager(include_path=include_path)
    if unknown := [name for name in names if name not in set(manager.all_tasks)]:
        import difflib

        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=8, cutoff=0.5)
        raise ValueError(
            f"unknown task {unknown[0]!r}; --include-path has {', '.join(own) or 'none'}, and of the "
            f"{len(manager.all_tasks):,} of lm-evaluation-harness the nearest are {', '.join(near) or 'none'}"
        )
    return manager


def _merge(
    merged: dict[str, Any],
    results: dict[str, Any],
    chances: dict[str, Any],
    notes: dict[str, int],
    settings: dict[str, Any],
) -> None:
    for part in ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better"):
        merged.setdefault(part, {}).update(results.get(part, {}))
    merged.setdefault("chance", {}).update(chances)
    total = merged.setdefault("notes", {})
    total.update({note: total.get(note, 0) + count for note, count in notes.items()})
    merged.setdefault("settings", {}).update({name: settings for name in results["results"]})


def _write(options: argparse.Namespace, merged: dict[str, Any], samples: dict[str, Any], journal: Path | None) -> None:
    from lm_eval.utils import handle_non_serializable

    import illada
    from illada.evaluation.journal import journal_files

    output = Path(options.output)
    header = {"checkpoint": options.checkpoint, "preset": options.preset, "limit": options.limit,
              "illada": illada.__version__}  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    written = [output]
    for name, rows in samples.items() if options.log_samples else ():
        written.append(output.with_name(f"{output.stem}.{name}.jsonl"))
        lines = (json.dumps(_sample(row), default=handle_non_serializable, allow_nan=False) + "\n" for row in rows)
        write_text(written[-1], "".join(lines))
    text = json.dumps(_finite({**header, **merged}), indent=2, default=str, allow_nan=False)
    write_text(output, text + "\n")
    for file in journal_files(journal) if journal else ():
        file.unlink()
    for file in written:
        print(f"written to {file}", file=sys.stderr)


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a sample to the form of the harness's --log_samples: answers as texts, arguments by name."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{i}": {f"arg_{j}": value for j, value in enumerate(arguments)}
        for i, arguments in enumerate(row["arguments"])
    }
    answers = {name: sanitize_list(row[name]) for name in ("resps", "filtered_resps")}
    return _finite({**row, **answers, "arguments": arguments, "target": str(row["target"])})


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by the texts inf, -inf and nan."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value
