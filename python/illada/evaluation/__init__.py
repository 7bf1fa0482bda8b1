"""Evaluation of models: an adapter to lm-evaluation-harness, its settings, tasks from local text, and cache agreement.

lm_eval     `IlladaLM`, the adapter; needs `pip install 'illada[eval]'`; `command` is lm_eval's command with it
settings    `EvaluationSettings`, the fields of --model-args; `presets` holds the published ones
tasks       `prepare_tasks`: questions from a corpus's held-out text; made by `questions` from `dictionaries` and text
agreement   `cache_agreement`: generation with and without a cache
"""
