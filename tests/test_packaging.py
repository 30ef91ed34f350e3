"""Wheel and sdist: their contents with and without compilers, and that they work installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mr1_fast.kernels.grpo import rows_cuda
from mr1_fast.version import __version__

# --no-build-isolation builds with the setuptools that is installed.
pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or next(
    filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None
)
NVCC = shutil.which(
    "nvcc", path=f"{os.environ['CUDA_HOME']}/bin" if os.environ.get("CUDA_HOME") else None
)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
LOSS = """
import torch
from mr1_fast import grpo_loss
from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import rows_native
logits = torch.randn(3, 37, requires_grad=True)
for _ in range(2):
    loss = grpo_loss(logits, torch.arange(3), torch.ones(3), torch.ones(3), beta=0.0).loss
    loss.backward()
print(rows_native.__file__, native.status()[1], loss.item(), sep="\\n")
"""


def started(
    program: str | Path, *arguments: str, cwd: Path, **environment: str
) -> subprocess.CompletedProcess:
    removed = ("CXX", "PYTHONPATH") if "PATH" in environment else ("PYTHONPATH",)
    inherited = {
        k: v for k, v in os.environ.items() if k not in removed and not k.startswith("MR1_FAST_")
    }
    command = [program, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=300
    )


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return started(sys.executable, *arguments, cwd=cwd, **environment)


def checked(run: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run


def copy_of_the_source(folder: Path) -> Path:
    """The files that git knows or would add, as a fresh checkout has them."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if not name.startswith(("tests/", "benchmarks/")) and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, output: Path, **environment: str) -> Path:
    """The wheel that pip builds without nvcc."""
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    options = ("--disable-pip-version-check", "-w", str(output), ".")
    checked(python(*command, *options, cwd=source, MR1_FAST_CUDA="0", **environment))
    (wheel,) = output.glob("*.whl")
    return wheel


def build_sdist(source: Path, output: Path) -> Path:
    """The sdist that setuptools builds."""
    output.mkdir()
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    checked(python("-c", build, str(output), cwd=source))
    (sdist,) = output.glob("*.tar.gz")
    return sdist


def unpacked(archive: Path) -> Path:
    """The folder of what a wheel or an sdist holds."""
    folder = archive.parent / f"unpacked {archive.suffix}"
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
        return folder
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


def empty_environment(folder: Path) -> Path:
    """The python of an environment without mr1_fast, which borrows ours for what it needs."""
    venv.create(folder, symlinks=True)
    purelib = Path(sysconfig.get_path("purelib", "venv", {"base": folder}))
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # Its .pth files, one of which may be that of an editable mr1_fast, are not read from there.
    (purelib / "borrowed.pth").write_text("\n".join(ours))
    return folder / "bin" / "python"


def libraries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.so")}


def contents(folder: Path) -> set[str]:
    """The files of the package, without libraries."""
    files = (path for path in (folder / "mr1_fast").rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files if path.suffix != ".so"}


class Ran(NamedTuple):
    """What a process printed."""

    status: str
    """Of the native kernels."""
    further: str
    """What the code behind the loss printed."""
    errors: str


def run_loss(folder: Path, cwd: Path, program: Path | None = None, further: str = "") -> Ran:
    """Run a loss, and then `further`, with the package that is installed below `folder`.

    program: the python of its environment; None: ours, which finds the package in `folder` itself.
    """
    path = {} if program else {"PYTHONPATH": str(folder)}
    run = checked(started(program or sys.executable, "-c", LOSS + further, cwd=cwd, **path))
    path, status, loss, *lines = run.stdout.splitlines()
    assert Path(path).is_relative_to(folder), "another installation of mr1_fast was imported"
    assert float(loss) == pytest.approx(-3)
    return Ran(status, "\n".join(lines), run.stderr)


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory) -> str:
    """A PATH without any program."""
    return str(tmp_path_factory.mktemp("empty"))


@pytest.fixture
def quick_compiler(tmp_path) -> str:
    """The compiler without optimisation, which takes four fifths of a build's time."""
    program = tmp_path / "compiler"
    program.write_text(f'#!/bin/sh\nexec {COMPILER} "$@" -O0\n')
    program.chmod(0o755)
    return str(program)


