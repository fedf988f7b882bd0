"""Reads the installed reasoning-gym: an upgrade that brings a new task or a dangerous scorer fails here."""

import ast
import importlib
import inspect
import textwrap

import pytest

from swarm.tasks.gym import import_reasoning_gym
from swarm.tasks.gym_safety import PRESAMPLED, REFUSED, REPLACED, SAFE
from swarm.tasks.gym_scorers import REPLACEMENTS

import_reasoning_gym()
from reasoning_gym.dataset import ProceduralDataset  # noqa: E402
from reasoning_gym.factory import DATASETS  # noqa: E402

DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__", "literal_eval", "getattr", "open", "globals", "input"}
DANGEROUS_CALLS |= {"parse_expr", "sympify", "S", "lambdify", "parse_latex", "import_module", "system", "popen"}
DANGEROUS_MODULES = {"subprocess", "pickle", "marshal", "shelve", "yaml", "os", "socket", "ctypes", "multiprocessing"}
PAPER_TASKS = """base_conversion basic_arithmetic arc_1d bf propositional_logic fraction_simplification
    decimal_arithmetic calendar_arithmetic binary_matrix""".split()


def called_name(call):
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def dangers_of(cls):
    """Return the dangerous calls that `score_answer` reaches in its own class, its bases and its package."""
    dangers, seen, todo = set(), set(), [(cls.score_answer, cls)]
    while todo:
        function, owner = todo.pop()
        function = inspect.unwrap(getattr(function, "__func__", function))
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        module = inspect.getmodule(function)
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id in DANGEROUS_MODULES:
                    dangers.add(f"{node.value.id}.{node.attr}")
            if not isinstance(node, ast.Call):
                continue
            name = called_name(node)
            target = getattr(module, name, None) if isinstance(node.func, ast.Name) else getattr(owner, name, None)
            is_own_parser = inspect.isfunction(target) and target.__module__.startswith("reasoning_gym")
            if name in DANGEROUS_CALLS and not is_own_parser:
                dangers.add(name)
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
                holder = getattr(module, node.func.value.id, None)
                if inspect.isclass(holder) or inspect.ismodule(holder):
                    target = getattr(holder, name, target)
            if inspect.isclass(target) and target.__module__.startswith("reasoning_gym"):
                todo += [(member, target) for _, member in inspect.getmembers(target, inspect.isfunction)]
            elif callable(target) and str(getattr(target, "__module__", "")).startswith("reasoning_gym"):
                todo.append((target, owner))
    return dangers


def test_every_registered_task_is_classified_once():
    classes = [SAFE, set(REPLACED), set(REFUSED)]
    assert set().union(*classes) == set(DATASETS)
    assert sum(map(len, classes)) == len(DATASETS)
    assert set(REPLACED) == set(REPLACEMENTS)
    assert PRESAMPLED <= SAFE


@pytest.mark.parametrize("name", sorted(SAFE))
def test_no_scorer_that_is_called_safe_has_a_dangerous_call(name):
    assert dangers_of(DATASETS[name][0]) == set()


@pytest.mark.parametrize(
    ("name", "danger"),
    [
        ("binary_matrix", "eval"),
        ("spiral_matrix", "eval"),
        ("string_insertion", "eval"),
        ("n_queens", "eval"),
        ("number_sorting", "eval"),
        ("bitwise_arithmetic", "eval"),
        ("countdown", "parse_expr"),
        ("puzzle24", "parse_expr"),
        ("simple_integration", "parse_expr"),
        ("intermediate_integration", "parse_expr"),
        ("polynomial_multiplication", "parse_expr"),
    ],
)
def test_the_scan_sees_the_known_dangers(name, danger):
    assert danger in dangers_of(DATASETS[name][0])


def _helper(answer):
    return eval(answer)


class _Hidden(ProceduralDataset):
    def __getitem__(self, index):
        raise NotImplementedError

    def _parse(self, answer):
        return importlib.import_module("os").system(answer)

    def score_answer(self, answer, entry):
        return self._parse(answer)


_Hidden._parse.__module__ = _Hidden.__module__ = "reasoning_gym.hidden"


def test_the_scan_follows_helpers():
    assert dangers_of(_Hidden) >= {"import_module", "system"}


def test_the_tasks_of_the_paper_can_be_used():
    assert set(PAPER_TASKS) <= SAFE | set(REPLACED)


def test_the_package_executes_only_where_we_know_of_it():
    """Every other module of the package that evaluates or executes is looked at here, scorer or not."""
    known = {
        "algebra.intermediate_integration",
        "algebra.polynomial_multiplication",
        "algebra.simple_integration",
        "algorithmic.binary_matrix",
        "algorithmic.number_sorting",
        "algorithmic.spiral_matrix",
        "algorithmic.string_insertion",
        "arithmetic.basic_arithmetic",  # its own question, when it is made
        "arithmetic.bitwise_arithmetic",
        "arithmetic.gsm_symbolic.generators_00_49",  # its own fractions, when a question is made
        "arithmetic.gsm_symbolic.generators_50_99",
        "code.codeio",
        "games.countdown",
        "games.n_queens",
        "games.puzzle24",
    }
    root = inspect.getfile(import_reasoning_gym()).removesuffix("__init__.py")
    found = set()
    for path in __import__("pathlib").Path(root).rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        source = path.read_text()
        if not any(f"{name}(" in source for name in ("eval", "exec", "parse_expr", "sympify")):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and called_name(node) in {"eval", "exec", "parse_expr", "sympify"}:
                if module != "logic.propositional_logic":  # its own parser, which has the name of sympy's
                    found.add(module)
    assert found == known
