"""Make .venv: SGLang on the CPU engine, the development tools and this project, editable. `make setup` runs it.

The environment variable SGLANG chooses another version of SGLang that has a lock, and then makes .venv-VERSION beside
.venv. Needs only the standard library. Each step leaves a stamp in the environment, a hash of what it read, and is
skipped while that stays the same: a second run takes a fraction of a second. Every command's output goes to setup.log
there.

The syntax stays within Python 3.6, so that an older Python can still say which one is needed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "cpu_engine"
DEFAULT_SGLANG = "0.5.21"
SGLANG = os.environ.get("SGLANG") or DEFAULT_SGLANG
SUFFIX = "" if SGLANG == DEFAULT_SGLANG else "-" + SGLANG
VENV = ROOT / (".venv" + SUFFIX)
VENV_PYTHON = VENV / "bin" / "python"
STAMPS = VENV / "setup-stamps.json"
LOG = VENV / "setup.log"

ENGINE_LOCK = HERE / f"requirements{SUFFIX}.lock"
DEV_LOCK = HERE / "requirements-dev.lock"
COMPAT = HERE / "compat"
KERNELS = ROOT / "kernels" / "hybridkv_kernels"

SUPPORTED_PYTHONS = ((3, 11), (3, 12))
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"

CHECK = """
import sys
from importlib.metadata import entry_points
import sglang, torch, torchvision
import sgl_kernel
(plugin,) = entry_points(group="sglang.srt.plugins", name="hybridkv")
plugin.load()
print(f"python {sys.version_info[0]}.{sys.version_info[1]}, torch {torch.__version__}, sglang {sglang.__version__}")
"""


class SetupError(Exception):
    """Something the user has to put right; shown as one message, without a traceback."""


def check_sglang():
    """SetupError unless there is a lock of the version that SGLANG asks for."""
    if not ENGINE_LOCK.exists():
        locked = [path.stem[len("requirements-") :] for path in sorted(HERE.glob("requirements-[0-9]*.lock"))]
        legal = ", ".join([DEFAULT_SGLANG, *locked])
        raise SetupError(f"SGLANG = {SGLANG!r} is not allowed; legal: one of {legal}")


def find_base_python():
    """Path of a Python that can make virtual environments: a 3.11 (what the locks were made with) before a 3.12."""
    candidates = []
    for version in SUPPORTED_PYTHONS:
        on_path = shutil.which(f"python{version[0]}.{version[1]}")
        candidates += [sys.executable] if sys.version_info[:2] == version else []
        candidates += [on_path] if on_path else []
    if not candidates:
        raise SetupError(
            f"Python 3.11 or 3.12 is needed, but this is Python {sys.version_info[0]}.{sys.version_info[1]} "
            "and neither python3.11 nor python3.12 is on PATH."
        )
    for candidate in candidates:
        if probe([candidate, "-c", "import ensurepip, venv"]):
            return candidate
    raise SetupError(
        f"{' and '.join(dict.fromkeys(candidates))} cannot make virtual environments: install Python's venv module "
        "with pip (Debian, Ubuntu: apt-get install python3-venv)."
    )


def failure(message, output):
    """The message with the last lines of what the failed command wrote."""
    last_lines = "\n".join(output.strip().splitlines()[-12:])
    return SetupError(f"{message}; all output is in {LOG}, the end of it is:\n{last_lines}")


def probe(command):
    """Whether the command can be run and succeeds."""
    try:
        return subprocess.call(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0
    except OSError:
        return False


def fingerprint(paths):
    """Hash of the files, or of the files below the folders, with their names, and of where this checkout lies."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(f"{file.relative_to(ROOT)}\0".encode())
                digest.update(file.read_bytes())
    return digest.hexdigest()


def native_sources():
    """What the compiled kernels are made of; an editable install follows changes of Python files by itself."""
    return sorted(file for suffix in ("cpp", "h", "inc") for file in KERNELS.rglob("*." + suffix))


def torch_requirement(lock_text):
    """The lock's line for torch, such as torch==2.13.0+cpu."""
    (line,) = [line for line in lock_text.splitlines() if line.startswith("torch==")]
    return line


def run_logged(command):
    """Run the command with its output added to the log. Returns the exit status and that output."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    env.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1", SGLANG_USE_CPU_ENGINE="1")
    with LOG.open("a+b") as log:
        log.write(f"\n$ {' '.join(command)}\n".encode())
        log.flush()
        start = log.tell()
        status = subprocess.call(command, cwd=str(VENV), env=env, stdout=log, stderr=subprocess.STDOUT)
        log.seek(start)
        return status, log.read().decode(errors="replace")


def pip_install(*arguments):
    """Raises SetupError with the end of pip's output."""
    status, output = try_pip_install(*arguments)
    if status:
        raise failure("pip could not install this", output)


