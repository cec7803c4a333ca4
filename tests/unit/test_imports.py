"""Imports run in one direction, the client is thin, names are unique, and __all__ has every public name."""

import ast
import graphlib
import importlib.util
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import poolrpc
import poolrpc_server

FOLDERS = {package.__name__: Path(package.__file__).parent for package in (poolrpc, poolrpc_server)}
GENERATED = ("poolrpc.v1", "poolrpc_server.protocols.triton.generated")

# The folders and modules of the server, from the command inwards: a module imports only modules of later rows.
TIERS = (
    {"__main__"},
    {"cli"},
    {"workers"},
    {"embedding"},
    {"app"},
    {"transports"},
    {"service"},
    {"protocols"},
    {"calls"},
    {"compute"},
    {"process", "reloading_file"},
    {"telemetry"},
    {"config_sources"},
    {"config", "sockets"},
    {"log_format", "presets", "resources", "signals", "standard_streams"},
)
DEPTH = {module: depth for depth, tier in enumerate(TIERS) for module in tier}
MAY_IMPORT_GRPC = {"cli", "workers", "app", "transports"}
MAY_IMPORT_CONFIG = {"cli", "workers", "embedding", "app", "service", "transports.ray"}
# What importing a module of the client may import in addition to Python's standard library.
THIN = {"grpc", "google", "numpy", "poolrpc"}
# The modules of the client that are imported only by those who have another package, which they may import.
INTEGRATIONS = {"poolrpc.torch": {"torch"}}


def name_of(path, package):
    """Return the full name of a module from its file."""
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


def sources():
    """Return the file of every module of both packages, without generated ones, by the module's full name."""
    return {
        name_of(path, package): path
        for package, folder in FOLDERS.items()
        for path in sorted(folder.rglob("*.py"))
        if not name_of(path, package).startswith(GENERATED)
    }


SOURCES = sources()


def imported(node, module, path):
    """Return the full names of the modules that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    base = importlib.util.resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
    # `from poolrpc import chains` imports a module, `from poolrpc import MaxPool2d` a name of one.
    return [f"{base}.{alias.name}" if is_module(f"{base}.{alias.name}") else base for alias in node.names]


def is_module(name):
    """Return whether a name is that of a module of these packages."""
    return name in SOURCES or name in GENERATED or name.startswith(tuple(f"{package}." for package in GENERATED))


def imports(module, *, when_imported=False):
    """Return the full names of what a module imports: anywhere in it, or only when it is imported."""
    path = SOURCES[module]
    tree = ast.parse(path.read_text())
    skipped = set()
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if when_imported and (lazy or checking):
            skipped.update(map(id, ast.walk(node)))
    return {
        name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in skipped
        for name in imported(node, module, path)
    }


def part_of(module):
    """Return the folder or top-level module that a server module belongs to; empty for the package itself."""
    return module.removeprefix("poolrpc_server").removeprefix(".").partition(".")[0]


CLIENT = [name for name in SOURCES if name.partition(".")[0] == "poolrpc"]
SERVER = [name for name in SOURCES if name.partition(".")[0] == "poolrpc_server"]


def test_the_walk_sees_imports():
    """Every kind of import is found: of a module, of a name, relative, in a function, and for types."""
    assert {"poolrpc._wire.codec", "poolrpc.v1.pool_pb2", "poolrpc_server.calls.dispatch"} <= imports(
        "poolrpc_server.protocols.native"
    )
    assert "grpc" in imports("poolrpc_server.transports.grpc.server")
    assert "ml_dtypes" in imports("poolrpc.tensors")
    assert "ml_dtypes" not in imports("poolrpc.tensors", when_imported=True)
    assert "poolrpc.layers" in imports("poolrpc.command.explain")
    assert "poolrpc.layers" not in imports("poolrpc.command.explain", when_imported=True)
    assert len(CLIENT) > 10
    assert len(SERVER) > 10


@pytest.mark.parametrize("module", CLIENT)
def test_the_client_imports_neither_torch_nor_the_server(module):
    """No module of the client imports torch (except poolrpc.torch) or the server, not even in a function."""
    forbidden = {"torch", "poolrpc_server"} - INTEGRATIONS.get(module, set())
    assert not {name for name in imports(module) if name.partition(".")[0] in forbidden}


@pytest.mark.parametrize("module", [*CLIENT, *SERVER])
def test_nothing_imports_an_integration(module):
    """poolrpc.torch is imported by users alone, not even in a function."""
    assert not imports(module) & set(INTEGRATIONS)


@pytest.mark.parametrize("module", CLIENT)
def test_the_client_needs_what_it_says_it_needs(module):
    """Importing the client imports only grpcio, protobuf, NumPy and Python's standard library."""
    roots = {name.partition(".")[0] for name in imports(module, when_imported=True)}
    assert roots - THIN - INTEGRATIONS.get(module, set()) - set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("module", SERVER)
def test_the_servers_imports_run_inwards(module):
    """A module of the server imports only server modules of later rows of TIERS."""
    own = part_of(module)
    if not own:  # the package names what it offers, to be imported on first use
        return
    assert own in DEPTH, f"{module} is missing from TIERS"
    for name in imports(module):
        other = part_of(name) if name.startswith("poolrpc_server.") else own
        if other != own:
            assert DEPTH[other] > DEPTH[own], f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in SERVER if part_of(name) and part_of(name) not in MAY_IMPORT_GRPC])
