"""Head and workers reach the store and each other; who else is allowed what; and nothing else."""

import pytest

from tests.support.manifests import OPTIONS, RENDERS, Document, of_kind, pods, render, values
from tests.support.network_policies import Peer, allowed

NAMESPACE = values()["NAMESPACE"]
STORE = Peer(address=values()["STORE_CIDR"].split("/")[0])
API_SERVER = Peer(address=values()["API_SERVER_CIDR"].split("/")[0])
INTERNET = Peer(address="198.51.100.7")
OPERATOR = Peer({"app.kubernetes.io/component": "kuberay-operator"}, values()["OPERATOR_NAMESPACE"], "10.8.1.1")
OTHER_POD = Peer({"app": "web"}, NAMESPACE, "10.8.1.2")
STRANGER = Peer({"app": "web"}, "other", "10.8.1.3")
DNS = Peer({"k8s-app": "kube-dns"}, "kube-system", "10.8.1.4")
PROMETHEUS = Peer({"app": "prometheus"}, values()["MONITORING_NAMESPACE"], "10.8.1.5")
STORE_PORT = int(values()["STORE_PORT"])
API_PORT = int(values()["API_SERVER_PORT"])
SCORING = ("head", "decoding", "models")
ALONE = {"night", "submitter", "compact"}
"""Pods that are no nodes of the cluster."""


def policies(*names: str) -> list[Document]:
    return of_kind(render(*names), "NetworkPolicy")


def peers(*names: str) -> dict[str, Peer]:
    """The pods of a render, by name."""
    found = pods(render(*names)).items()
    return {name: Peer(pod.labels, NAMESPACE, f"10.8.0.{number}") for number, (name, pod) in enumerate(found, start=1)}


@pytest.mark.parametrize("names", RENDERS, ids="-".join)
def test_every_pod_is_isolated_in_both_directions(names: tuple[str, ...]) -> None:
    found = policies(*names)
    for name, pod in peers(*names).items():
        for port in (22, 80, STORE_PORT, API_PORT, 6379, 8265, 10001):
            for other in (STRANGER, OTHER_POD, INTERNET):
                assert not allowed(found, pod, other, port), (name, other, port)
                assert not allowed(found, other, pod, port), (name, other, port)
        assert not allowed(found, pod, Peer(address="169.254.169.254"), 80)  # the machine's own credentials


@pytest.mark.parametrize("entry", ["night", "training"])
def test_nodes_of_a_cluster_talk_to_each_other_on_all_ports(entry: str) -> None:
    found, nodes = policies(entry), peers(entry)
    for source in set(nodes) - ALONE:
        for target in set(nodes) - ALONE:
            for port in (6379, 8265, 10002, 35791):
                assert allowed(found, nodes[source], nodes[target], port)


def test_clusters_of_scoring_and_training_do_not_talk_to_each_other() -> None:
    found = [*policies("night"), *policies("training")]
    night, training = peers("night"), peers("training")
    for source in night.values():
        for target in training.values():
            for port in (6379, 8265, 10002):
                assert not allowed(found, source, target, port)
                assert not allowed(found, target, source, port)


@pytest.mark.parametrize(
    ("source", "target", "port", "protocol"),
    [
        *((name, DNS, 53, "UDP") for name in (*SCORING, *ALONE)),
        *((name, DNS, 53, "TCP") for name in (*SCORING, *ALONE)),
        *((name, STORE, STORE_PORT, "TCP") for name in (*SCORING, "compact")),
        ("head", API_SERVER, API_PORT, "TCP"),  # the autoscaler
        ("night", API_SERVER, API_PORT, "TCP"),
        ("submitter", "head", 8265, "TCP"),
        (OPERATOR, "head", 8265, "TCP"),
    ],
)
def test_allowed(source: str | Peer, target: str | Peer, port: int, protocol: str) -> None:
    nodes = peers("night")
    ends = [nodes[end] if isinstance(end, str) else end for end in (source, target)]
    assert allowed(policies("night"), ends[0], ends[1], port, protocol)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        *((name, STORE, 80) for name in SCORING),
        *((name, STORE, STORE_PORT) for name in ("submitter", "night")),
        *((name, API_SERVER, API_PORT) for name in ("decoding", "models", "submitter", "compact")),
        *((name, DNS, 9153) for name in SCORING),
        ("decoding", Peer({"app": "web"}, "kube-system"), 53),
        ("night", "head", 8265),
        ("submitter", "head", 6379),
        ("submitter", "decoding", 8265),
        ("decoding", "submitter", 8265),
        ("head", "night", 8265),
        ("compact", "head", 6379),
        ("head", "compact", 8265),
        (OPERATOR, "head", 6379),
        (OPERATOR, "decoding", 8265),
        (Peer(OPERATOR.labels, "other"), "head", 8265),  # a pod that only calls itself the operator
        (PROMETHEUS, "head", 8080),
        ("head", PROMETHEUS, 9090),
    ],
)
def test_refused(source: str | Peer, target: str | Peer, port: int) -> None:
    nodes = peers("night")
    ends = [nodes[end] if isinstance(end, str) else end for end in (source, target)]
    assert not allowed(policies("night"), ends[0], ends[1], port)


@pytest.mark.parametrize("entry", ["night", "training"])
def test_prometheus_may_scrape_with_the_option(entry: str) -> None:
    found, nodes = policies(entry, "metrics"), peers(entry)
    scraped = {name for name, pod in nodes.items() if allowed(found, PROMETHEUS, pod, 8080)}
    assert scraped == set(nodes) - ALONE
    assert not any(allowed(found, PROMETHEUS, pod, port) for pod in nodes.values() for port in (6379, 8265))
    assert not any(allowed(found, STRANGER, pod, 8080) for pod in nodes.values())
    ports = [container["ports"] for name in scraped for container in pods(render(entry))[name].spec["containers"][:1]]
    assert all({"name": "metrics", "containerPort": 8080} in named for named in ports)


def test_role_of_the_cloud_is_reached_with_the_option() -> None:
    nodes = peers("night")
    for address, port in (("169.254.170.23", 80), ("169.254.169.252", 988)):
        place = Peer(address=address)
        assert not any(allowed(policies("night"), pod, place, port) for pod in nodes.values())
        reached = {name for name, pod in nodes.items() if allowed(policies("night", "pod-identity"), pod, place, port)}
        assert reached == {*SCORING, "compact"}


def test_each_option_adds_only_what_it_is_for() -> None:
    plain = {policy["metadata"]["name"] for policy in policies("night")}
    for option in OPTIONS:
        more = {policy["metadata"]["name"] for policy in policies("night", option)} - plain
        assert more == ({f"nsnet-{option}"} if option in ("metrics", "pod-identity") else set())
