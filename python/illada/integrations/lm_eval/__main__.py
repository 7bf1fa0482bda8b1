"""lm-evaluation-harness's own command, with illada's models registered."""

from illada.integrations.lm_eval import main

if __name__ == "__main__":
    main()
