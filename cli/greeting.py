"""What `serve` tells its user at the end of a start: commands that can be copied. Starts nothing."""

from __future__ import annotations

from ..router.config import RouterConfig

_ASKED = '[{"role": "user", "content": "What does os.path.join do?"}]'


def commands(router: RouterConfig, url: str, grpc: str, model: str, program: str, python: str) -> list[str]:
    """Lines of a shell that ask the cluster over HTTP, by the SDK and by our own commands.

    `url`, `grpc`: of the faces. `program`, `python`: paths of `twostroke` and of its interpreter.
    """
    lines, curl, client, flags = [], "", "", ""
    if router.has_keys:
        lines.append("export TWOSTROKE_API_KEY=...  # a key of a client")
        curl += ' -H "authorization: Bearer $TWOSTROKE_API_KEY"'
        client += ", api_key=os.environ['TWOSTROKE_API_KEY']"
    if router.ssl_certfile:
        lines.append(f"export CA=...  # file of the authority that signed {router.ssl_certfile}")
        curl += ' --cacert "$CA"'
        client += ", tls=os.environ['CA']"
        flags += ' --tls-ca "$CA"'
    if router.ssl_certfile and router.ssl_ca_certs:
        lines.append(f"export CERT=... KEY=...  # files of a client's certificate, signed by {router.ssl_ca_certs}")
        curl += ' --cert "$CERT" --key "$KEY"'
        client += ", cert=os.environ['CERT'], key=os.environ['KEY']"
        flags += ' --tls-cert "$CERT" --tls-key "$KEY"'
    body = f'{{"model": "{model}", "messages": {_ASKED}, "max_tokens": 100}}'
    lines.append(f"curl {url}/v1/chat/completions -H 'content-type: application/json'{curl} -d '{body}'")
    asked = f"Client('{grpc}'{client}).generate('def add(a, b):').text"
    lines.append(f'{python} -P -c "{"import os; " if client else ""}from twostroke import Client; print({asked})"')
    return lines + [f"{program} {what} --grpc {grpc}{flags}" for what in ("chat", "status")]
