"""The nodes of a joined Ray with their resources, each read on the node itself."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ...core.errors import ConfigError
from ...worker.machine import MachineFacts, machine_facts
from ..nodes import Living, Node
from .last_words import cause_of
from .ray_session import RaySession

_FREE_S = 15.0  # for the nodes to answer while a cluster serves
_FACTS_S = 60.0  # for all nodes to import this package and answer
_PROBE_S = 0.8
_PROBES = 64  # at once
_ALL_GPUS = {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}}  # tasks without GPUs see them


def nodes_of(address: str) -> list[Node]:
    """Join the Ray at `address`, ask all its nodes, and leave it. Takes some seconds.

    A node has as many cores and GPUs as Ray may use of it (`ray start --num-cpus`, `--num-gpus`).

    Raises:
        ConfigError: Ray cannot be joined, or a node does not answer; with the reason.
    """
    session = RaySession(address)
    try:
        session.open()
        return _nodes()
    finally:
        session.close()


def answering_nodes() -> list[Node]:
    """The nodes of the Ray that this process has joined which answer within a few seconds, with what is free there."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    alive = {node.name for node in living_nodes()}
    listed = [node for node in _listed() if node["NodeID"] in alive]
    asked = _asked(listed)
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_FREE_S) if asked else ([], [])
    found = []
    for node, question in zip(listed, asked, strict=True):
        if question in answered:
            with suppress(ray.exceptions.RayError):
                found.append(_node_of(node, ray.get(question), here))
    return found


def living_nodes() -> list[Living]:
    """The nodes of the Ray that this process has joined which answer. Takes a second at most per 64 nodes.

    Ray needs 15 to 20 seconds to find that a node is gone, so each is asked for a connection as well.
    """
    listed = _listed()
    with ThreadPoolExecutor(max(1, min(len(listed), _PROBES))) as probes:
        answers = probes.map(_answers, listed)
        return [_living(node) for node, answers_now in zip(listed, answers, strict=True) if answers_now]


def _living(node: dict[str, Any]) -> Living:
    has = node["Resources"]
    return Living(node["NodeID"], node["NodeManagerAddress"], has.get("CPU", 0.0), has.get("GPU", 0.0))


def _listed() -> list[dict[str, Any]]:
    """Ray's facts of each node that it takes for alive."""
    import ray

    list_nodes: Any = ray.nodes  # it has no types
    return [node for node in list_nodes() if node["Alive"]]


def _answers(node: dict[str, Any]) -> bool:
    """Return whether Ray's process on a node accepts a connection."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), _PROBE_S).close()
    except OSError:
        return False
    return True


def on_node(node_id: str) -> dict[str, Any]:
    """Ray's options for a task or actor that must run on this node; none for the empty id."""
    if not node_id:
        return {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def _nodes() -> list[Node]:
    import ray

    here = ray.get_runtime_context().get_node_id()
    found = sorted(_listed(), key=lambda node: bool(node["NodeID"] != here))
    asked = _asked(found)
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=_FACTS_S)
    nodes = []
    for node, question in zip(found, asked, strict=True):
        who = f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}) of the Ray cluster"
        if question not in answered:
            raise ConfigError(f"{who} did not answer within {_FACTS_S:g} s; remove it from the cluster or mend it")
        try:
            facts = ray.get(question)
        except ray.exceptions.RayError as error:
            what = f"{who} cannot run a worker: {cause_of(str(error))}; install the same twostroke on every node"
            raise ConfigError(what) from None
        nodes.append(_node_of(node, facts, here))
    return nodes


def _asked(nodes: list[dict[str, Any]]) -> list[Any]:
    """Ask each node for its facts; returns Ray's references to the answers."""
    import ray

    ask: Any = ray.remote(num_cpus=0, max_calls=1, max_retries=0, runtime_env=_ALL_GPUS)(machine_facts)
    return [ask.options(**on_node(node["NodeID"])).remote() for node in nodes]


def _node_of(node: dict[str, Any], facts: MachineFacts, here: str) -> Node:
    within = _within(facts, node["Resources"])
    return Node(node["NodeID"], node["NodeManagerAddress"], within, is_here=node["NodeID"] == here)


def _within(facts: MachineFacts, resources: dict[str, float]) -> MachineFacts:
    """The part of a machine that Ray may use."""
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    told = facts.cores_reason if cores >= facts.num_cores else f"Ray has {cores} CPUs of this node"
    return replace(facts, num_cores=min(facts.num_cores, cores), gpu_bytes=facts.gpu_bytes[:gpus], cores_reason=told)
