"""Shared front end of the HTTP and gRPC APIs: finds the model, validates, runs a call. Knows no protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ...core.errors import ConfigError, DeadlineExceeded, InvalidRequest, Overloaded
from ...core.request import Request
from ...core.timeline import Instant, Timeline
from ...text.parsing.parsers import Parsers
from ..config import RouterConfig
from ..journal.journal import Entry, Journal, JournalLimits
from ..journal.streams import ResumableStreams
from ..keys.grants import Grant
from ..keys.rotation import KeyRotation
from ..peers.joined import joined_metrics, joined_report
from ..peers.peers import Peers
from ..requests.admission.entrance import Announced
from ..requests.admission.estimates import FullRate
from ..requests.flow import Flow
from ..requests.pieces import OutputDelta
from .batch import Lists, Start, explain_list, merged, name_of, streams_at_once
from .call import GenerateCall
from .grammar_checks import GrammarChecks
from .http.reading import room_of
from .models import ModelDirectory, ServedModel
from .running.resumable import Resumables
from .running.started import Started
from .structured import field_of_rule, named
from .text_work import TextWork
from .validate import Limits, num_chars_of, timeout_of, validate

MAX_READING_S = 1.0  # longest predicted wait to be read
MAX_READING_SHARE = 0.25  # of the time to the deadline


class Frontend:
    """Shared front end of the HTTP and gRPC APIs; one per router process."""

    def __init__(
        self, config: RouterConfig, flow: Flow, peers: Peers | None = None, *, reads_defaults: bool = True
    ) -> None:
        """`peers`: the other routers; None: there are none. `reads_defaults` is passed to `ModelDirectory`.

        Raises:
            ConfigError: the file of keys cannot be read, or is wrong.
        """
        self.flow = flow
        self.peers = Peers((), b"") if peers is None else peers  # one that has found none yet is false
        self.keys = KeyRotation(config.api_keys, config.api_key_file, config.operator_key)
        self.limits = Limits.of(config, self.keys.ring)
        self.room = room_of(config)  # for the messages of both APIs
        self.texts = TextWork()
        self.grammars = GrammarChecks()
        self._lists = Lists()
        parsers = Parsers(config.tool_parser, config.reasoning_parser)
        self.models = ModelDirectory(
            flow, reads_defaults=reads_defaults, parsers=parsers, chat_template=config.chat_template
        )
        limits = JournalLimits(
            config.journal_requests,
            config.journal_bytes,
            config.journal_s,
            config.responses_s,
            config.resume_grace_s,
        )
        self.streams = ResumableStreams(Journal(limits), flow.clock)
        self.resumables = Resumables(self, self.streams, self.peers)
        flow.metrics.journal_requests.set_function(lambda: len(self.streams.journal))
        flow.metrics.journal_bytes.set_function(lambda: self.streams.journal.num_bytes)
        flow.metrics.streams_adopted.set_function(lambda: self.resumables.num_adopted)
        self._max_reading = config.max_running
        self._max_tokens = config.max_running_tokens
        self._num_reading = 0  # calls whose body was read and that are not admitted yet
        self._num_loading = 0  # of those that are read: they wait for their model, which says nothing of the rate
        self._read_rate = FullRate()  # of calls per second, while some are being read

    def use_store(self, url: str, key: bytes) -> None:
        """Write resumable requests to a Redis, too. `key`: kv.keys.journal_key.

        Raises:
            ConfigError: its client is not installed, or the address is none.
        """
        try:
            from ..journal.redis_store import RedisStore  # with libraries that only this setting needs
        except ImportError:
            raise ConfigError("router.journal_url needs libraries: pip install 'twostroke[redis]'") from None
        metrics, streams = self.flow.metrics, self.streams

        def fenced(entry: Entry) -> None:
            metrics.streams_fenced.inc()
            streams.give_up(entry)

        life = f"{self.flow.router_id}/{self.flow.incarnation}"
        store = RedisStore(url, key, life, streams.journal.keep_s, fenced)
        self.resumables.store = store
        streams.on_change, streams.num_safe = store.changed, store.num_safe
        metrics.journal_store_up.set_function(lambda: float(store.is_up))

    async def leave(self) -> None:
        """Leave resumable requests that still run to other routers: their ends here are written nowhere."""
        self.streams.leave()
        await self.resumables.store.close()

    async def close(self) -> None:
        """End all resumable requests, and disconnect from the store."""
        await self.streams.close()
        await self.resumables.store.close()

    def grant_of(self, api_key: str | None) -> Grant:
        """What a key allows.

        Raises:
            Unauthenticated: keys are configured and this is none of them.
        """
        return self.limits.keys.grant_of(api_key)

    def authenticate(self, api_key: str | None) -> str:
        """The tenant of a key. Raises the errors of `grant_of`."""
        return self.grant_of(api_key).tenant

    def foresee(self, grant: Grant, size_bytes: int, timeout_s: float | None) -> None:
        """Refuse a request by its headers, if it would be refused whatever its body says.

        Raises:
            Unavailable, Overloaded, DeadlineExceeded: it would be.
        """
        left_s = min(timeout_s or self.limits.request_timeout_s, self.limits.request_timeout_s)
        self._check_reading(1, left_s)
        self.flow.foresee(Announced(grant.tenant, grant.priority, grant.allowance, size_bytes, left_s))

    def longest_context(self) -> int | None:
        """Longest context of all served models, in tokens; None: no model is served."""
        return max((self.models.facts(name).max_model_len for name in self.models.names()), default=None)

    async def explain(self, request_id: str, domain: str) -> dict[str, Any] | None:
        """Report about a tenant's own request or list, of the router that has it; None: not known (any more)."""
        return self.explain_here(domain, request_id) or await self.peers.explain(domain, request_id)

    def explain_here(self, domain: str, request_id: str) -> dict[str, Any] | None:
        """The same of this router alone."""
        explained = self.flow.explain(domain, request_id)
        if explained is not None:
            return explained
        names = self._lists.requests(domain, request_id)
        return explain_list(request_id, names, lambda name: self.flow.explain(domain, name))

    async def abort(self, request_id: str, domain: str) -> bool:
        """Cancel a tenant's own running request, or all of a list, at any router. False: there is none of that name."""
        return await self.abort_here(domain, request_id) or await self.peers.abort(domain, request_id)

    async def abort_here(self, domain: str, request_id: str) -> bool:
        """The same at this router alone."""
        names = [request_id, *self._lists.requests(domain, request_id)]
        return any([await self.flow.abort(domain, name) for name in names])

    async def cluster(self) -> dict[str, Any]:
        """`Flow.cluster` with what the other routers report; keys as in router/peers/joined.py."""
        return joined_report(self.report(), await self.peers.reports())

    def report(self) -> dict[str, Any]:
        """`Flow.cluster`, with what this router knows of its keys and of how many routers there are."""
        report = self.flow.cluster()
        report["router"] |= {"num_routers": len(self.peers) + 1, "keys_problem": self.keys.problem}
        return report

    async def metrics(self, accept: str) -> tuple[bytes, str]:
        """Metrics of all routers that share our ports, in the format that the Accept header asks for: body and type."""
        if not self.peers.num_scraped_here:
            return self.flow.metrics.render(accept)
        texts = [(self.flow.router_id, self.metrics_here()), *await self.peers.metrics()]
        return await asyncio.to_thread(joined_metrics, texts, accept)  # parsing takes some ten milliseconds

    def metrics_here(self) -> str:
        """Metrics of this router, as OpenMetrics text."""
        return self.flow.metrics.render("application/openmetrics-text")[0].decode()

    async def admit(self, call: GenerateCall, arrived_s: float | None = None) -> tuple[Request, ServedModel]:
        """Validate and tokenise a call. Its deadline counts from `arrived_s` on the flow's clock; None: from now.

        Raises:
            InvalidRequest and subclasses, Unauthenticated, Unavailable: raised by validate.py and models.py.
            Overloaded: too many calls are being read already.
            DeadlineExceeded: rendering and tokenising took longer than the call's timeout.
        """
        (request,), model = await self._admit([call], arrived_s)
        return request, model

    async def _admit(
        self, calls: Sequence[GenerateCall], arrived_s: float | None = None
    ) -> tuple[tuple[Request, ...], ServedModel]:
        self.grant_of(calls[0].api_key)  # first, so that errors tell strangers nothing about models
        timeout_s = timeout_of(calls[0], self.limits)
        left_s = timeout_s if arrived_s is None else timeout_s - (self.flow.clock.now_s() - arrived_s)
        if left_s <= 0:
            raise DeadlineExceeded(f"the request's timeout of {timeout_s:g} s passed before its message was read")
        self._check_reading(len(calls), left_s)
        self._num_reading += len(calls)
        self._num_loading += len(calls)
        try:
            model = await self.models.get(calls[0].model)
        except BaseException:
            self._num_reading -= len(calls)
            raise
        finally:
            self._num_loading -= len(calls)
        self._read_rate.see(self.flow.clock.now_s(), is_full=True)
        work = partial(_validate, calls, model, self.limits)
        num_chars = sum(map(num_chars_of, calls))
        requests = await self.texts.run(work, num_chars, left_s, partial(self._have_read, len(calls)))
        grammar = requests[0].sampling.grammar  # the calls of a list have the same
        if grammar is not None:
            try:
                left_s = timeout_s if arrived_s is None else timeout_s - (self.flow.clock.now_s() - arrived_s)
                await self.grammars.check(grammar, model, requests[0].owner, left_s)
            except InvalidRequest as error:
                raise named(error, field_of_rule(calls[0]), calls[0].tools) from None
        return requests, model

    def _check_reading(self, num_calls: int, left_s: float) -> None:
        """Refuse calls that would wait long to be read: else all would be read too late, and none be served."""
        if self._num_reading + num_calls > self._max_reading:
            raise Overloaded(f"{self._num_reading} requests are being read, the most that are", retry_after_s=1.0)
        rate = self._read_rate.per_s(self.flow.clock.now_s())
        wait_s = self._num_reading / rate if rate else 0.0
        if wait_s > min(MAX_READING_S, left_s * MAX_READING_SHARE):
            raise Overloaded(f"{self._num_reading} requests are read first, for {wait_s:.1f} s", retry_after_s=wait_s)

    def _have_read(self, num_calls: int) -> None:
        now_s = self.flow.clock.now_s()
        self._read_rate.note(num_calls, now_s)
        self._num_reading -= num_calls
        self._read_rate.see(now_s, is_full=self._num_reading > self._num_loading)

    async def start(self, call: GenerateCall, admitted: Callable[[], None] | None = None) -> Started:
        """Admit a call and run it up to its first piece. `admitted` is called when `call` is no longer needed.

        Raises:
            TwostrokeError: `admit` or `Flow.generate` refused it.
        """
        return await self._start([call], admitted=admitted)

    async def start_list(self, name: str, calls: Sequence[GenerateCall], arrived_s: float | None = None) -> Started:
        """Admit the calls of a list, which differ in their prompts only, and run them up to the first piece.

        A list with one call becomes a request of that name. Deadlines count from `arrived_s` on the flow's clock; None:
        from now.

        Raises:
            TwostrokeError: one of them was refused; then none of them runs.
        """
        if len(calls) == 1:
            return await self._start([replace(calls[0], request_id=name)], arrived_s=arrived_s)
        named = [replace(call, request_id=name_of(name, place)) for place, call in enumerate(calls)]
        return await self._start(named, name, arrived_s=arrived_s)

    async def _start(
        self,
        calls: Sequence[GenerateCall],
        name: str | None = None,
        admitted: Callable[[], None] | None = None,
        arrived_s: float | None = None,
    ) -> Started:
        arrived_s = self.flow.clock.now_s() if arrived_s is None else arrived_s
        requests, model = await self._admit(calls, arrived_s)
        if admitted is not None:
            admitted()
        before = 0
        if name is not None:
            self._check_room(requests)
            before = self._lists.add(requests[0].owner, name, len(requests))
        starts = [partial(self._generate, request, arrived_s) for request in requests]
        pieces = starts[0]() if name is None else _merged(starts, requests)
        try:
            first = await anext(pieces)
        except BaseException:
            await pieces.aclose()
            if name is not None and before:  # an older list of that name may still run
                self._lists.add(requests[0].owner, name, before)
            raise
        return Started(requests, model, first, pieces)

    def _generate(self, request: Request, arrived_s: float) -> AsyncGenerator[OutputDelta, None]:
        return self.flow.generate(request, _begun(arrived_s))

    def _check_room(self, requests: Sequence[Request]) -> None:
        """Refuse a list whose prompts that run at once exceed what the router admits; the other prompts wait."""
        sizes = sorted((request.num_tokens for request in requests), reverse=True)
        at_once = _at_once(requests)
        tokens = sum(sizes[:at_once])
        if tokens > self._max_tokens:
            raise InvalidRequest(
                f"{min(at_once, len(requests))} of the {len(requests)} prompts run at once and have {tokens} tokens "
                f"with those that they ask for; at most {self._max_tokens} may (router.max_running_tokens): "
                "send fewer or shorter prompts per request",
                param="prompt",
            )


def _merged(starts: Sequence[Start], requests: Sequence[Request]) -> AsyncGenerator[OutputDelta, None]:
    return merged(starts, requests[0].num_choices, _at_once(requests), requests[0].timeout_s)


def _at_once(requests: Sequence[Request]) -> int:
    return streams_at_once(requests[0].num_choices, max(len(request.prompt_ids) for request in requests))


def _begun(arrived_s: float) -> Timeline:
    timeline = Timeline()
    timeline.mark(Instant.ARRIVED, arrived_s)
    return timeline


def _validate(calls: Sequence[GenerateCall], model: ServedModel, limits: Limits) -> tuple[Request, ...]:
    """Validate all calls; an error about a prompt names its index."""
    requests = []
    for place, call in enumerate(calls):
        try:
            requests.append(validate(call, model, limits))
        except InvalidRequest as error:
            if len(calls) == 1 or error.param != "prompt":
                raise
            raise type(error)(f"prompt {place} of {len(calls)}: {error.message}", param="prompt") from None
    return tuple(requests)