@needs_compiler
@pytest.mark.slow
def test_an_sdist_gives_a_wheel_that_works_in_an_empty_environment(tmp_path, quick_compiler):
    """One build of the kernels serves all of it; the other tests run optimised ones."""
    source = copy_of_the_source(tmp_path / "source")
    sdist = build_sdist(source, tmp_path / "dist")
    folder = unpacked(sdist)
    for path in (*source.glob("csrc/*"), *map(source.joinpath, ("setup.py", "LICENSE"))):
        assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert contents(folder) == contents(source) and libraries(folder) == set()

    wheel = build_wheel(folder, tmp_path / "dist", CXX=quick_compiler)
    assert wheel.name == f"mr1_fast-{__version__}-py3-none-{PLATFORM}.whl"
    assert libraries(unpacked(wheel)) == {"mr1_fast/_cpu.so"}
    assert contents(unpacked(wheel)) == contents(source)
    checked(python("-m", "twine", "check", "--strict", str(sdist), str(wheel), cwd=tmp_path))

    environment = empty_environment(tmp_path / "environment")
    install = ("-m", "pip", "--python", str(environment), "install", "--no-deps", "--no-index")
    checked(python(*install, "--disable-pip-version-check", str(wheel), cwd=tmp_path))
    usage = checked(started(environment.parent / "mr1", "--help", cwd=tmp_path)).stdout
    assert usage.startswith("usage: mr1 COMMAND")
    report = checked(started(environment, "-m", "mr1_fast.env", cwd=tmp_path)).stdout
    assert re.search(rf"^mr1_fast +{__version__}$", report, re.MULTILINE)
    assert re.search(r"^native CPU kernels +(avx|neon|scalar)", report, re.MULTILINE)

    # Away from the source, so that it cannot be imported.
    shutil.copytree(ROOT / "tests", tmp_path / "away" / "tests")
    files = ["tests/loss/test_loss.py", "tests/kernels/decode/test_attention_native.py"]
    check = (
        "import pytest, sys; from mr1_fast.kernels.self_test import self_test; "
        f"self_test(torch.device('cpu')); sys.exit(pytest.main({files}))"
    )
    run = run_loss(environment.parents[1], tmp_path / "away", environment, further=check)
    assert re.match(r"(avx512bf16|avx512|avx2|neon|scalar)\b", run.status)
    assert "mr1_fast" not in run.errors and " passed" in run.further


def test_without_a_compiler_the_wheel_falls_back_and_says_so_once(tmp_path, no_compiler):
    source = copy_of_the_source(tmp_path / "source")
    folder = unpacked(build_wheel(source, tmp_path / "wheels", PATH=no_compiler))
    assert libraries(folder) == set()
    assert contents(folder) == contents(source)
    run = run_loss(folder, tmp_path)
    assert run.status.startswith("not built")
    assert run.errors.count("mr1_fast's native CPU kernels are not built") == 1
    report = checked(python("-m", "mr1_fast.env", cwd=tmp_path, PYTHONPATH=str(folder))).stdout
    for name in ("native CPU kernels", "native CUDA kernels"):
        assert re.search(rf"^{name}\s+not built", report, re.MULTILINE)


def test_what_an_earlier_build_left_does_not_get_into_a_wheel(tmp_path, no_compiler):
    source = copy_of_the_source(tmp_path / "source")
    version = f"{sys.implementation.name}-{sys.version_info.major}{sys.version_info.minor}"
    tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for build in (f"lib.{tag}", f"lib.{sysconfig.get_platform()}-{version}", "lib"):
        (source / "build" / build / "mr1_fast").mkdir(parents=True, exist_ok=True)
        for name in ("_cuda.so", "_cpu.so"):
            (source / "build" / build / "mr1_fast" / name).write_bytes(b"stale")
    for name in ("_cuda.so", "_cpu.so"):  # of an editable installation
        (source / "mr1_fast" / name).write_bytes(b"stale")
    folder = unpacked(build_wheel(source, tmp_path / "wheels", PATH=no_compiler))
    assert (folder / "mr1_fast" / "loss" / "__init__.py").exists()
    assert libraries(folder) == set()


def test_an_inplace_build_leaves_no_library_of_an_earlier_one(tmp_path, no_compiler):
    source = copy_of_the_source(tmp_path / "source")
    build = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    stale = source / "build" / build / "mr1_fast"
    stale.mkdir(parents=True)
    for folder in (stale, source / "mr1_fast"):
        (folder / "_cuda.so").write_bytes(b"stale")
    build = ("setup.py", "build_ext", "--inplace")
    checked(python(*build, cwd=source, MR1_FAST_CUDA="0", PATH=no_compiler))
    assert libraries(source / "mr1_fast") == set()


