"""Scoring given continuations: Eq. 2 of the iLLaDA paper, the Monte Carlo likelihood bound, and the greedy check.

    confidence_score         Eq. 2: reveal the true tokens one by one, the most probable first, and add up their log
                             probabilities at the step each was revealed (`get_loglikelihood_confidence`)
    monte_carlo_likelihood   the evidence bound over random masks of the continuation (`get_loglikelihood_mc`)
    is_greedy                would un-masking the surest token a step produce it? (`suffix_greedy_prediction`)

`encode_pair` makes the ids of a context and a candidate of their texts, `truncate_context` fits the context in.
In parentheses the functions of the authors' evaluation that give the same numbers. All pairs of a call share packs of
up to `max_tokens` tokens, only rows that are still masked meet the head, and sequences that look the same are run
once: before anything is revealed, candidates of one length and one context do.
"""

from illada.score.confidence import ConfidenceScore, confidence_score, is_greedy
from illada.score.encode import encode_pair
from illada.score.items import truncate_context
from illada.score.monte_carlo import monte_carlo_likelihood, monte_carlo_masks

__all__ = [
    "ConfidenceScore",
    "confidence_score",
    "encode_pair",
    "is_greedy",
    "monte_carlo_likelihood",
    "monte_carlo_masks",
    "truncate_context",
]