def test_nothing_below_the_transports_imports_grpc(module):
    """Nothing below the transports imports grpc, its health or its reflection; only protocols import protobuf."""
    names = imports(module)
    assert not {name for name in names if name.partition(".")[0] in ("grpc", "grpc_health", "grpc_reflection")}
    protobuf = {name for name in names if name.partition(".")[0] == "google" or name.startswith(GENERATED)}
    assert part_of(module) == "protocols" or not protobuf


@pytest.mark.parametrize("module", [name for name in SERVER if part_of(name) != "compute"])
def test_only_compute_imports_torch(module):
    """No module of the server outside compute/ imports torch, not even in a function."""
    assert not {name for name in imports(module) if name.partition(".")[0] == "torch"}


@pytest.mark.parametrize(
    "module", [name for name in SERVER if part_of(name) and part_of(name) not in MAY_IMPORT_CONFIG]
)
def test_only_what_builds_a_server_sees_the_config(module):
    """Only the command, the workers, the app, the service and the Ray transport import Config."""
    short = module.removeprefix("poolrpc_server.")
    assert short in {"config", "config_sources", *MAY_IMPORT_CONFIG} or "poolrpc_server.config" not in imports(module)


def constants(module):
    """Return the source of the value of each upper-case name that a module assigns, without type variables."""
    assigned = {}
    for node in ast.parse(SOURCES[module].read_text()).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            pairs = (
                zip(target.elts, node.value.elts, strict=True)
                if isinstance(target, ast.Tuple)
                else [(target, node.value)]
            )
            for name, value in pairs:
                source = ast.unparse(value)
                if isinstance(name, ast.Name) and name.id.isupper() and not source.startswith("TypeVar("):
                    assigned[name.id.lstrip("_")] = source
    return assigned


def test_the_scan_sees_constants():
    """Annotated constants, private ones and those assigned in pairs are found; type variables are not."""
    assert constants("poolrpc.layers")["LAYERS"].startswith("{")
    assert constants("poolrpc._transport.channel")["MAX_BACKOFF"] == "2.0"
    assert constants("poolrpc._transport.arena_socket")["RESPONSE_BYTES"] == "8192"
    assert "T" not in constants("poolrpc.client")


@pytest.mark.parametrize("modules", [CLIENT, SERVER], ids=["client", "server"])
def test_a_constant_has_one_value_in_a_package(modules):
    """Two modules of a package do not have constants of the same name with different values."""
    found = {}
    for module in modules:
        for name, value in constants(module).items():
            found.setdefault(name, {}).setdefault(value, module)
    assert {name: values for name, values in found.items() if len(values) > 1} == {}


@pytest.mark.parametrize("modules", [CLIENT, SERVER], ids=["client", "server"])
def test_a_class_name_has_one_class_in_a_package(modules):
    """Two modules of a package do not define classes of the same name, not even private ones."""
    found = {}
    for module in modules:
        for node in ast.parse(SOURCES[module].read_text()).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name.lstrip("_"), []).append(module)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_no_imports_go_in_a_circle():
    """The modules of both packages have no import cycle."""
    graph = {module: {name for name in imports(module, when_imported=True) if name in SOURCES} for module in SOURCES}
    # Importing a module imports its package first, which is not a dependency of the module.
    packages = set(FOLDERS)
    order = graphlib.TopologicalSorter({module: names - packages for module, names in graph.items()}).static_order()
    assert set(order) >= set(SOURCES) - packages


@pytest.mark.parametrize(
    ("program", "left_out"),
    [
        ("import poolrpc", ["torch", "poolrpc_server", "PIL", "ml_dtypes", "argparse"]),
        ("import poolrpc.cli", ["torch", "poolrpc_server", "PIL", "ml_dtypes"]),
        (
            "import poolrpc; poolrpc.MaxPool2d(2).output_shape((1, 1, 4, 4)); poolrpc.parse_layer('AvgPool2d(2)')",
            ["torch"],
        ),
        ("import poolrpc_server; poolrpc_server.Config()", ["torch"]),
    ],
)
def test_an_import_leaves_out_what_it_does_not_need(program, left_out):
    """In a new interpreter the client imports neither torch nor what only images, bfloat16 or the command need."""
    check = f"{program}\nimport sys\nprint(*({left_out!r} & sys.modules.keys()))".replace(
        repr(left_out), repr(set(left_out))
    )
    ended = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)  # noqa: S603 - ours
    assert (ended.returncode, ended.stderr, ended.stdout.split()) == (0, "", [])


def order(name):
    """Return the sort key of a name in __all__ by ruff's rule: constants, then classes, then the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_all_is_what_is_public():
    """The client's __all__ has every name that it exports, and __version__, in ruff's order; dir() has them too."""
    public = {name for name in vars(import_module("poolrpc._exports")) if not name.startswith("_")}
    assert set(poolrpc.__all__) == public | {"__version__"}
    assert set(dir(poolrpc)) > set(poolrpc.__all__)
    assert poolrpc.__all__ == sorted(set(poolrpc.__all__), key=order)


def test_the_server_offers_what_it_says():
    """Every name of the server's __all__ can be imported, is in order, and no other name can."""
    assert poolrpc_server.__all__ == sorted(set(poolrpc_server.__all__), key=order)
    assert [getattr(poolrpc_server, name).__name__ for name in poolrpc_server.__all__] == poolrpc_server.__all__
    with pytest.raises(AttributeError, match="nothing"):
        poolrpc_server.nothing  # noqa: B018 - the access is the point
