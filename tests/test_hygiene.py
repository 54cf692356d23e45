"""Rules for the tests themselves."""

import ast
from collections import Counter
from pathlib import Path

import pytest

from engine.session.access import user_folder

TESTS = Path(__file__).parent
PUBLIC = {"_exit", "_replace"}
"""Documented names that begin with an underscore: `os._exit`, a named tuple's `_replace`."""
EXCEPTIONS = {
    # torch has no public way to read what FSDP2 reduces in, and whether it shards again.
    ("train/test_sharding.py", "_get_fsdp_state"): 2,
    ("train/test_sharding.py", "_fsdp_param_group"): 2,
    ("train/test_sharding.py", "_reduce_dtype"): 1,
    ("train/test_sharding.py", "_reshard_after_forward"): 1,
    # transformers has no public name for the attention that a model uses.
    ("train/test_compiled_layers.py", "_attn_implementation"): 2,
    # torch has no public way to put a storage into named shared memory.
    ("train/test_rollout_engine.py", "_share_filename_cpu_"): 1,
    # A tensor subclass without storage, and what an operator's schema says of views.
    ("train/gpu/pretend.py", "_make_wrapper_subclass"): 1,
    ("train/gpu/pretend.py", "_C"): 1,
    ("train/gpu/pretend.py", "_disabled_torch_function_impl"): 1,
    ("train/gpu/pretend.py", "_schema"): 1,
    # The operators below autograd that have no public name.
    ("train/gpu/pretend.py", "_index_put_impl_"): 1,
    ("train/gpu/pretend.py", "_unsafe_index"): 1,
    ("train/gpu/pretend.py", "_local_scalar_dense"): 3,
    ("train/gpu/pretend.py", "_unique2"): 1,
    ("train/gpu/pretend.py", "_unsafe_view"): 1,
    ("train/gpu/pretend.py", "_has_compatible_shallow_copy_type"): 1,
    ("train/gpu/pretend.py", "_to_copy"): 2,
    ("train/gpu/pretend.py", "_linalg_check_errors"): 1,
    ("train/gpu/pretend.py", "_getframe"): 1,
}
"""File and attribute, with the number of accesses."""


def private_accesses(path):
    """Attributes with an underscore before them, of anything but `self` and `cls`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        special = node.attr.startswith("__") and node.attr.endswith("__")
        if not own and not special and node.attr not in PUBLIC:
            yield node.attr


@pytest.mark.parametrize("variable", ["XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"])
def test_tests_have_folders_of_their_own_where_a_user_has_some(tmp_path_factory, variable):
    assert user_folder(variable, "default").is_relative_to(tmp_path_factory.getbasetemp())


def test_tests_use_what_is_public():
    found = Counter(
        (path.relative_to(TESTS).as_posix(), name)
        for path in sorted(TESTS.rglob("*.py"))
        for name in private_accesses(path)
    )
    assert found == Counter(EXCEPTIONS)


def at_the_top(path):
    """The modules that a file imports when it is imported itself."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def test_only_tests_of_ranks_import_torch():
    """`make test` runs the others in processes of their own, as that import takes seconds."""
    ours = ("engine.train", "tests.train")
    found = {
        path.relative_to(TESTS).as_posix(): name
        for path in sorted(TESTS.rglob("*.py"))
        if path.relative_to(TESTS).parts[0] not in ("train", "vllm")
        for name in at_the_top(path)
        if name.startswith(ours) or name.split(".")[0] in ("torch", "transformers", "accelerate")
    }
    assert not found
