"""A corpus and a configuration that train in a second."""

import pytest
from tiny_runs import settings

from illada.data.corpus import prepare
from illada.train import load_config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"a b c d e f g h {i} " * 40)
    out = tmp_path_factory.mktemp("data") / "corpus"
    prepare(f"dir:{folder}", out, vocab_size=300, validation_fraction=0.2)
    return out


@pytest.fixture
def config(corpus, tmp_path):
    return load_config(None, settings(corpus, tmp_path / "run"))
