"""The benchmarks by name, for the command and for reports."""

from __future__ import annotations

#: Command to module of this package, in the order of `all`: short cases first, which leave more of a time budget.
#: Each has `DEVICES`, `cases(device) -> list[Case]`, `quick(device)`, those of --quick, `goals(records) -> list[Goal]`
#: and `providers(device)`, names for --provider and --list. What else one may have:
#: DIRECTIONS, SPREAD     `cases` takes one of the directions, and another spread
#: OWN, own(shapes, device)    shapes of one's own that it takes, see `shapes`, and the cases of such
#: LEAST_VOCAB            the least --vocab that these can have; default: 1
#: PROVIDERS_DOC               what says more of the providers than the module's own text
#: rivals(provider)       of a peer: does it the same job, so that it must not be faster? Default: all do
BENCHES = {
    "overhead": ".overhead",
    "attention": ".attention",
    "remask": ".remask",
    "loss": ".loss",
    "generate": ".generate",
    "score": ".score",
    "train-step": ".train_step",
}
