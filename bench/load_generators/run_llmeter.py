"""One llmeter run: a library without a command line. Runs in llmeter's environment and knows nothing of ours."""

import asyncio
import sys

from llmeter.endpoints.openai import OpenAICompletionEndpoint, OpenAICompletionStreamEndpoint
from llmeter.runner import Runner

KINDS = {"stream": OpenAICompletionStreamEndpoint, "whole": OpenAICompletionEndpoint}


async def main() -> None:
    url, out, model, kind, clients, requests, max_tokens = sys.argv[1:]
    endpoint = KINDS[kind](model, base_url=f"{url}/v1", api_key="none")
    payload = endpoint.create_payload("Write a function that reverses a list.", max_tokens=int(max_tokens))
    runner = Runner(endpoint, output_path=out, clients=int(clients), n_requests=int(requests), payload=payload)
    result = await runner.run(run_name="report")
    print(result.stats)


asyncio.run(main())
