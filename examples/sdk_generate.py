"""Complete a text with the SDK, and ask where it ran. Needs a server: `twostroke serve`.

python examples/sdk_generate.py "def fibonacci(n):"
"""

import sys

from twostroke import Client, TwostrokeError


def main() -> int:
    """Print the completion and the pair of workers behind it."""
    prompt = sys.argv[1] if len(sys.argv) > 1 else "def fibonacci(n):"
    with Client("localhost:8001", timeout_s=30) as client:
        try:
            answer = client.generate(prompt, max_tokens=64, temperature=0)
            print(prompt + answer.text)
            print(f"\n{answer.usage.prompt_tokens} + {answer.usage.completion_tokens} tokens,", end=" ")
            print(f"{answer.usage.cached_tokens} of them from the cache")
            print(client.explain(answer.request_id))
        except TwostrokeError as error:
            print(f"{error.code}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
