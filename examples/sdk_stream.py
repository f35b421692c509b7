"""Two chats at once, streamed with the asynchronous SDK. Needs a server: `twostroke serve`.

python examples/sdk_stream.py
"""

import asyncio
import sys

from twostroke import AsyncClient, TwostrokeError

QUESTIONS = ("What does the json module do?", "How do I read a file line by line?")


async def ask(client: AsyncClient, question: str) -> str:
    """One chat; leaving the `async with` early would end the request on the server too."""
    pieces = []
    messages = [{"role": "user", "content": question}]
    async with client.chat_stream(messages, max_tokens=48, temperature=0) as stream:
        async for chunk in stream:
            pieces.append(chunk.text)
            print(".", end="", flush=True)
    return "".join(pieces)


async def main() -> int:
    """Print both answers."""
    async with AsyncClient("localhost:8001", timeout_s=60) as client:
        try:
            answers = await asyncio.gather(*(ask(client, question) for question in QUESTIONS))
        except TwostrokeError as error:
            print(f"{error.code}: {error}", file=sys.stderr)
            return 1
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"\n> {question}\n{answer}")
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
