"""The house of the design: who imports whom, one name per stage, and what stands nowhere."""

import ast
import functools
import hashlib
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hemera
from hemera.config import STAGES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hemera"
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in MODULES]

PURE = ("geometry", "displacement", "pixels", "masks", "certificate", "metrics", "contours")
PURE_MAY = {"numpy", "scipy", "cv2", "skimage", "hemera.errors", *(f"hemera.{m}" for m in PURE)}
MODELS_MAY = {
    "torch",
    "torchvision",
    "segmentation_models_pytorch",
    "hemera.errors",
    "hemera.models",
}
LOWER = (
    "slides", "shards", "tables", "files", "sheet", "config", "errors", "splits", "annotations",
    "warping", "pyramid", "labels",
)  # fmt: skip
ONLY_IN = {
    "deeperhistreg": ("engines/",),
    "deepliif": ("engines/",),
    "openslide": ("slides",),
    "tiffslide": ("slides",),
    "snakemake": (),
}
HEAVY = ("torch", "torchvision", "pandas", "cv2", "scipy", "skimage", "deeperhistreg", "matplotlib")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path, *, top_only: bool = False) -> set[str]:
    """Full names of what a module imports, `from a import b` as a.b where that is a module."""
    found: set[str] = set()
    nodes: Iterator[ast.AST] = running_at_import(tree(path)) if top_only else ast.walk(tree(path))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: import by its full name"
            assert node.module is not None
            for alias in node.names:
                below = ROOT.joinpath(*node.module.split("."), alias.name)
                is_module = below.with_suffix(".py").is_file() or below.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def running_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What is executed when a module is imported: not the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_typing:
            continue
        yield child
        yield from running_at_import(child)


def foreign(path: Path) -> set[str]:
    """What a module imports beside the standard library."""
    return {name for name in imports(path) if name.split(".")[0] not in sys.stdlib_module_names}


def allowed(name: str, known: set[str]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in known)


def stages() -> list[Path]:
    return [path for path in MODULES if path.parent.name == "stages" and path.stem != "__init__"]


def where(name: str) -> Path:
    return PACKAGE / f"{name}.py"


# Layers


@pytest.mark.parametrize("name", [name for name in PURE if where(name).is_file()])
def test_pure_modules_know_arrays_alone(name: str) -> None:
    wrong = {found for found in foreign(where(name)) if not allowed(found, PURE_MAY)}
    assert not wrong
    touching = {"pathlib", "os", "shutil", "subprocess", "socket", "logging", "io", "tempfile"}
    assert not imports(where(name)) & touching, "arrays in, arrays out"


@pytest.mark.parametrize("path", sorted((PACKAGE / "models").glob("*.py")), ids=lambda p: p.stem)
def test_models_import_torch_alone(path: Path) -> None:
    wrong = {found for found in foreign(path) if not allowed(found, MODELS_MAY)}
    assert not wrong
    assert not imports(path) & {"pathlib", "os", "logging"}, "models know no I/O"
    text = path.read_text()
    assert "cuda" not in text, "a model does not choose its device"


@pytest.mark.parametrize("path", stages(), ids=lambda path: path.stem)
def test_stages_know_no_stage(path: Path) -> None:
    others = {f"hemera.stages.{name}" for name in STAGES}
    assert not imports(path) & (others | {"hemera.stages"})
    assert not {name for name in imports(path) if name.startswith("hemera.commands")}
    assert "hemera.__main__" not in imports(path)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_below_imports_stages_or_commands(name: str) -> None:
    if name.startswith(("stages/", "commands/")) or name == "__main__":
        return
    above = ("hemera.stages", "hemera.commands", "hemera.__main__")
    assert not {found for found in imports(where(name)) if found.startswith(above)}


@pytest.mark.parametrize("name", LOWER)
def test_files_and_tables_stand_below_engines_and_models(name: str) -> None:
    above = tuple(
        f"hemera.{room}" for room in ("engines", "models", "trained", "training", "demo", "pages")
    )
    assert not {found for found in imports(where(name)) if found.startswith(above)}
    if name in ("errors", "options", "config", "sheet"):
        assert not foreign(where(name)) - {"yaml", "hemera.errors", "hemera.options"}


@pytest.mark.parametrize("name", NAMES)
def test_foreign_projects_have_one_door(name: str) -> None:
    for found in foreign(where(name)):
        doors = ONLY_IN.get(found.split(".")[0])
        if doors is not None:
            assert name.startswith(doors) if doors else False, f"{name} imports {found}"


@pytest.mark.parametrize(
    "name", ["__init__", "__main__", "config", "sheet", "tables", "slides", "shards", "files"]
)
def test_light_modules_load_no_torch(name: str) -> None:
    heavy = {found.split(".")[0] for found in imports(where(name), top_only=True)}
    assert not heavy & {"torch", "torchvision", "deeperhistreg", "deepliif", "pandas", "matplotlib"}


