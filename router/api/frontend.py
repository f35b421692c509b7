"""Shared front end of the HTTP and gRPC APIs: finds the model, validates, runs a call. Knows no protocol."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ...core.errors import InvalidRequest, Overloaded
from ...core.request import Request
from ...core.timeline import Instant, Timeline
from ..config import RouterConfig
from ..requests.flow import Flow
from ..requests.pieces import OutputDelta
from .batch import Lists, Start, explain_list, merged, name_of, streams_at_once
from .call import GenerateCall
from .grammar_checks import GrammarChecks
from .http.reading import room_of
from .models import ModelDirectory, ServedModel
from .structured import named
from .text_work import TextWork
from .validate import Limits, authenticate, num_chars_of, timeout_of, validate


@dataclass(frozen=True, slots=True)
class Started:
    """A request under way, or a list of them. `first` has arrived, so no refusal can come any more."""

    requests: tuple[Request, ...]
    model: ServedModel
    first: OutputDelta
    rest: AsyncGenerator[OutputDelta, None]

    @property
    def request(self) -> Request:
        """The request, or the first of a list."""
        return self.requests[0]

    async def pieces(self) -> AsyncGenerator[OutputDelta, None]:
        """Yield all pieces in order. Closing the generator cancels the request."""
        try:
            yield self.first
            async for piece in self.rest:
                yield piece
        finally:
            await self.rest.aclose()


class Frontend:
    """Shared front end of the HTTP and gRPC APIs; one per router process."""

    def __init__(self, config: RouterConfig, flow: Flow, *, reads_defaults: bool = True) -> None:
        """`reads_defaults` is passed to `ModelDirectory`."""
        self.flow = flow
        self.limits = Limits.of(config)
        self.room = room_of(config)  # for the messages of both APIs
        self.texts = TextWork()
        self.grammars = GrammarChecks()
        self._lists = Lists()
        self.models = ModelDirectory(flow, reads_defaults=reads_defaults)
        self._max_reading = config.max_running
        self._max_tokens = config.max_running_tokens
        self._num_reading = 0  # calls whose body was read and that are not admitted yet

    def authenticate(self, api_key: str | None) -> str:
        """The isolation domain of a key.

        Raises:
            Unauthenticated: keys are configured and this is none of them.
        """
        return authenticate(api_key, self.limits)

    def longest_context(self) -> int | None:
        """Longest context of all served models, in tokens; None: no model is served."""
        return max((self.models.facts(name).max_model_len for name in self.models.names()), default=None)

    def explain(self, request_id: str, domain: str) -> dict[str, Any] | None:
        """Report about a tenant's own request or list; None: not known (any more)."""
        explained = self.flow.explain(domain, request_id)
        if explained is not None:
            return explained
        names = self._lists.requests(domain, request_id)
        return explain_list(request_id, names, lambda name: self.flow.explain(domain, name))

    async def abort(self, request_id: str, domain: str) -> bool:
        """Cancel a tenant's own running request, or all of a list. False: the tenant has none of that name."""
        names = [request_id, *self._lists.requests(domain, request_id)]
        return any([await self.flow.abort(domain, name) for name in names])

    async def admit(self, call: GenerateCall) -> tuple[Request, ServedModel]:
        """Validate and tokenise a call.

        Raises:
            InvalidRequest and subclasses, Unauthenticated, Unavailable: raised by validate.py and models.py.
            Overloaded: too many calls are being read already.
            DeadlineExceeded: rendering and tokenising took longer than the call's timeout.
        """
        (request,), model = await self._admit([call])
        return request, model

    async def _admit(self, calls: Sequence[GenerateCall]) -> tuple[tuple[Request, ...], ServedModel]:
        self.authenticate(calls[0].api_key)  # first, so that errors tell strangers nothing about models
        if self._num_reading + len(calls) > self._max_reading:
            raise Overloaded(f"{self._num_reading} requests are being read, the most that are", retry_after_s=1.0)
        self._num_reading += len(calls)
        try:
            model = await self.models.get(calls[0].model)
        except BaseException:
            self._have_read(len(calls))
            raise
        work = partial(_validate, calls, model, self.limits)
        num_chars, timeout_s = sum(map(num_chars_of, calls)), timeout_of(calls[0], self.limits)
        requests = await self.texts.run(work, num_chars, timeout_s, partial(self._have_read, len(calls)))
        grammar = requests[0].sampling.grammar  # the calls of a list have the same
        if grammar is not None:
            try:
                await self.grammars.check(grammar, model)
            except InvalidRequest as error:
                raise named(error, calls[0].rule_field) from None
        return requests, model

    def _have_read(self, num_calls: int) -> None:
        self._num_reading -= num_calls

    async def start(self, call: GenerateCall, admitted: Callable[[], None] | None = None) -> Started:
        """Admit a call and run it up to its first piece. `admitted` is called when `call` is no longer needed.

        Raises:
            TwostrokeError: `admit` or `Flow.generate` refused it.
        """
        return await self._start([call], admitted=admitted)

    async def start_list(self, name: str, calls: Sequence[GenerateCall]) -> Started:
        """Admit the calls of a list, which differ in their prompts only, and run them up to the first piece.

        A list with one call becomes a request of that name.

        Raises:
            TwostrokeError: one of them was refused; then none of them runs.
        """
        if len(calls) == 1:
            return await self.start(replace(calls[0], request_id=name))
        named = [replace(call, request_id=name_of(name, place)) for place, call in enumerate(calls)]
        return await self._start(named, name)

    async def _start(
        self, calls: Sequence[GenerateCall], name: str | None = None, admitted: Callable[[], None] | None = None
    ) -> Started:
        arrived_s = self.flow.clock.now_s()
        requests, model = await self._admit(calls)
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
        sizes = sorted((r.num_choices * (len(r.prompt_ids) + r.expected_tokens) for r in requests), reverse=True)
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
