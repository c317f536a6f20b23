"""Kernels of decode and of observation, compiled without a GPU: no spills, few registers; and what the table and the
exit status say."""

import os
import subprocess
import sys

import pytest

from hybridkv_kernels import gpu

pytestmark = pytest.mark.skipif(not gpu.is_installed(), reason="Triton is not installed")


def run(code, *arguments, **environment):
    """In a process of its own: Triton interprets in this one."""
    env = {**os.environ, **environment}
    command = [sys.executable, *code, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def check(code):
    done = run(["-c", code])
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_decode_neither_spills_nor_takes_too_many_registers():
    """sm_80 and sm_90, bf16, head size 128, group 7, page sizes 8, 16 and 32."""
    check("""
import sys
from benchmarks import compile_kernels as c
wanted = [c.Case("decode_attn", c.shape_of(page_size=p), c.decode_attn(), is_gated=True) for p in (8, 16, 32)]
usages = list(c.measured(wanted, [80, 90]))
attend = [u for u in usages if u.kernel == "_attend"]
assert len(attend) == 6 and {u.kernel for u in usages} == {"_plan", "_attend"}
assert all(0 < u.registers and u.shared_bytes > 0 for u in attend)
sys.exit("; ".join(u.fault for u in usages if u.fault) or 0)
""")


@pytest.mark.slow
def test_an_observation_neither_spills_nor_takes_too_many_registers():
    """sm_80 and sm_90, bf16, head size 128, group 7: seven kernels with the default statistics."""
    check("""
import sys
from benchmarks import compile_kernels as c
wanted = [c.Case("score_heads", c.shape_of(), c.score_heads("worst_capture+hit_cv"), is_gated=True)]
usages = list(c.measured(wanted, [80, 90]))
assert len({u.kernel for u in usages}) == 7 and len(usages) == 14
sys.exit("; ".join(u.fault for u in usages if u.fault) or 0)
""")


@pytest.mark.slow
def test_records_of_the_host_store_are_read_and_written_by_16_bytes():
    """Their addresses come from a table, so that the compiler knows only from us how they are aligned."""
    check("""
import re, triton
from benchmarks.compile_kernels import *
target, shape = GPUTarget("cuda", 90, 32), shape_of(page_size=8)
for call, name, wide in (
    (retrieve_chunks("half_codes", chunk_size=1), "_fetch_kernel", {"ld": 4, "st": 8}),
    (offload_rows("same"), "_copy_kernel", {"ld": 8, "st": 4}),
    (offload_rows("int8"), "_round_kernel", {"st": 2}),
):
    with caught_launches() as launches:
        call(shape)
    [launch] = [launch for launch in launches if launch[0].__name__ == name]
    source, options = specialize(*launch, target)
    ptx = triton.compile(source, target=target, options=options).asm["ptx"]
    for kind, count in wide.items():
        assert len(re.findall(kind + r"\\.global\\S*\\.v4\\.b32", ptx)) == count, (name, kind)
""")


def test_limits_are_those_of_gated_kernels_on_gated_architectures():
    check("""
from benchmarks.compile_kernels import *
def fault(is_gated=True, **use):
    case = Case("decode_attn", shape_of(), decode_attn(), is_gated)
    use = {"architecture": 90, "registers": 128, "stack_bytes": 0, "spills": 0, "shared_bytes": 9, "seconds": 0.1} | use
    return Usage(case=case, kernel="_attend", **use).fault
assert fault() is None
assert fault(registers=129).endswith("on sm_90 takes 129 registers, more than 128")
assert fault(architecture=80, spills=1).endswith("on sm_80 spills: 1 local loads and stores, 0 bytes of stack")
assert "8 bytes of stack" in fault(stack_bytes=8)
assert fault(is_gated=False, spills=9) is fault(architecture=100, spills=9) is None
""")


def test_what_cannot_be_compiled_is_said():
    interpreting = run(["-m", "benchmarks.compile_kernels"], TRITON_INTERPRET="1")
    assert interpreting.returncode == 2
    assert interpreting.stderr.startswith("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    nothing = run(["-m", "benchmarks.compile_kernels"], "--op", "no_such_op")
    assert nothing.returncode == 2
    assert nothing.stderr == "--op 'no_such_op' leaves no case\n"
