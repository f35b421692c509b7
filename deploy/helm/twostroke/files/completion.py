"""The chart's test: asks the Service for a completion, and prints it with the workers that made it."""

import json
import os
import ssl
import urllib.request

URL, KEY = os.environ["URL"], os.environ.get("API_KEY")
HEADERS = {"content-type": "application/json"} | ({"authorization": f"Bearer {KEY}"} if KEY else {})

CA_FILE = os.environ.get("CA_FILE", "")
CONTEXT = ssl.create_default_context(cafile=CA_FILE if os.path.exists(CA_FILE) else None)


def ask(path: str, body: dict | None = None) -> dict:
    """Send a request and return the answer's document."""
    data = json.dumps(body).encode() if body else None
    with urllib.request.urlopen(
        urllib.request.Request(URL + path, data, HEADERS), timeout=120, context=CONTEXT
    ) as answer:
        return json.load(answer)


model = ask("/v1/models")["data"][0]["id"]
made = ask("/v1/completions", {"model": model, "prompt": "def add(a, b):\n" * 20, "max_tokens": 16})
workers = ask("/v1/cluster")["workers"]
assert made["usage"]["completion_tokens"] > 0, made
print(json.dumps({"model": model, "usage": made["usage"], "workers": [(w["worker_id"], w["role"]) for w in workers]}))
