"""The native calls on plain CPU tensors: their arguments, which have no names in a call, and when they may be made."""

import ast
import contextlib
import re
from pathlib import Path

import pytest
import torch

import illada
from illada.ops import _library as lib

ROOT = Path(__file__).resolve().parents[2]
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
SOURCE = (ROOT / "csrc/bindings/cpu_calls.cpp").read_text()
#: Expressions of Python whose last name is not that of the C++ parameter.
OTHER_NAMES = {"_most_keys": "max_keys", "most_keys": "max_keys", "CHUNK_BYTES_CPU": "chunk_bytes"}  # fmt: skip
#: Functions that get the arguments of an op, whole: the op, and other names of its arguments.
SCHEMAS = {
    "masked_cross_entropy": ("masked_ce_fwd", {}),
    "masked_cross_entropy_backward": ("masked_ce_bwd", {}),
    "linear_masked_cross_entropy": ("linear_masked_ce_fwd", {"grad_weight_dtype": "grad_dtype"}),
}


def parameters(name: str) -> list[str]:
    """Return the names of the parameters of the C++ function."""
    found = re.search(rf"^(?:bool|py::object) {name}\((.*?)\) {{", SOURCE, re.MULTILINE | re.DOTALL)
    return re.findall(r"(\w+)(?:,|$)", found[1])


def functions() -> list[str]:
    return [name for name in re.findall(r'calls\.def\("(\w+)"', SOURCE) if name != "use_torch"]


def calls():
    """Yield (place, function, arguments) of each call `lib.cpu_calls().function(...)` in the package."""
    for path in sorted((ROOT / "python/illada").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if ast.unparse(node.func.value) == "lib.cpu_calls()":
                    assert not node.keywords
                    yield f"{path.name}:{node.lineno}", node.func.attr, list(flat(node.args))


def flat(arguments):
    for argument in arguments:
        starred = isinstance(argument, ast.Starred)
        if starred and isinstance(argument.value, ast.Tuple):
            yield from flat(argument.value.elts)
        else:
            yield argument


def name_of(argument: ast.expr) -> str | None:
    """Return the parameter's name that an argument says, or None for a number, None and the like."""
    if isinstance(argument, ast.Call):
        argument = argument.func
    if not isinstance(argument, ast.Name | ast.Attribute):
        return None
    name = argument.id if isinstance(argument, ast.Name) else argument.attr
    return OTHER_NAMES.get(name, name)


def test_every_function_is_called():
    assert {name for _, name, _ in calls()} == set(functions())


def test_calls_pass_each_value_in_its_place():
    """Names are compared from both ends up to arguments that are passed on whole, which the schemas are for."""
    compared = 0
    for place, function, arguments in calls():
        want = parameters(function)
        whole = [isinstance(argument, ast.Starred) for argument in arguments]
        first = whole.index(True) if any(whole) else len(arguments)
        last = whole[::-1].index(True) if any(whole) else 0
        pairs = [*zip(arguments[:first], want, strict=False), *zip(arguments[len(arguments) - last :], want[len(want) - last :], strict=True)]  # fmt: skip
        assert any(whole) or len(arguments) == len(want), place
        for argument, name in pairs:
            said = name_of(argument)
            if said is not None and not said.endswith("dtype") and said != "float32":
                assert said == name, f"{place}: {ast.unparse(argument)} is passed as {function}'s {name}"
                compared += 1
    assert compared >= 50


@pytest.mark.parametrize("function", SCHEMAS)
def test_parameters_have_the_order_of_the_schema(function):
    """Arguments of an op are passed on as they came."""
    op, others = SCHEMAS[function]
    schema = [argument.name for argument in getattr(torch.ops.illada, op).default._schema.arguments]
    shared = [name for name in parameters(function) if name not in OTHER_NAMES.values()]
    assert shared == [others.get(name, name) for name in schema[: len(shared)]] and len(schema) - len(shared) <= 1


def watchers():
    yield "mode", lambda: torch.device("cpu")
    yield "dispatch mode", lambda: torch.utils.flop_counter.FlopCounterMode(display=False)
    yield "profiler", lambda: torch.profiler.profile()
    yield "forward AD", torch.autograd.forward_ad.dual_level
    yield "nothing", contextlib.nullcontext


@pytest.mark.parametrize("name, watcher", watchers(), ids=lambda value: value if isinstance(value, str) else "")
def test_what_watches_a_call_is_the_same_in_python_and_in_c(name, watcher):
    """`watched` here and `is_watched` there have each of these conditions."""
    if TORCH < (2, 10):
        pytest.skip("torch before 2.10 has no native calls")
    x = torch.zeros(3, 8)
    assert lib.cpu_calls().sample_fits(x)
    with watcher():
        assert lib.watched() == (name != "nothing")
        assert lib.cpu_calls().sample_fits(x) == (name == "nothing")
    assert lib.cpu_calls().sample_fits(x) and not lib.watched()


def test_autocast_is_for_python():
    """The dispatcher handles autocast, so that `watched` does not ask; the native calls do not handle it."""
    x = torch.zeros(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert not lib.watched() and not lib.cpu_calls().sample_fits(x)
        assert illada.sample_tokens(x).token.tolist() == [0, 0, 0]
