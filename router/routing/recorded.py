"""All that a routing decision was made from, as a JSON-able value and back, so that it can be made again. Pure.

Numbers keep all their digits. What workers announced of their hand-overs is mostly the same for all of them, so it
stands once per kind (`sides`).
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from ...core.errors import InvalidRequest
from ...core.request import Role
from ...kv.spec import Component, KvSpec, LayerGroup
from .candidates import Asked, PolicyLimits, RequestFacts, Source, WorkerView
from .coefficients import Coefficients
from .facts import WorkerKey

_SIDE = ("numerics", "capabilities", "kv_spec", "num_ranks")
_PLAIN = tuple(field.name for field in fields(WorkerView) if field.name not in (*_SIDE, "key", "role", "coefficients"))


def asked_to_json(asked: Asked) -> dict[str, Any]:
    """The recorded form."""
    sides: list[dict[str, Any]] = []
    workers = [_view_to_json(view, sides) for view in asked.workers]
    sources = [{**_view_to_json(source.view, sides), "blocks": source.blocks} for source in asked.sources]
    return {
        "request": asdict(asked.request),
        "limits": asdict(asked.limits),
        "held_blocks": dict(asked.held),
        "sides": sides,
        "workers": workers,
        "sources": sources,
    }


def asked_from_json(told: Any) -> Asked:
    """The value of a recorded form.

    Raises:
        InvalidRequest: it is none of this release; says what is missing or wrong.
    """
    try:
        sides = [_side_from_json(side) for side in told["sides"]]
        workers = tuple(_view_from_json(one, sides) for one in told["workers"])
        sources = tuple(Source(_view_from_json(one, sides), int(one["blocks"])) for one in told.get("sources", ()))
        held = {str(name): int(blocks) for name, blocks in told["held_blocks"].items()}
        return Asked(RequestFacts(**told["request"]), workers, held, PolicyLimits(**told["limits"]), sources)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidRequest(f"no recorded decision of this release: {what}") from None


def _view_to_json(view: WorkerView, sides: list[dict[str, Any]]) -> dict[str, Any]:
    """A worker, without what stands in `sides`, to which a new kind is added."""
    side = _side_to_json(view)
    if side not in sides:
        sides.append(side)
    return {
        "worker_id": view.key.worker_id,
        "incarnation": str(view.key.incarnation),  # as text: many readers round JSON numbers of 64 bits
        "role": view.role.value,
        "side": sides.index(side),
        "coefficients": asdict(view.coefficients),
        **{name: getattr(view, name) for name in _PLAIN},
    }


def _view_from_json(one: dict[str, Any], sides: list[dict[str, Any]]) -> WorkerView:
    return WorkerView(
        key=WorkerKey(str(one["worker_id"]), int(one["incarnation"])),
        role=Role(one["role"]),
        coefficients=Coefficients(**one["coefficients"]),
        **sides[one["side"]],
        **{name: one[name] for name in _PLAIN},
    )


def _side_to_json(view: WorkerView) -> dict[str, Any]:
    return {
        "numerics": view.numerics.hex(),
        "capabilities": list(view.capabilities),
        "kv_spec": None if view.kv_spec is None else asdict(view.kv_spec),
        "num_ranks": view.num_ranks,
    }


def _side_from_json(side: dict[str, Any]) -> dict[str, Any]:
    return {
        "numerics": bytes.fromhex(side["numerics"]),
        "capabilities": tuple(side["capabilities"]),
        "kv_spec": None if side["kv_spec"] is None else _spec_from_json(side["kv_spec"]),
        "num_ranks": int(side["num_ranks"]),
    }


def _spec_from_json(spec: dict[str, Any]) -> KvSpec:
    return KvSpec(
        tuple(
            LayerGroup(
                group["name"], group["num_layers"], tuple(Component(**component) for component in group["components"])
            )
            for group in spec["groups"]
        )
    )
