"""What no source of ours does: read objects that run code, from the network or from anywhere else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("sglang_hybridkv", "patches", "kernels") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "socket", "zmq", "yaml"}
RECEIVING = {"recv", "recv_multipart", "recv_string", "recv_json", "recv_pyobj", "SUB", "PULL", "REP", "ROUTER"}
CALLS = RECEIVING | {"send_pyobj", "eval_str", "unsafe_load", "allow_pickle"}
SOCKETS = {
    "sglang_hybridkv/requests/plan_events.py": ["zmq"],  # only sends
    "sglang_hybridkv/cli/inspect.py": ["zmq", "SUB", "recv_multipart"],  # a client's command; it reads msgpack
}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def forbidden(tree):
    """Lines of a module that import or call something of the lists above, or load a file with torch or NumPy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").partition(".")[0]} & MODULES
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {node.func.id} & BUILTINS
        elif isinstance(node, ast.Attribute):
            of_library = isinstance(node.value, ast.Name) and node.value.id in ("torch", "np", "numpy")
            names = {node.attr} & (CALLS | ({"load"} if of_library else set()))
        elif isinstance(node, ast.keyword):
            names = {node.arg} & CALLS
        else:
            continue
        for name in names:
            yield f"line {node.value.lineno if isinstance(node, ast.keyword) else node.lineno}: {name}"


def test_nothing_that_runs_code_is_read():
    assert len(SOURCES) > 100
    found = {path: list(forbidden(ast.parse(path.read_text(encoding="utf-8")))) for path in SOURCES}
    found = {str(path.relative_to(ROOT)): [line.split(": ")[1] for line in lines] for path, lines in found.items()}
    assert {path: sorted(names) for path, names in found.items() if names} == {
        path: sorted(names) for path, names in SOCKETS.items()
    }


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from zmq.asyncio import Socket",
        "torch.load(f)",
        "np.load(f)",
        "s.recv_pyobj()",
        "c.socket(q.SUB)",
        "eval(text)",
    ],
)
def test_what_is_forbidden_is_seen(line):
    assert list(forbidden(ast.parse(line)))