@pytest.mark.parametrize("modules", ["hemera", "hemera.config, hemera.sheet", "hemera.__main__"])
def test_importing_the_light_modules_loads_nothing_heavy(modules: str) -> None:
    """Snakemake imports them each time it parses the workflow."""
    code = f"import sys, {modules}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & {*HEAVY, "numpy", "pyarrow", "openslide", "tqdm"}


def rules() -> list[Path]:
    return [ROOT / "Snakefile", *sorted((ROOT / "workflow").rglob("*.smk"))]


@pytest.mark.parametrize("path", rules(), ids=lambda path: path.stem)
def test_rules_import_config_and_sheet_alone(path: Path) -> None:
    for line in path.read_text().splitlines():
        match = re.match(r"\s*(?:from|import) +([\w.]+)", line)
        if match:
            assert match[1] in {
                "hemera",
                "hemera.config",
                "hemera.sheet",
                "pathlib",
                "pyarrow.parquet",
                "snakemake.exceptions",
                "snakemake.logging",
                "snakemake.utils",
            }, line
    text = path.read_text()
    assert not re.search(r"^\s+(run|script|notebook|wrapper):", text, re.MULTILINE)
    assert not re.search(r"^checkpoint ", text, re.MULTILINE)


# One name per stage


@pytest.mark.parametrize("stage", STAGES)
def test_one_name_per_stage(stage: str) -> None:
    rule = (ROOT / "workflow" / "rules" / f"{stage}.smk").read_text()
    assert re.findall(r"^rule (\w+):", rule, re.MULTILINE) == [stage]
    assert f'include: "workflow/rules/{stage}.smk"' in (ROOT / "Snakefile").read_text()
    outputs = re.search(r"^    output:\n((?:        .*\n)+)", rule, re.MULTILINE)
    assert outputs is not None
    paths = re.findall(r'"([^"]+)"', outputs[1])
    assert paths
    assert all(path.startswith(f"results/{stage}/") for path in paths), paths
    for path in re.findall(r'"(logs/[^"]+)"', rule):
        assert path.startswith(f"logs/{stage}/")
    assert (PACKAGE / "stages" / f"{stage}.py").is_file()
    assert (ROOT / "tests" / "stages" / f"test_{stage}.py").is_file()
    assert re.search(rf"^{stage}:", (ROOT / "config.yaml").read_text(), re.MULTILINE)
    run = re.search(r"^def run\(", (PACKAGE / "stages" / f"{stage}.py").read_text(), re.MULTILINE)
    assert run is not None


def test_no_stage_without_a_name() -> None:
    assert {path.stem for path in stages()} == set(STAGES)
    files = {path.stem for path in (ROOT / "workflow" / "rules").glob("*.smk")}
    assert files == {*STAGES, "common", "demo", "compare_generation"}