def try_pip_install(*arguments):
    # Python compiles what is imported, on its first import. There are 310 MB of source files, most of which nobody
    # imports, and pip would take a minute of a core for all of them.
    return run_logged([str(VENV_PYTHON), "-m", "pip", "install", "--no-deps", "--no-compile", *arguments])


def install_torch():
    """From where pip is configured to look if that has the CPU build, else from PyTorch's CPU index.

    Only torch comes from that index: it has other builds of torchvision than the lock means.
    """
    requirement = torch_requirement(ENGINE_LOCK.read_text())
    status, output = try_pip_install(requirement)
    if status and "No matching distribution found" in output:
        status, output = try_pip_install("--extra-index-url", TORCH_CPU_INDEX, requirement)
    if status:
        raise failure(
            f"pip could install {requirement} neither from its configured places nor {TORCH_CPU_INDEX}", output
        )


def install_compat():
    """From a copy, since setuptools leaves build folders beside the sources."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / COMPAT.name
        shutil.copytree(str(COMPAT), str(copy))
        pip_install("--no-build-isolation", str(copy))


def check():
    status, output = run_logged([str(VENV_PYTHON), "-c", CHECK])
    if status:
        raise failure("what was installed does not import", output)
    return output.strip().splitlines()[-1]


# What is done, what it reads, how. A step is run when it, or one before it, read something new.
STEPS = (
    ("torch, CPU build", [ENGINE_LOCK], install_torch),
    ("SGLang and what it needs (2 GB, a minute or two)", [ENGINE_LOCK], lambda: pip_install("-r", str(ENGINE_LOCK))),
    ("development tools", [DEV_LOCK], lambda: pip_install("-r", str(DEV_LOCK))),
    ("CPU engine shims", [COMPAT], install_compat),
    (
        "this project, editable, with its C++ kernels",
        [ROOT / "pyproject.toml", ROOT / "setup.py", *native_sources()],
        lambda: pip_install("--no-build-isolation", "-e", str(ROOT)),
    ),
)


def read_stamps():
    """The stamps of the last run; none when the environment is missing, broken or half made."""
    try:
        stamps = json.loads(STAMPS.read_text())
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def make_venv():
    """Make the environment unless a usable one is there."""
    usable = f"import sys, pip; sys.exit(sys.version_info[:2] not in {SUPPORTED_PYTHONS!r})"
    if VENV_PYTHON.exists() and probe([str(VENV_PYTHON), "-c", usable]):
        return
    base_python = find_base_python()
    print(f"setup: making {VENV.name} with {base_python}", flush=True)
    try:
        subprocess.check_call([base_python, "-m", "venv", "--clear", str(VENV)])
    except (OSError, subprocess.CalledProcessError) as error:
        raise SetupError(f"could not make {VENV}: {error}") from error


def run_steps():
    """Run the steps whose inputs changed. Returns how many were run."""
    stamps = read_stamps()
    num_run = 0
    for index, (title, paths, install) in enumerate(STEPS, start=1):
        stamp = fingerprint(paths)
        if stamps.get(title) == stamp:
            continue
        stamps.pop(title, None)
        stamps.pop("check", None)
        STAMPS.write_text(json.dumps(stamps))
        sys.stdout.write(f"setup: {index}/{len(STEPS)} {title} ... ")
        sys.stdout.flush()
        begun = time.monotonic()
        install()
        print(f"{time.monotonic() - begun:4.0f} s", flush=True)
        stamps[title] = stamp
        STAMPS.write_text(json.dumps(stamps))
        num_run += 1
    return num_run


def run_check():
    """Import what was installed, once after each change."""
    stamps = read_stamps()
    if "check" not in stamps:
        stamps["check"] = check()
        STAMPS.write_text(json.dumps(stamps))
    return stamps["check"]


def main():
    begun = time.monotonic()
    try:
        if not sys.platform.startswith("linux"):
            raise SetupError(f"Linux is needed: SGLang's requirements have no {sys.platform} builds.")
        check_sglang()
        make_venv()
        num_run = run_steps()
        versions = run_check()
    except SetupError as error:
        print(f"\nsetup: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run it again to go on", file=sys.stderr)
        return 130
    state = f"ready after {time.monotonic() - begun:.0f} s" if num_run else "up to date"
    print(f"setup: {VENV.name} is {state} ({versions})", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
