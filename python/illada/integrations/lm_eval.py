"""lm-evaluation-harness with illada's models: `python -m illada.integrations.lm_eval` is its command.

Importing it registers the models "illada" and "illada_dist" there; see `illada.evaluation.lm_eval`.
"""

from illada.evaluation.command import main
from illada.evaluation.lm_eval import IlladaLM, PublishedIlladaLM

__all__ = ["IlladaLM", "PublishedIlladaLM", "main"]

if __name__ == "__main__":
    main()
