"""A chat through the HTTP face with the official OpenAI client (`pip install openai`). Needs `twostroke serve`.

python examples/openai_chat.py
"""

import sys

import openai


def main() -> int:
    """Stream one answer and print its usage."""
    # trust_env=False: a proxy that the environment names is not for this machine.
    direct = openai.DefaultHttpxClient(trust_env=False)
    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none", http_client=direct)
    try:
        model = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Write a function that reverses a list."}],
            max_tokens=64,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
            if chunk.usage is not None:
                print(f"\n\n{chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens from {model}")
    except openai.OpenAIError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
