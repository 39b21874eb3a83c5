"""docker/compose.yaml against Compose's own rules, our command line and our metrics."""

import base64
import json
from pathlib import Path
from typing import Any

import compose_spec
import promql_parser
import pytest
import yaml
from starlette.testclient import TestClient

from server.app import create_app
from server.metrics import HELP
from server.settings import Settings
from server.testing import FakeEngine
from tests.docker.deployment import DOCKER, filled, vlp
from vlp.testing import picture

GIVEN = {"VLP_QDRANT_API_KEY": "secret"}
OURS = ("shard", "train", "serve")
MONITORING = DOCKER / "monitoring"


@pytest.fixture(scope="module")
def text() -> str:
    return filled((DOCKER / "compose.yaml").read_text(), GIVEN)


@pytest.fixture(scope="module")
def services(text: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)["services"]
    return found


def test_compose_takes_the_file_and_would_not_take_another(text: str) -> None:
    merged = yaml.safe_dump(yaml.safe_load(text))  # `<<` is YAML's, and its parser leaves it standing
    compose_spec.PyCompose.from_yaml(merged).validate()
    with pytest.raises(ValueError, match="volums"):
        compose_spec.PyCompose.from_yaml(merged.replace("    volumes:", "    volums:", 1))


def test_the_secret_without_a_default_is_asked_for() -> None:
    with pytest.raises(KeyError, match="VLP_QDRANT_API_KEY"):
        filled((DOCKER / "compose.yaml").read_text(), {})


def test_every_name_is_defined_and_used(text: str, services: dict[str, dict[str, Any]]) -> None:
    """The parser above does not look whether volumes and other services are there."""
    whole = yaml.safe_load(text)
    mounts = [volume.split(":")[0] for service in services.values() for volume in service.get("volumes", [])]
    assert {name for name in mounts if name[0] not in "./"} == set(whole["volumes"])
    assert {name for service in services.values() for name in service.get("secrets", [])} == set(whole["secrets"])
    waited = {name for service in services.values() for name in service.get("depends_on", [])}
    assert waited <= services.keys()
    files = {path for path in mounts if path.startswith("./monitoring")}
    assert files
    assert [path for path in files if not (DOCKER / path).exists()] == []


def test_commands_are_ours(services: dict[str, dict[str, Any]]) -> None:
    """Where one writes, the next reads."""
    shard, train, serve = (vlp([str(word) for word in services[name]["command"]]) for name in OURS)
    assert (shard["command"], train["command"], serve["command"]) == ("shard write", "train", "serve")
    assert shard["out"] == "/data/shards"
    assert f"data.train={shard['out']}" in train["overrides"]
    assert train["resume"]
    assert serve["bundles"] == (str(train["run_dir"]),)
    assert serve["qdrant"] == "http://qdrant:6333"
    assert str(serve["key_file"]) == "/run/secrets/keys"


@pytest.mark.parametrize("name", ["shard", "train", "serve", "qdrant", "prometheus", "grafana"])
def test_services_are_tight(services: dict[str, dict[str, Any]], name: str) -> None:
    service = services[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > 0
    assert "mem_limit" in service
    assert all("noexec" in place for place in service["tmpfs"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert name not in OURS or service["build"]["target"] == name
    assert name in OURS or service["image"].rpartition(":")[2] not in ("", "latest")


# -- what is watched ---------------------------------------------------------------------------------------------------


def queries() -> list[str]:
    """All expressions of the dashboard, of the alerts, and of the autoscaler's adapter."""
    board = json.loads((MONITORING / "vlp.json").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    alerts = yaml.safe_load((MONITORING / "alerts.yml").read_text())
    found += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    (rule,) = yaml.safe_load((DOCKER / "k8s/prometheus-adapter-values.yaml").read_text())["rules"]["custom"]
    return [*found, rule["seriesQuery"]]


class Names(dict[str, set[str]]):
    """Metric -> labels that a query asks for; read off the parsed query."""

    def read(self, query: str) -> None:
        """Raises ValueError for what is not PromQL."""
        grouped: list[str] = []
        asked: list[str] = []

        def visit(node: Any) -> None:
            if isinstance(node, promql_parser.VectorSelector):
                assert node.name, f"a selector without a metric: {query}"
                labels = {matcher.name for matcher in node.matchers.matchers}
                self.setdefault(node.name, set()).update(labels)
                asked.append(node.name)
            for part in ("lhs", "rhs", "expr", "vector_selector"):
                if hasattr(node, part):
                    visit(getattr(node, part))
            for argument in getattr(node, "args", None) or ():
                visit(argument)
            if isinstance(node, promql_parser.AggregateExpr) and node.modifier:
                grouped.extend(node.modifier.labels)

        visit(promql_parser.parse(query.replace("$__rate_interval", "5m")))
        for name in asked:
            self[name].update(grouped)


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """Metric -> labels in the text of a server that has answered and refused."""
    picture_url = f"data:image/jpeg;base64,{base64.b64encode(picture()).decode()}"
    with TestClient(create_app(Settings(), FakeEngine()), base_url="http://127.0.0.1") as client:
        inputs: tuple[str | list[str], ...] = ("words", picture_url, [])
        for given in inputs:
            client.post("/v1/embeddings", json={"input": given})
        text = client.get("/metrics").text
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels = {pair.partition("=")[0] for pair in rest.partition("}")[0].split(",") if "=" in pair}
            found.setdefault(name.split(" ")[0], set()).update(labels)
    return found


ADDED = {"up": {"job"}, "vlp_items_waiting": {"namespace", "pod"}}
"""What Prometheus itself adds when it scrapes."""


def test_queries_ask_for_what_a_server_exports(exported: dict[str, set[str]]) -> None:
    """Every metric, with the labels it is filtered or grouped by, stands in the text of a server that has been used."""
    wanted = Names()
    for query in queries():
        wanted.read(query)
    assert len(wanted) > 12
    unused = {"vlp_guard_pictures_total": {"model", "flagged"}, "vlp_model_reloads_total": {"model"}}
    known = {**exported, **unused}  # what this server had no occasion to count, as the code writes it
    for name, labels in wanted.items():
        assert name == "up" or name.rpartition("_")[0] in HELP or name in HELP, name
        assert labels - ADDED.get(name, set()) <= known.get(name, set()), f"{name} has no {labels}"


def test_a_wrong_query_would_be_found() -> None:
    with pytest.raises(ValueError, match="."):
        Names().read("sum(rate(vlp_requests_total[5m])")
    found = Names()
    found.read('sum by (route) (rate(vlp_requests_total{status="1"}[5m])) / vlp_nothing')
    assert found == {"vlp_requests_total": {"status", "route"}, "vlp_nothing": {"route"}}


def test_prometheus_scrapes_our_service_with_a_key(services: dict[str, dict[str, Any]]) -> None:
    settings = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    (job,) = settings["scrape_configs"]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert services[host]["ports"][0].endswith(f":{port}")
    assert Path(job["authorization"]["credentials_file"]).name in services["prometheus"]["secrets"]


def test_grafana_finds_its_board_and_its_source(services: dict[str, dict[str, Any]]) -> None:
    board = json.loads((MONITORING / "vlp.json").read_text())
    (source,) = yaml.safe_load((MONITORING / "grafana/datasources/prometheus.yaml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}
    assert source["url"].split("/")[2].split(":")[0] in services
    (provider,) = yaml.safe_load((MONITORING / "grafana/dashboards/vlp.yaml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/vlp.json" in mounts
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
