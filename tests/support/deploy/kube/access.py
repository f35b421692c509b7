"""Who may do what in the stand-in for Kubernetes: Roles that RoleBindings give to service accounts."""

from .paths import Target, group_of
from .store import Object, Store

VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


def token_of(namespace: str, account: str) -> str:
    """The token of a service account. A caller without one is the cluster's administrator."""
    return f"stand-in.{namespace}.{account}"


def verb_of(method: str, target: Target, query: dict[str, str]) -> str:
    """The verb that a call needs."""
    if method != "GET" or target.name:
        return VERBS[method]
    return "watch" if query.get("watch") in ("1", "true") else "list"


def is_allowed(store: Store, authorization: str, verb: str, target: Target) -> bool:
    """Whether the caller may do this."""
    if not authorization:
        return True
    _, _, token = authorization.partition(" ")
    _, namespace, account = token.split(".", 2)
    subject = {"kind": "ServiceAccount", "name": account, "namespace": namespace}
    for binding in store.all("rolebindings", namespace=target.namespace or None):
        if subject in binding.get("subjects", []):
            role = store.get("roles", binding["metadata"]["namespace"], binding["roleRef"]["name"])
            if role is not None and any(_covers(rule, verb, target) for rule in role["rules"]):
                return True
    return False


def _covers(rule: Object, verb: str, target: Target) -> bool:
    group = group_of(target.plural).rpartition("/")[0]
    resource = f"{target.plural}/{target.subresource}" if target.subresource else target.plural
    names = rule.get("resourceNames")
    return (
        verb in rule["verbs"]
        and group in rule["apiGroups"]
        and resource in rule["resources"]
        and (names is None or target.name in names)
    )
