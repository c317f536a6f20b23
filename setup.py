"""The C++ kernels: one plain shared library, loaded with ctypes. Everything else is in pyproject.toml."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

KERNELS = "kernels/hybridkv_kernels"
IN_PLACE = Path(KERNELS, "_cpu.so")


class BuildLibrary(build_ext):
    """Builds a library that no Python loads as a module: its name says nothing of one."""

    def get_ext_filename(self, fullname):
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext):
        built = Path(self.get_ext_fullpath(ext.name))
        inputs = [*ext.sources, *ext.depends]
        if not self.force and not newer_group(inputs, str(IN_PLACE), "newer"):
            # An editable install into another environment; the library has nothing of Python in it.
            self.mkpath(str(built.parent))
            self.copy_file(str(IN_PLACE), str(built))
            return
        if self.force or newer_group(inputs, str(built), "newer"):
            # The build is optional: when it fails, nothing of an earlier one may serve in its place.
            built.unlink(missing_ok=True)
        # The sources at once; each takes half a minute.
        compile_one = self.compiler.compile
        self.compiler.compile = lambda sources, **options: _compile_at_once(compile_one, sources, options)
        super().build_extension(ext)
        self.compiler.compile = compile_one

    def copy_extensions_to_source(self):
        IN_PLACE.unlink(missing_ok=True)
        super().copy_extensions_to_source()


def _compile_at_once(compile_one, sources, options):
    """The object files of all sources, in their order; the first error is raised."""
    with ThreadPoolExecutor(len(sources)) as pool:
        objects = pool.map(lambda source: compile_one([source], **options), sources)
        return [name for names in objects for name in names]


class PlatformWheel(bdist_wheel):
    """A wheel for every Python on this platform: ctypes loads the library."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    ext_modules=[
        Extension(
            "hybridkv_kernels._cpu",
            # The linker keeps one copy of a template of the standard library that several of them use. Each includes
            # the library before it turns its instruction set on, so that any copy runs on any machine.
            sources=[f"{KERNELS}/cpu/{name}.cpp" for name in ("module", "isa_scalar", "isa_avx2", "isa_avx512")],
            depends=[
                "setup.py",
                *(f"{KERNELS}/cpu/{name}" for name in ("args.h", "head_pages.h", "vec.h", "isa.inc")),
                *(f"{KERNELS}/{op}/cpu.h" for op in ("decode_attn", "retrieve_chunks", "score_heads", "select_tokens")),
            ],
            extra_compile_args=["-O3", "-std=c++17", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"],
            # -s: without symbols, which are six sevenths of it.
            extra_link_args=["-fopenmp", "-s"],
            language="c++",
            # Without a compiler the project installs all the same; the torch references serve, and say so.
            optional=True,
        )
    ],
)
