"""What NetworkPolicies allow, computed as Kubernetes defines it: for tests that no packet has to cross."""

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Document = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod, with labels and an address, in a namespace; or an address outside the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: str = ""
    address: str = ""


def allowed(policies: list[Document], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is allowed by the egress rules of its source and the ingress rules of its target.

    Policies without a namespace of their own are not supported. A place outside has no rules. A block of addresses
    allows pods, too, whose address is in it.
    """
    return all(
        _direction(policies, own, other, port, protocol, kind)
        for own, other, kind in ((source, target, "Egress"), (target, source, "Ingress"))
    )


def _direction(policies: list[Document], own: Peer, other: Peer, port: int, protocol: str, kind: str) -> bool:
    """Whether the rules of one end allow it: no policy selects that end, or a rule of one that does matches."""
    chosen = [
        policy["spec"] for policy in policies
        if own.namespace and policy["metadata"]["namespace"] == own.namespace
        and kind in policy["spec"]["policyTypes"] and _selects(policy["spec"]["podSelector"], own.labels)
    ]  # fmt: skip
    rules = [(rule, spec) for spec in chosen for rule in spec.get(kind.lower(), ())]
    peers = "to" if kind == "Egress" else "from"
    return not chosen or any(
        (peers not in rule or any(_is(peer, other, own.namespace) for peer in rule[peers]))
        and ("ports" not in rule or any(_port(item, port, protocol) for item in rule["ports"]))
        for rule, _ in rules
    )


def _is(peer: Document, other: Peer, own_namespace: str) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        return bool(other.address) and _within(other.address, block["cidr"]) and not any(
            _within(other.address, part) for part in block.get("except", ())
        )  # fmt: skip
    if not other.namespace:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif other.namespace != own_namespace:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _within(address: str, block: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(block)


def _port(item: Document, port: int, protocol: str) -> bool:
    return item.get("protocol", "TCP") == protocol and item.get("port", port) == port


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(_expressions(selector, labels))


def _expressions(selector: Document, labels: dict[str, str]) -> Iterator[bool]:
    for item in selector.get("matchExpressions", ()):
        if item["operator"] != "In":
            raise NotImplementedError(item["operator"])
        yield labels.get(item["key"]) in item["values"]
