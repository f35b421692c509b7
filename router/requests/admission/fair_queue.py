"""Queue of admitted requests that wait for a free worker: by priority, and fair between tenants by cost. Pure.

Within a priority the tenant with the least virtual time goes first, and its requests in order of arrival:

    start of a tenant = max(virtual time of the queue, its last start + cost of what it started / its share)
    virtual time of the queue = start of the request that left last; everything is 0 again when the queue is empty

So while several tenants wait, what they get differs by at most one request of each, whatever they ask for, and a tenant
that did not ask saved nothing up.
Source: start-time fair queueing (Goyal, Vin and Cheng 1996), with tags made when a request comes to the front of its
tenant, so that one that leaves without being served costs its tenant nothing; as in VTC (Sheng et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Ticket:
    """A waiting request."""

    name: str
    tenant: str
    cost: int  # tokens: its prompt and expected answers
    priority: int = 0  # a lower number goes first
    share: float = 1.0  # of its tenant, relative to others


@dataclass(slots=True)
class _Line:
    """Waiting requests of one tenant with one priority, in order of arrival."""

    tickets: dict[str, Ticket] = field(default_factory=dict)
    cost: int = 0

    @property
    def first(self) -> Ticket:
        return next(iter(self.tickets.values()))


class FairQueue:
    """Waiting requests. Its owner bounds their number and their cost."""

    def __init__(self) -> None:
        self.cost = 0  # of all that wait
        self._by_name: dict[str, Ticket] = {}
        self._lines: dict[int, dict[str, _Line]] = {}  # by priority, then by tenant
        self._starts: dict[str, float] = {}  # of each tenant's next request, where it is later than `_virtual`
        self._virtual = 0.0

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def add(self, ticket: Ticket) -> None:
        """A request waits from now on."""
        assert ticket.name not in self._by_name
        self._by_name[ticket.name] = ticket
        line = self._lines.setdefault(ticket.priority, {}).setdefault(ticket.tenant, _Line())
        line.tickets[ticket.name] = ticket
        line.cost += ticket.cost
        self.cost += ticket.cost
        # A tenant that did not wait until now starts at the present, not where it stopped.
        self._starts[ticket.tenant] = max(self._virtual, self._starts.get(ticket.tenant, 0.0))

    def remove(self, name: str) -> bool:
        """A request leaves without being served. False: it does not wait."""
        ticket = self._by_name.get(name)
        if ticket is None:
            return False
        self._leave(ticket)
        return True

    def first(self) -> Ticket | None:
        """The request that goes next, or None."""
        if not self._lines:
            return None
        lines = self._lines[min(self._lines)]
        tenant = min(lines, key=lambda tenant: self._starts[tenant])  # equal starts: who came first
        return lines[tenant].first

    def take(self) -> Ticket | None:
        """The request that goes next leaves, and its tenant has its cost; None: nobody waits."""
        ticket = self.first()
        if ticket is None:
            return None
        start = self._starts[ticket.tenant]
        self._virtual = max(self._virtual, start)
        self._starts[ticket.tenant] = start + ticket.cost / ticket.share
        lines = self._lines[ticket.priority]
        lines[ticket.tenant] = lines.pop(ticket.tenant)  # of equal ones it is the last now
        self._leave(ticket)
        return ticket

    def cost_before(self, ticket: Ticket) -> float:
        """Cost that is served before a request that would come now: all of higher priority, and fair parts of its own.

        Of its own priority: what its tenant has waiting, and of each other tenant at most as much, by their shares.
        """
        lines = self._lines.get(ticket.priority, {})
        own = lines.get(ticket.tenant)
        served = (ticket.cost + (own.cost if own else 0)) / ticket.share
        before = float(own.cost) if own else 0.0
        for tenant, line in lines.items():
            if tenant != ticket.tenant:
                before += min(line.cost, served * line.first.share)
        for priority, others in self._lines.items():
            if priority < ticket.priority:
                before += sum(line.cost for line in others.values())
        return before

    def displaced_by(self, ticket: Ticket, num: int, cost: int) -> list[Ticket] | None:
        """The requests that should give way to a new one, so that `num` of them and `cost` are gone; None: it does.

        Lower priorities give way first, then the last requests of tenants that have more waiting than the new one's
        would have with it. So a tenant that fills the queue makes room for those that have little there.
        """
        found: list[Ticket] = []
        for priority in sorted(self._lines, reverse=True):
            if priority < ticket.priority:
                break
            lines = self._lines[priority]
            left = {tenant: line.cost / line.first.share for tenant, line in lines.items()}
            newest = {tenant: reversed(line.tickets.values()) for tenant, line in lines.items()}
            own = ticket.cost / ticket.share
            if priority == ticket.priority:
                own += left.pop(ticket.tenant, 0.0)
            while left and (len(found) < num or sum(t.cost for t in found) < cost):
                tenant = max(left, key=lambda tenant: left[tenant])
                if priority == ticket.priority and left[tenant] <= own:
                    break
                victim = next(newest[tenant], None)
                if victim is None:
                    del left[tenant]
                    continue
                found.append(victim)
                left[tenant] -= victim.cost / victim.share
        return found if len(found) >= num and sum(t.cost for t in found) >= cost else None

    def _leave(self, ticket: Ticket) -> None:
        del self._by_name[ticket.name]
        lines = self._lines[ticket.priority]
        line = lines[ticket.tenant]
        del line.tickets[ticket.name]
        line.cost -= ticket.cost
        self.cost -= ticket.cost
        if not line.tickets:
            del lines[ticket.tenant]
            if not lines:
                del self._lines[ticket.priority]
        if not self._by_name:
            self._starts.clear()
            self._virtual = 0.0
        elif self._starts[ticket.tenant] <= self._virtual and not self._waits(ticket.tenant):
            del self._starts[ticket.tenant]

    def _waits(self, tenant: str) -> bool:
        return any(tenant in lines for lines in self._lines.values())
