"""The laws of the house: who may import whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MLX_ROOMS = {
    "osaurus_grpc.engine.worker",
    "osaurus_grpc.engine.batch",
    # The parts of a batch: prompts, rows that decode, their caches, the model's output head.
    "osaurus_grpc.engine.prefill",
    "osaurus_grpc.engine.decoding",
    "osaurus_grpc.engine.layers",
    "osaurus_grpc.engine.ragged_cache",
    "osaurus_grpc.engine.head",
    "osaurus_grpc.engine.sampling",
    "osaurus_grpc.engine.logprobs",  # reads figures off the logits
    "osaurus_grpc.engine.penalties",  # changes logits
    "osaurus_grpc.engine.prompt_cache",
    "osaurus_grpc.engine.prefix_records",  # says what arrays its records hold
    "osaurus_grpc.engine.footprint",  # reads shapes off the model's own caches
    "osaurus_grpc.engine.persistence",  # evaluates what was read
    "osaurus_grpc.engine.prefix_forms",  # turns records into bytes and back
    "osaurus_grpc.engine.cache_layout",  # takes rows out of mlx-lm's caches and puts them back
    "osaurus_grpc.engine.drafting",  # runs a draft model
    "osaurus_grpc.engine.kv_piece",  # cuts, joins and quantizes what was taken out
    "osaurus_grpc.models.loading",
    "osaurus_grpc.models.encoder",
    "osaurus_grpc.models.cpu_kernels",
    "osaurus_grpc.models.short_weights",
    "osaurus_grpc.models.embedding",
    "osaurus_grpc.models.platform",
    "osaurus_grpc.models.vision.image_model",  # is a model
    "osaurus_grpc.models.vision.image_prompt",  # puts images' embeddings between those of tokens
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("osaurus_grpc", "rest_shim"):
        for path in (ROOT / package).rglob("*.py"):
            if "v1" in path.parts:
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Names a module imports; without lazy, only those at its top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if lazy else iter(tree.body)
    for node in nodes:
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=0) if module:
                # "from package import module" needs the module, not what the package's __init__ holds.
                whole = [f"{module}.{name.name}" for name in names]
                yield from (name for name in whole if name in MODULES or name.endswith(".mx"))
                if not all(name in MODULES for name in whole):
                    yield module


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("name", [n for n in MODULES if is_in(n, "rest_shim")])
def test_the_shim_knows_only_the_contract(name):
    for imported in imports(MODULES[name]):
        if is_in(imported, "osaurus_grpc"):
            assert imported == "osaurus_grpc" or is_in(imported, "osaurus_grpc.v1"), imported


@pytest.mark.parametrize(
    "name", [n for n in MODULES if is_in(n, *(f"osaurus_grpc.{r}" for r in ("engine", "chat", "models")))]
)
def test_inner_rooms_know_no_transport(name):
    for imported in imports(MODULES[name]):
        assert not is_in(imported, "grpc", "google", "aiohttp", "osaurus_grpc.v1", "osaurus_grpc.server"), (
            imported
        )
        if is_in(name, "osaurus_grpc.engine"):
            assert not is_in(imported, "osaurus_grpc.chat"), imported
        if is_in(name, "osaurus_grpc.chat"):
            assert not is_in(imported, "osaurus_grpc.engine"), imported


@pytest.mark.parametrize("name", MODULES)
def test_mlx_stays_in_its_rooms(name):
    allowed = name in MLX_ROOMS or is_in(name, "osaurus_grpc.models.sources")
    for imported in imports(MODULES[name]):
        if is_in(imported, "mlx", "mlx_lm", "mlx_vlm", "osaurus_grpc.models.platform.mx"):
            assert allowed, imported
        if is_in(imported, "mlx.core"):
            assert name == "osaurus_grpc.models.platform", "the BLAS is loaded there, before MLX"


@pytest.mark.parametrize("name", MODULES)
def test_the_blas_is_loaded_before_mlx(name):
    """A module that imports MLX or mlx-lm at its top imports platform before."""
    if name == "osaurus_grpc.models.platform":
        return
    for imported in imports(MODULES[name], lazy=False):
        if is_in(imported, "osaurus_grpc.models.platform"):
            return
        assert not is_in(imported, "mlx", "mlx_lm", "mlx_vlm"), imported


@pytest.mark.parametrize(
    "entry", ["osaurus_grpc.server.app", "osaurus_grpc.engine.batch", "osaurus_grpc.__main__"]
)
def test_every_way_in_finds_the_blas(entry):
    code = f"import {entry}; from osaurus_grpc.models.platform import blas; print(blas.reason)"
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert "imported before" not in said


def test_the_core_starts_without_what_only_images_need():
    code = (
        "import sys, osaurus_grpc.server.app, osaurus_grpc.models.loading, rest_shim.app; "
        "print('mlx_vlm' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.strip() == "False"


def test_there_are_no_circles():
    graph = {
        name: {i for i in imports(path, lazy=False) if i in MODULES and i != name}
        for name, path in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " → ".join([*trail, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_modules_are_named_for_what_they_are():
    banned = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    for name in MODULES:
        assert not banned & set(name.split(".")), name


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_small(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 600


def test_generated_code_is_fresh():
    pytest.importorskip("grpc_tools", reason="the generator is installed by the extra 'dev'")
    subprocess.run([sys.executable, str(ROOT / "protos" / "generate.py"), "--check"], check=True, timeout=120)
