"""The text of examples/demo.py."""

import importlib.util
from pathlib import Path

SOURCE = '''
"""A module."""
try:
    import this
except ImportError:
    def fallback(): return   "a"  # comment

class A:
    """A class."""
    @property
    def size(self):
        """A docstring."""
        def inner(): return 1
        return inner()

    def empty(self):
        """A docstring alone."""
'''


def test_functions_are_written_once_without_docstrings_in_one_style(monkeypatch):
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).resolve().parents[2] / "examples/demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    long = "def long():\n" + "    x = 1\n" * demo.LONGEST
    monkeypatch.setattr(demo, "read_source", lambda source: iter([SOURCE, "print 'another version'", long, SOURCE]))
    assert list(demo.functions()) == [
        "def fallback():\n    return 'a'\n",
        "@property\ndef size(self):\n\n    def inner():\n        return 1\n    return inner()\n",
        "def empty(self):\n    pass\n",
    ]