def test_the_snakefile_includes_in_the_order_of_the_graph() -> None:
    named = re.findall(r'include: "workflow/rules/(\w+)\.smk"', (ROOT / "Snakefile").read_text())
    assert named[:2] == ["common", "demo"]
    # A second rule of the stage train_generation, for each preset that is compared.
    assert named[-2] == "compare_generation"
    assert [name for name in named[2:] if name != "compare_generation"] == list(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_every_rule_says_what_it_needs(stage: str) -> None:
    rule = (ROOT / "workflow" / "rules" / f"{stage}.smk").read_text()
    for word in ("log:", "benchmark:", "threads:", "mem_mb=", "runtime=", "conda:"):
        assert word in rule, word
    assert "# REQUIRED INPUTS:" in rule
    assert "# OUTPUTS:" in rule


# What stands nowhere


@pytest.mark.parametrize("name", NAMES)
def test_voice(name: str) -> None:
    path = where(name)
    for node in ast.walk(tree(path)):
        place = f"{name}.py:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"{place}: print; use a logger"
        if isinstance(node, ast.ExceptHandler):
            caught = [] if node.type is None else [ast.unparse(node.type)]
            assert caught, f"{place}: a bare except"
            words = set(re.findall(r"\w+", caught[0]))
            assert not words & {"Exception", "BaseException"}, f"{place}: except {caught[0]}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            setting = (node.value.id, node.attr)
            assert setting != ("os", "getenv"), f"{place}: environment as configuration"
            # An engine is a foreign project: its process gets an environment, HEMERA reads none.
            # cuBLAS, which training sets, is another.
            foreign_project = name.startswith("engines/") or name == "training"
            assert setting != ("os", "environ") or foreign_project, f"{place}: environment"
            if name != "__main__":
                assert setting != ("logging", "basicConfig"), f"{place}: only __main__ logs"
    text = path.read_text()
    assert not re.search(r"os\.environ(\.get\(|\[[^]]*\](?! =[^=]))", text), "reads the environment"
    for word in ("TODO", "FIXME", "XXX", "type: ignore", "raise NotImplementedError"):
        assert word not in text, f"{name}.py: {word}"
    assert path.stem not in ("utils", "helpers", "misc", "common")


@pytest.mark.parametrize("name", NAMES)
def test_public_things_have_a_docstring(name: str) -> None:
    path = where(name)
    assert ast.get_docstring(tree(path)), f"{name}.py"

    def check(node: ast.Module | ast.ClassDef, prefix: str) -> None:
        for child in node.body:
            if not isinstance(child, ast.FunctionDef | ast.ClassDef) or child.name[0] == "_":
                continue
            assert ast.get_docstring(child), f"{prefix}{child.name}"
            if isinstance(child, ast.ClassDef):
                check(child, f"{prefix}{child.name}.")

    check(tree(path), f"{name}.")


def test_every_error_is_a_hemera_error() -> None:
    from hemera import errors

    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert all(issubclass(value, errors.HemeraError) for value in classes.values())
    drawn = errors.__doc__ or ""
    assert all(name in drawn for name in classes), "the tree in the docstring names each"


def test_the_public_list() -> None:
    import types

    public = {
        name
        for name, value in vars(hemera).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert {*public, "__version__"} == set(hemera.__all__)
    assert list(hemera.__all__) == sorted(hemera.__all__)
    assert hemera.__version__ == project()["project"]["version"]


def tracked() -> list[Path]:
    """Files that the repository holds, as text."""
    done = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("no git repository here")
    paths = [ROOT / name for name in done.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_file_names_a_registry_or_a_machine() -> None:
    hosts = ("pypi" + ".org", "pythonhosted" + ".org", "conda.anaconda" + ".org", "ghcr" + ".io")
    folders = [re.compile(rf"(?<![\w./-])/{name}/\w") for name in ("home", "root", "work", "Users")]
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}: {host}" for host in hosts if host in text]
        found += [f"{path.name}: {m[0]}" for folder in folders for m in [folder.search(text)] if m]
    assert not found


# The environment


def project() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> dict[str, list[str]]:
    """Hashes of every package of requirements.lock, by name."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        match = re.match(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", line)
        if match:
            current = found.setdefault(plain(match[1]), [])
        current += re.findall(r"--hash=(sha256:[0-9a-f]{64})", line)
    return found


def test_the_lock_holds_every_dependency_with_hashes() -> None:
    settings = project()["project"]
    extras = settings["optional-dependencies"]
    assert isinstance(extras, dict)
    wanted = [*settings["dependencies"], *(name for group in extras.values() for name in group)]
    names = {plain(re.split(r"[\[<>=!~; ]", name, maxsplit=1)[0]) for name in wanted}
    found = locked()
    assert names <= set(found), f"run `make lock`: {sorted(names - set(found))}"
    assert not [name for name, hashes in found.items() if not hashes]
    assert not (ROOT / "uv.lock").exists()


def test_the_lock_leaves_out_what_is_excluded() -> None:
    settings = project()["tool"]["uv"]
    assert isinstance(settings, dict)
    assert not {plain(name) for name in settings["exclude-dependencies"]} & set(locked())


def test_the_conda_environment_is_built_from_the_lock() -> None:
    script = (ROOT / "envs" / "hemera.post-deploy.sh").read_text()
    digest = hashlib.sha256((ROOT / "requirements.lock").read_bytes()).hexdigest()
    assert re.findall(r"^LOCK_SHA256=(\w+)$", script, re.MULTILINE) == [digest], (
        "envs/hemera.post-deploy.sh is of another requirements.lock; run `make lock`"
    )
    assert "--require-hashes -r requirements.lock" in script
    assert "python =3.11" in (ROOT / "envs" / "hemera.yaml").read_text()


def test_the_package_ships_what_it_reads() -> None:
    """Presets and templates are files beside the code: an installed HEMERA needs them too."""
    settings = project()["tool"]["setuptools"]
    assert isinstance(settings, dict)
    patterns = settings["package-data"]["hemera"]
    shipped = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    data = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and path.name[0] != "."
    }
    assert data <= shipped, sorted(path.name for path in data - shipped)


def test_tests_mirror_the_package() -> None:
    """Each module has its tests under the same name, or its package has tests of its own."""
    lacking = []
    for path, name in zip(MODULES, NAMES, strict=True):
        if path.stem == "__init__":
            continue
        if path.stem == "__main__":
            name = "main"
        own = ROOT / "tests" / Path(name).with_name(f"test_{Path(name).name}.py")
        package = ROOT / "tests" / f"test_{Path(name).parts[0]}.py"
        if not own.is_file() and not package.is_file():
            lacking.append(name)
    assert not set(lacking) - {"errors"}