@needs_compiler
def test_a_compiler_that_fails_is_reported_and_leaves_no_library(tmp_path):
    source = copy_of_the_source(tmp_path / "source")
    (source / "csrc" / "row_kernels.cpp").write_text("#error broken on purpose\n")
    command = ("setup.py", "build_ext", "--build-lib", str(tmp_path / "built"))
    run = checked(python(*command, cwd=source, MR1_FAST_CUDA="0"))
    assert "broken on purpose" in run.stdout + run.stderr
    assert libraries(tmp_path / "built") == set()


def setup_module_of(source: Path):
    spec = importlib.util.spec_from_file_location("mr1_fast_setup", source / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_instructions(library: Path) -> None:
    """Assert that each kernel copies in bulk, exchanges in shared memory, and writes 128 bits.

    Read with triton's cuobjdump, if triton is installed: nvcc need not have one.
    """
    triton = importlib.util.find_spec("triton")
    cuobjdump = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    if not cuobjdump or not cuobjdump.exists():
        return
    run = checked(
        subprocess.run([cuobjdump, "-sass", library], capture_output=True, text=True, timeout=60)
    )
    kernels = run.stdout.split("Function :")[1:]
    assert len(kernels) == 9
    for kernel in kernels:
        for instruction in ("UBLKCP", "STAS.128", "SYNCS.PHASECHK", "LDS.128", "STG.E.EF.128"):
            assert instruction in kernel, instruction
        # Two exponentials a logit, in loops over two packs of 16 bytes, and a few a row.
        assert 16 <= kernel.count("MUFU.EX2") < 64
        assert "LDL" not in kernel and "STL" not in kernel


@needs_nvcc
@pytest.mark.slow
def test_cuda_kernels_of_every_architecture_spill_nothing_and_load_without_a_driver(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MR1_FAST_CUDA", raising=False)
    monkeypatch.chdir(ROOT)
    setup = setup_module_of(ROOT)
    output = tmp_path / "_cuda.so"
    report = setup.compile_cuda(str(output), tmp_path)
    entry = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    entries = re.findall(entry, report, re.DOTALL)
    assert len(entries) == report.count("Compiling entry function")
    by_architecture = {}
    for function, architecture, *spilled in entries:
        assert spilled == ["0", "0"], f"{function} on sm_{architecture}"
        by_architecture.setdefault(int(architecture), set()).add(function)
    assert set(by_architecture) == set(setup.CUDA_ARCHITECTURES)
    for functions in by_architecture.values():
        assert len(functions) == 3 and all("cluster_kernel" in name for name in functions)
    assert_instructions(output)
    load = (
        "import ctypes, sys; choose = ctypes.CDLL(sys.argv[1]).mr1_cuda_grpo_blocks; "
        "sizes = ctypes.c_int64(4096), ctypes.c_int64(0); "
        "print(choose(1, *sizes, ctypes.byref(ctypes.c_int())))"
    )
    error = int(checked(python("-c", load, str(output), cwd=tmp_path)).stdout)
    assert (error == 0) == torch.cuda.is_available()


LAUNCH = """
import math
from mr1_fast.kernels.grpo import rows_cuda
from mr1_fast.kernels.grpo.objective import RowResults
from tests.data.loss import loss_rows
from tests.data.native import objective
data = loss_rows(4, 64)
results = RowResults.empty(data["logits"])
try:
    rows_cuda.row_grpo(data["logits"], data["targets"], objective(data), results, None)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(not rows_cuda.LIBRARY.exists(), reason=rows_cuda.status()[1])
def test_a_launch_without_a_gpu_gives_one_clear_error():
    try:
        path = os.pathsep.join([str(Path(rows_cuda.__file__).parents[3]), str(ROOT)])
        inherited = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, "-c", LAUNCH]
        run = subprocess.run(
            command, env=inherited, cwd=ROOT, capture_output=True, text=True, timeout=20
        )
    except subprocess.TimeoutExpired:
        pytest.fail("the launch does not return")
    status = rows_cuda.status()[1]
    words = re.search(r"no GPU \((.*)\)", status)[1]
    assert run.returncode == 0 and len(run.stdout.splitlines()) == 1, run.stderr
    assert words in run.stdout
