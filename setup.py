"""The C++ kernels: one plain shared library, loaded with ctypes. Everything else is in pyproject.toml."""

from setuptools import Extension, setup

KERNELS = "kernels/hybridkv_kernels"

setup(
    ext_modules=[
        Extension(
            "hybridkv_kernels._cpu",
            # The order is part of the contract: templates of the standard library that every file compiles are taken
            # from the first one, and those of isa_scalar run on any machine.
            sources=[f"{KERNELS}/cpu/{name}.cpp" for name in ("module", "isa_scalar", "isa_avx2", "isa_avx512")],
            depends=[
                *(f"{KERNELS}/cpu/{name}" for name in ("args.h", "head_pages.h", "vec.h", "isa.inc")),
                *(f"{KERNELS}/{op}/cpu.h" for op in ("decode_attn", "retrieve_chunks", "score_heads")),
            ],
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            language="c++",
            # Without a compiler the project installs all the same; the torch references serve, and say so.
            optional=True,
        )
    ]
)
